// What the CPU ops ask of their tensors: shapes as sequences of tiles, checks, sums in a fixed order.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include <optional>
#include <tuple>
#include <vector>

#include "span.h"

namespace trsp {

using at::Tensor;

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
      for (int64_t tile = first; tile < last; ++tile) {
        const int64_t begin = tile % tiles * kTile;
        work(tile / tiles, tile, begin, std::min(begin + kTile, length));
      }
    });
  }

  // [G] fp32: the partials of each sequence added in order.
  Tensor sum(const std::vector<double>& partials) const {
    Tensor sums = at::empty({sequences}, at::kFloat);
    float* to = sums.mutable_data_ptr<float>();
    for (int64_t s = 0; s < sequences; ++s) {
      double total = 0.0;
      for (int64_t t = 0; t < tiles; ++t) total += partials[s * tiles + t];
      to[s] = static_cast<float>(total);
    }
    return sums;
  }
};

inline Tensor nothing(const Tensor& like) { return at::empty({0}, like.options()); }

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
