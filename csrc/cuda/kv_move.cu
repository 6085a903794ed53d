#include <algorithm>
#include <cstdint>
#include <limits>

#include "kv_move.h"

namespace trsp {
namespace {

constexpr int kThreads = 256, kUnroll = 4;
constexpr int64_t kMaxBlocks = 4096;  // several times the multiprocessors of any GPU; the rest loops
constexpr int kMostSlots = 512;       // of one launch: they are its argument, which holds 4 KB

// A division of 64 bits takes as long as the copy itself, so `Index` is as narrow as the number of pieces allows.
template <typename Index>
struct Part {
  const char* from;
  char* to;
  int64_t from_stride, to_stride;
  Index pieces, total;  // of a row, of all rows
};

template <typename Index>
struct Parts {
  Part<Index> keys, values;
};

// `Piece` is the widest type that every address is a multiple of. Four loads per thread are under way before the first
// store. The grid's second dimension is K and V.
template <typename Piece, typename Index>
__global__ void copy_kernel(Parts<Index> parts) {
  const Part<Index> part = blockIdx.y ? parts.values : parts.keys;
  const Index threads = static_cast<Index>(gridDim.x) * kThreads;
  const auto source = [&](Index k) {
    const Index row = k / part.pieces;
    return reinterpret_cast<const Piece*>(part.from + row * part.from_stride) + (k - row * part.pieces);
  };
  const auto target = [&](Index k) {
    const Index row = k / part.pieces;
    return reinterpret_cast<Piece*>(part.to + row * part.to_stride) + (k - row * part.pieces);
  };
  for (Index i = static_cast<Index>(blockIdx.x) * kThreads + threadIdx.x; i < part.total; i += kUnroll * threads) {
    Piece held[kUnroll];
#pragma unroll
    for (int j = 0; j < kUnroll; ++j)
      if (i + j * threads < part.total) held[j] = *source(i + j * threads);
#pragma unroll
    for (int j = 0; j < kUnroll; ++j)
      if (i + j * threads < part.total) *target(i + j * threads) = held[j];
  }
}

// Slot from[i] becomes slot first + i.
struct Moves {
  int64_t slot_bytes;
  int32_t first, count, from[kMostSlots];
};

// A slot is never read after another was moved into it (from[i] >= first + i, ascending), so loads may run ahead.
template <typename Piece, typename Index>
__global__ void compact_kernel(Parts<Index> parts, Moves moves) {
  const Part<Index> part = blockIdx.y ? parts.values : parts.keys;
  const Index i = static_cast<Index>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= part.total) return;
  const Index row = i / part.pieces;
  char* piece = part.to + row * part.to_stride + (i - row * part.pieces) * static_cast<int64_t>(sizeof(Piece));
  const auto at = [&](int64_t slot) { return reinterpret_cast<Piece*>(piece + slot * moves.slot_bytes); };
  for (int slot = 0; slot < moves.count; slot += kUnroll) {
    Piece held[kUnroll];
#pragma unroll
    for (int j = 0; j < kUnroll; ++j)
      if (slot + j < moves.count) held[j] = *at(moves.from[slot + j]);
#pragma unroll
    for (int j = 0; j < kUnroll; ++j)
      if (slot + j < moves.count) *at(moves.first + slot + j) = held[j];
  }
}

// Calls launch(Piece{}, Parts<Index>) with the types that fit what is copied, `also` being one more stride.
template <typename Launch>
cudaError_t with_types(const SlotRows& both, int64_t also, const Launch& launch) {
  uintptr_t common = static_cast<uintptr_t>(also);
  for (const Rows& rows : both)
    if (rows.rows && rows.bytes)
      common |= reinterpret_cast<uintptr_t>(rows.from) | reinterpret_cast<uintptr_t>(rows.to) |
                static_cast<uintptr_t>(rows.bytes | rows.from_stride | rows.to_stride);
  const auto with_index = [&](auto piece) {
    const auto parts = [&](auto index) {
      using Index = decltype(index);
      const auto part = [](const Rows& rows) {
        const Index pieces = static_cast<Index>(rows.bytes / static_cast<int64_t>(sizeof(piece)));
        return Part<Index>{rows.from, rows.to, rows.from_stride, rows.to_stride, std::max<Index>(pieces, 1),
                           static_cast<Index>(pieces * rows.rows)};
      };
      return Parts<Index>{part(both[0]), part(both[1])};
    };
    const auto wide = parts(int64_t{});
    const int64_t most = std::max(wide.keys.total, wide.values.total);
    if (most == 0) return cudaSuccess;
    // The unrolled loop counts beyond the end by as much as all threads of a round.
    const int64_t beyond = 2 * kUnroll * kMaxBlocks * kThreads;
    if (most < std::numeric_limits<uint32_t>::max() - beyond) {
      launch(piece, parts(uint32_t{}), most);
    } else {
      launch(piece, wide, most);
    }
    return cudaGetLastError();
  };
  if (common % 16 == 0) return with_index(uint4{});
  if (common % 4 == 0) return with_index(uint32_t{});
  if (common % 2 == 0) return with_index(uint16_t{});
  return with_index(uint8_t{});
}

int64_t blocks_for(int64_t pieces) { return (pieces + kThreads - 1) / kThreads; }

}  // namespace

cudaError_t copy_on_gpu(const SlotRows& both, cudaStream_t stream) {
  return with_types(both, 0, [&](auto piece, const auto& parts, int64_t most) {
    const dim3 grid(static_cast<unsigned>(std::min((blocks_for(most) + kUnroll - 1) / kUnroll, kMaxBlocks)), 2);
    copy_kernel<decltype(piece)><<<grid, kThreads, 0, stream>>>(parts);
  });
}

cudaError_t compact_on_gpu(char* slab, const int64_t* slots, int64_t count, const SlotShape& shape,
                           const Filled& filled, cudaStream_t stream) {
  int64_t first = 0;
  while (first < count && slots[first] == first) ++first;
  for (; first < count; first += kMostSlots) {
    const auto now = static_cast<int32_t>(std::min<int64_t>(count - first, kMostSlots));
    Moves moves{shape.bytes(), static_cast<int32_t>(first), now, {}};
    std::copy_n(slots + first, now, moves.from);
    const SlotRows both = slot_rows(slab, shape, slab, shape, filled);
    const cudaError_t error = with_types(both, shape.bytes(), [&](auto piece, const auto& parts, int64_t most) {
      const dim3 grid(static_cast<unsigned>(blocks_for(most)), 2);
      compact_kernel<decltype(piece)><<<grid, kThreads, 0, stream>>>(parts, moves);
    });
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace trsp
