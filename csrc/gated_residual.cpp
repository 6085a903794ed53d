// gated_residual on the CPU: y and both sums in one pass over x and out, and their gradients in one pass back.
#include <torch/library.h>

#include "tensors.h"

namespace trsp {
namespace {

// y of one block. Gates 1 and 0 choose a side instead of adding a zero: that keeps the bits, the sign of -0 included.
void weigh(const float* x, const float* out, int64_t n, float gate, bool residual, float* y) {
  if (!residual || gate == 1.0f) return scale(out, n, gate, y);
  if (gate == 0.0f) return scale(x, n, 1.0f, y);
  mix(out, gate, x, 1.0f - gate, n, y);
}

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x_, const Tensor& out_, const Tensor& gate_,
                                           const std::optional<Tensor>& mask_, bool residual, bool norms) {
  const Shape shape(out_);
  const bool reads_x = residual || norms;
  const Tensor out = states(out_, out_, "out"), x = reads_x ? states(x_, out_, "x") : nothing(out_);
  const Tensor gate = per_sequence(gate_, shape, "gate");
  const auto mask = norms ? token_mask(mask_, out) : std::nullopt;
  Tensor y = at::empty(out.sizes(), out.options());
  std::vector<double> p1(norms ? shape.sequences * shape.tiles : 0), p2(p1.size());
  for_dtype(out, [&](auto zero) {
    using T = decltype(zero);
    const T *x_data = x.const_data_ptr<T>(), *out_data = out.const_data_ptr<T>();
    T* y_data = y.mutable_data_ptr<T>();
    shape.for_each_tile([&](int64_t s, int64_t tile, int64_t begin, int64_t end) {
      double l1[kLanes] = {}, l2[kLanes] = {};
      float x_buffer[kBlock], out_buffer[kBlock], y_buffer[kBlock];
      const float g = gate.const_data_ptr<float>()[s];
      for_each_block(begin, end, shape.hidden, keeps(mask, shape, s), [&](int64_t first, int64_t n, bool kept) {
        const int64_t at = s * shape.length + first;
        const float* x_block = reads_x ? widen(x_data + at, n, x_buffer) : nullptr;
        const float* out_block = widen(out_data + at, n, out_buffer);
        float* to = landing(y_data + at, y_buffer);
        weigh(x_block, out_block, n, g, residual, to);
        narrow(to, n, y_data + at);
        if (norms && kept) add_norms(x_block, out_block, n, l1, l2);
      });
      if (!norms) return;
      p1[tile] = fold(l1);
      p2[tile] = fold(l2);
    });
  });
  const auto fp32 = out.options().dtype(at::kFloat);
  if (!norms) return {y, at::empty({0}, fp32), at::empty({0}, fp32)};
  return {y, shape.sum(p1), shape.sum(p2)};
}

// What one gradient of hidden states is made of: factor*dy + sign*p, either term possibly missing.
template <typename T>
void write_gradient(const float* dy, float factor, const float* p, float sign, int64_t n, T* gradient, float* buffer) {
  float* to = landing(gradient, buffer);
  if (dy && p)
    mix(dy, factor, p, sign, n, to);
  else if (dy)
    scale(dy, n, factor, to);
  else if (p)
    scale(p, n, sign, to);
  else
    std::fill_n(to, n, 0.0f);
  narrow(to, n, gradient);
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& dy_, const std::optional<Tensor>& x_,
                                            const std::optional<Tensor>& out_, const Tensor& gate_,
                                            const std::optional<Tensor>& mask_, const std::optional<Tensor>& c1_,
                                            const std::optional<Tensor>& c2_, bool residual, bool need_dx,
                                            bool need_dout, bool need_dgate) {
  const Shape shape(dy_);
  const auto c1 = per_sequence(c1_, shape, "c1"), c2 = per_sequence(c2_, shape, "c2");
  const bool penalised = (c1 || c2) && (need_dx || need_dout);
  const bool reads_x = penalised || (residual && need_dgate), reads_out = penalised || need_dgate;
  TORCH_CHECK_VALUE((x_ || !reads_x) && (out_ || !reads_out), "x and out are needed for these gradients, got none");
  const Tensor dy = states(dy_, dy_, "dy");
  const Tensor x = reads_x ? states(*x_, dy, "x") : nothing(dy);
  const Tensor out = reads_out ? states(*out_, dy, "out") : nothing(dy);
  const Tensor gate = per_sequence(gate_, shape, "gate");
  const auto mask = penalised ? token_mask(mask_, dy) : std::nullopt;
  Tensor dx = need_dx ? at::empty(dy.sizes(), dy.options()) : nothing(dy);
  Tensor dout = need_dout ? at::empty(dy.sizes(), dy.options()) : nothing(dy);
  std::vector<double> partials(need_dgate ? shape.sequences * shape.tiles : 0);
  for_dtype(dy, [&](auto zero) {
    using T = decltype(zero);
    const T *dy_data = dy.const_data_ptr<T>(), *x_data = x.const_data_ptr<T>(), *out_data = out.const_data_ptr<T>();
    T *dx_data = dx.mutable_data_ptr<T>(), *dout_data = dout.mutable_data_ptr<T>();
    shape.for_each_tile([&](int64_t s, int64_t tile, int64_t begin, int64_t end) {
      float dy_buffer[kBlock], x_buffer[kBlock], out_buffer[kBlock], d[kBlock], p[kBlock], result[kBlock];
      double dot[kLanes] = {};
      const float g = gate.const_data_ptr<float>()[s], c1_value = c1 ? c1->const_data_ptr<float>()[s] : 0.0f;
      const float* c2_value = c2 ? c2->const_data_ptr<float>() + s : nullptr;
      for_each_block(begin, end, shape.hidden, keeps(mask, shape, s), [&](int64_t first, int64_t n, bool kept) {
        const int64_t at = s * shape.length + first;
        const float* dy_block = widen(dy_data + at, n, dy_buffer);
        const float* x_block = reads_x ? widen(x_data + at, n, x_buffer) : nullptr;
        const float* out_block = reads_out ? widen(out_data + at, n, out_buffer) : nullptr;
        const float* p_block = penalised && kept ? p : nullptr;
        if (p_block) penalty(x_block, out_block, n, c1_value, c2_value, p);
        if (need_dgate && residual) subtract(out_block, x_block, n, d);
        if (need_dgate) add_dot(dy_block, residual ? d : out_block, n, dot);
        if (need_dout) write_gradient(dy_block, g, p_block, 1.0f, n, dout_data + at, result);
        if (need_dx)
          write_gradient(residual ? dy_block : nullptr, 1.0f - g, p_block, -1.0f, n, dx_data + at, result);
      });
      if (need_dgate) partials[tile] = fold(dot);
    });
  });
  return {dx, dout, need_dgate ? shape.sum(partials) : at::empty({0}, dy.options().dtype(at::kFloat))};
}

}  // namespace

TORCH_LIBRARY_IMPL(trsp_fast, CPU, m) {
  m.impl("gated_residual_cpu", forward);
  m.impl("gated_residual_cpu_backward", backward);
}

}  // namespace trsp
