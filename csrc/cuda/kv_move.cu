#include <algorithm>
#include <cstdint>

#include "kv_move.h"

namespace trsp {
namespace {

// `Piece` is the widest type that every address is a multiple of; a row is `pieces` of them. Four loads per thread are
// under way before the first store.
template <typename Piece>
__global__ void copy_rows_kernel(Rows rows, int64_t pieces) {
  constexpr int kUnroll = 4;
  const int64_t total = rows.rows * pieces, threads = int64_t{gridDim.x} * blockDim.x;
  int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const auto source = [&](int64_t k) {
    return reinterpret_cast<const Piece*>(rows.from + k / pieces * rows.from_stride) + k % pieces;
  };
  const auto target = [&](int64_t k) {
    return reinterpret_cast<Piece*>(rows.to + k / pieces * rows.to_stride) + k % pieces;
  };
  for (; i + (kUnroll - 1) * threads < total; i += kUnroll * threads) {
    Piece held[kUnroll];
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) held[j] = *source(i + j * threads);
#pragma unroll
    for (int j = 0; j < kUnroll; ++j) *target(i + j * threads) = held[j];
  }
  for (; i < total; i += threads) *target(i) = *source(i);
}

template <typename Piece>
cudaError_t launch(const Rows& rows, cudaStream_t stream) {
  constexpr int64_t kThreads = 256, kMaxBlocks = 4096;  // several times the multiprocessors of any GPU; the rest loops
  const int64_t pieces = rows.bytes / static_cast<int64_t>(sizeof(Piece));
  const int64_t blocks = (rows.rows * pieces + kThreads - 1) / kThreads;
  copy_rows_kernel<Piece><<<static_cast<unsigned>(std::min(blocks, kMaxBlocks)), kThreads, 0, stream>>>(rows, pieces);
  return cudaGetLastError();
}

}  // namespace

cudaError_t copy_rows_on_gpu(const Rows& rows, cudaStream_t stream) {
  const auto common = reinterpret_cast<uintptr_t>(rows.from) | reinterpret_cast<uintptr_t>(rows.to) |
                      static_cast<uintptr_t>(rows.bytes | rows.from_stride | rows.to_stride);
  if (common % 16 == 0) return launch<uint4>(rows, stream);
  if (common % 4 == 0) return launch<uint32_t>(rows, stream);
  if (common % 2 == 0) return launch<uint16_t>(rows, stream);
  return launch<uint8_t>(rows, stream);
}

}  // namespace trsp
