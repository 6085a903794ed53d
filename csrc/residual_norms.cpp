// residual_norms on the CPU: sums of |out - x| and (out - x)^2 per sequence, and their gradients.
#include <torch/library.h>

#include "tensors.h"

namespace trsp {
namespace {

std::tuple<Tensor, Tensor> forward(const Tensor& x_, const Tensor& out_, const std::optional<Tensor>& mask_) {
  const Shape shape(x_);
  const Tensor x = states(x_, x_, "x"), out = states(out_, x_, "out");
  const auto mask = token_mask(mask_, x);
  std::vector<double> p1(shape.sequences * shape.tiles), p2(p1.size());
  for_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const T *x_data = x.const_data_ptr<T>(), *out_data = out.const_data_ptr<T>();
    shape.for_each_tile([&](int64_t s, int64_t tile, int64_t begin, int64_t end) {
      double l1[kLanes] = {}, l2[kLanes] = {};
      float x_buffer[kBlock], out_buffer[kBlock];
      for_each_block(begin, end, shape.hidden, keeps(mask, shape, s), [&](int64_t first, int64_t n, bool kept) {
        if (!kept) return;
        const int64_t at = s * shape.length + first;
        add_norms(widen(x_data + at, n, x_buffer), widen(out_data + at, n, out_buffer), n, l1, l2);
      });
      p1[tile] = fold(l1);
      p2[tile] = fold(l2);
    });
  });
  return {shape.sum(p1), shape.sum(p2)};
}

std::tuple<Tensor, Tensor> backward(const Tensor& x_, const Tensor& out_, const std::optional<Tensor>& mask_,
                                    const std::optional<Tensor>& c1_, const std::optional<Tensor>& c2_, bool need_dx,
                                    bool need_dout) {
  const Shape shape(x_);
  const Tensor x = states(x_, x_, "x"), out = states(out_, x_, "out");
  const auto mask = token_mask(mask_, x);
  const auto c1 = per_sequence(c1_, shape, "c1"), c2 = per_sequence(c2_, shape, "c2");
  Tensor dx = need_dx ? at::empty(x.sizes(), x.options()) : nothing(x);
  Tensor dout = need_dout ? at::empty(x.sizes(), x.options()) : nothing(x);
  for_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const T *x_data = x.const_data_ptr<T>(), *out_data = out.const_data_ptr<T>();
    T *dx_data = dx.mutable_data_ptr<T>(), *dout_data = dout.mutable_data_ptr<T>();
    shape.for_each_tile([&](int64_t s, int64_t, int64_t begin, int64_t end) {
      float x_buffer[kBlock], out_buffer[kBlock], p[kBlock], result[kBlock];
      const float c1_value = c1 ? c1->const_data_ptr<float>()[s] : 0.0f;
      const float* c2_value = c2 ? c2->const_data_ptr<float>() + s : nullptr;
      for_each_block(begin, end, shape.hidden, keeps(mask, shape, s), [&](int64_t first, int64_t n, bool kept) {
        const int64_t at = s * shape.length + first;
        if (kept)
          penalty(widen(x_data + at, n, x_buffer), widen(out_data + at, n, out_buffer), n, c1_value, c2_value, p);
        else
          std::fill_n(p, n, 0.0f);
        if (need_dout) {
          float* to = landing(dout_data + at, result);
          scale(p, n, 1.0f, to);
          narrow(to, n, dout_data + at);
        }
        if (need_dx) {
          float* to = landing(dx_data + at, result);
          scale(p, n, -1.0f, to);
          narrow(to, n, dx_data + at);
        }
      });
    });
  });
  return {dx, dout};
}

}  // namespace

TORCH_LIBRARY_IMPL(trsp_fast, CPU, m) {
  m.impl("residual_norms_cpu", forward);
  m.impl("residual_norms_cpu_backward", backward);
}

}  // namespace trsp
