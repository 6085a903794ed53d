// What the CPU ops ask of their tensors: shapes as sequences of tiles, checks, outputs, sums in a fixed order.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "lanes.h"

namespace trsp {

using at::Tensor;

constexpr int64_t kTile = 4096;  // elements of one sequence behind one partial sum
constexpr int64_t kGrain = 8;    // tiles per task, 32 Ki elements as in ATen

// A tensor (G, ..., H) as G sequences, each cut into tiles that do not depend on the number of threads.
struct Shape {
  int64_t sequences, hidden, length, tiles;  // length: elements of one sequence

  explicit Shape(const Tensor& like) {
    TORCH_CHECK_VALUE(like.dim() >= 2, "hidden states must have shape (G, ..., H), got ", like.sizes());
    sequences = like.size(0);
    hidden = like.size(-1);
    length = sequences ? like.numel() / sequences : 0;
    tiles = (length + kTile - 1) / kTile;
  }

  // work(sequence, tile, begin, end), the tiles spread over the threads.
  template <typename Work>
  void for_each_tile(const Work& work) const {
    at::parallel_for(0, sequences * tiles, kGrain, [&](int64_t first, int64_t last) {
      const KeepsSubnormals scope;
      for (int64_t tile = first; tile < last; ++tile) {
        const int64_t begin = tile % tiles * kTile;
        work(tile / tiles, tile, begin, std::min(begin + kTile, length));
      }
      finish_streaming();
    });
  }

  // fp32 [G]: the partials of each sequence added in order.
  Tensor sum(const std::vector<double>& partials) const { return add(partials, at::empty({sequences}, at::kFloat)); }
  // fp32 0-D: those of all sequences.
  Tensor sum_all(const std::vector<double>& partials) const { return add(partials, at::empty({}, at::kFloat)); }

 private:
  static Tensor add(const std::vector<double>& partials, Tensor sums) {
    const KeepsSubnormals scope;
    float* to = sums.mutable_data_ptr<float>();
    const int64_t count = sums.numel(), each = count ? partials.size() / count : 0;
    for (int64_t s = 0; s < count; ++s)
      to[s] = static_cast<float>(std::accumulate(partials.data() + s * each, partials.data() + (s + 1) * each, 0.0));
    return sums;
  }
};

// Calls work(first, count, kept) for the elements [begin, end) of a sequence, in runs that the mask treats alike.
// Neighbouring tokens join, so a mask of ones gives the runs, and the bits, of no mask.
template <typename Work>
void for_each_run(int64_t begin, int64_t end, int64_t hidden, const bool* keeps, const Work& work) {
  if (!keeps) return work(begin, end - begin, true);
  while (begin < end) {
    int64_t token = begin / hidden;
    const bool kept = keeps[token];
    while ((token + 1) * hidden < end && keeps[token + 1] == kept) ++token;
    const int64_t stop = std::min(end, (token + 1) * hidden);
    work(begin, stop - begin, kept);
    begin = stop;
  }
}

inline Tensor nothing(const Tensor& like) { return at::empty({0}, like.options()); }

// A new contiguous tensor of `like`'s shape and dtype. A large one is fresh memory in every call, and its page faults
// cost more than the maths (NOTES.md): huge pages make 512 times fewer of them.
inline Tensor output(const Tensor& like) {
  Tensor result = at::empty(like.sizes(), like.options());
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t huge = 2 << 20;
  const uintptr_t begin = reinterpret_cast<uintptr_t>(result.mutable_data_ptr());
  const uintptr_t first = (begin + huge - 1) / huge * huge, last = (begin + result.nbytes()) / huge * huge;
  // Advice only: where the kernel declines, the pages stay small. Deterministic mode has touched them already.
  if (last > first) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
  return result;
}

// Whether an op's results are too large to be found in the cache by whoever reads them next. Measured, not asked of the
// system: virtual machines name the cache of the whole host. Below, streaming gains nothing; from here on a quarter.
inline bool streams(int64_t bytes) { return bytes >= 32 << 20; }

// A contiguous tensor of `like`'s shape and dtype.
inline Tensor states(const Tensor& tensor, const Tensor& like, const char* name) {
  TORCH_CHECK_VALUE(tensor.device().is_cpu(), name, " must be on the CPU, got ", tensor.device());
  TORCH_CHECK_VALUE(tensor.sizes() == like.sizes(), name, " must have shape ", like.sizes(), ", got ", tensor.sizes());
  TORCH_CHECK_VALUE(tensor.scalar_type() == like.scalar_type(), name, " must have dtype ", like.scalar_type(), ", got ",
                    tensor.scalar_type());
  return tensor.contiguous();
}

// One fp32 value per sequence, from a tensor [G] or 0-D.
inline Tensor per_sequence(const Tensor& tensor, const Shape& shape, const char* name) {
  TORCH_CHECK_VALUE(tensor.device().is_cpu() && tensor.scalar_type() == at::kFloat, name,
                    " must be fp32 on the CPU, got ", tensor.scalar_type());
  return tensor.expand({shape.sequences}).contiguous();
}

inline std::optional<Tensor> per_sequence(const std::optional<Tensor>& tensor, const Shape& shape, const char* name) {
  if (!tensor) return std::nullopt;
  return per_sequence(*tensor, shape, name);
}

// The mask of all tokens, contiguous.
inline std::optional<Tensor> token_mask(const std::optional<Tensor>& mask, const Tensor& like) {
  if (!mask) return std::nullopt;
  TORCH_CHECK_VALUE(mask->device().is_cpu() && mask->scalar_type() == at::kBool,
                    "token_mask must be bool on the CPU, got ", mask->scalar_type());
  return mask->expand(like.sizes().slice(0, like.dim() - 1)).contiguous();
}

// The part of a contiguous mask that belongs to one sequence; null when every token is kept.
inline const bool* keeps(const std::optional<Tensor>& mask, const Shape& shape, int64_t sequence) {
  return mask ? mask->const_data_ptr<bool>() + sequence * (shape.length / shape.hidden) : nullptr;
}

// The penalty of one sequence, from c1 and c2 as `per_sequence` gives them.
inline Penalty penalty(const std::optional<Tensor>& c1, const std::optional<Tensor>& c2, int64_t sequence) {
  return {c1 ? c1->const_data_ptr<float>()[sequence] : 0.0f, c2 ? c2->const_data_ptr<float>() + sequence : nullptr};
}

// Calls work(T{}) with the element type of `like`.
template <typename Work>
void for_dtype(const Tensor& like, const Work& work) {
  switch (like.scalar_type()) {
    case at::kFloat: return work(float{});
    case at::kBFloat16: return work(c10::BFloat16{});
    case at::kHalf: return work(c10::Half{});
    default: TORCH_CHECK_VALUE(false, "hidden states must be fp32, bf16 or fp16, got ", like.scalar_type());
  }
}

}  // namespace trsp
