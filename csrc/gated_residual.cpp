// gated_residual on the CPU: y and both sums in one pass over x and out, and their gradients in one pass back.
#include <torch/library.h>

#include "tensors.h"

namespace trsp {
namespace {

// One run of a sequence; a pointer that is null is neither read nor written.
template <typename T>
struct Forward {
  const T *x, *out;
  T* y;
  int64_t n;
  float gate;
  bool residual, stream;
  Sum *l1, *l2;
};

template <typename T>
TRSP_INLINE void forward_run(const Forward<T>& given) {
  const Forward<T> run = given;  // a copy that no store can alias
  Sum l1, l2;
  if (run.l1) l1 = *run.l1, l2 = *run.l2;
  // Gates 1 and 0 choose a side instead of adding a zero: that keeps the bits, the sign of -0 included.
  const bool only_out = !run.residual || run.gate == 1.0f, only_x = !only_out && run.gate == 0.0f;
  const float g = run.gate, rest = 1.0f - run.gate;
  for_each_lanes(
      run.n,
      [&](int64_t i, auto size) __attribute__((always_inline)) {
        const Lanes out = load(run.out + i, size);
        Lanes x;
        if (run.x) x = load(run.x + i, size);
        store(only_out ? g * out : only_x ? x : g * out + rest * x, run.y + i, size, run.stream);
        if (run.l1) {
          const Lanes d = out - x;
          l1.add(absolute(d));
          l2.add(d * d);
        }
      },
      [&]() __attribute__((always_inline)) { l1.end_block(), l2.end_block(); });
  if (run.l1) *run.l1 = l1, *run.l2 = l2;
}

TRSP_LOOP void forward_loop(const Forward<float>& run) { forward_run(run); }
TRSP_LOOP void forward_loop(const Forward<c10::BFloat16>& run) { forward_run(run); }
TRSP_LOOP void forward_loop(const Forward<c10::Half>& run) { forward_run(run); }

std::tuple<Tensor, Tensor, Tensor> forward(const Tensor& x_, const Tensor& out_, const Tensor& gate_,
                                           const std::optional<Tensor>& mask_, bool residual, bool norms) {
  const Shape shape(out_);
  const bool reads_x = residual || norms;
  const Tensor out = states(out_, out_, "out"), x = reads_x ? states(x_, out_, "x") : nothing(out_);
  const Tensor gate = per_sequence(gate_, shape, "gate");
  const auto mask = norms ? token_mask(mask_, out) : std::nullopt;
  Tensor y = output(out);
  const bool stream = streams(y.nbytes());
  std::vector<double> p1(norms ? shape.sequences * shape.tiles : 0), p2(p1.size());
  for_dtype(out, [&](auto zero) {
    using T = decltype(zero);
    const T *x_data = reads_x ? x.const_data_ptr<T>() : nullptr, *out_data = out.const_data_ptr<T>();
    T* y_data = y.mutable_data_ptr<T>();
    shape.for_each_tile([&](int64_t s, int64_t tile, int64_t begin, int64_t end) {
      Sum l1, l2;
      const float g = gate.const_data_ptr<float>()[s];
      for_each_run(begin, end, shape.hidden, keeps(mask, shape, s), [&](int64_t first, int64_t n, bool kept) {
        const int64_t at = s * shape.length + first;
        const bool adds = norms && kept;
        forward_loop(Forward<T>{reads_x ? x_data + at : nullptr, out_data + at, y_data + at, n, g, residual, stream,
                                adds ? &l1 : nullptr, adds ? &l2 : nullptr});
      });
      if (!norms) return;
      p1[tile] = l1.value();
      p2[tile] = l2.value();
    });
  });
  const auto fp32 = out.options().dtype(at::kFloat);
  if (!norms) return {y, at::empty({0}, fp32), at::empty({0}, fp32)};
  return {y, shape.sum(p1), shape.sum(p2)};
}

// One run of a sequence backwards; a pointer that is null is neither read nor written.
template <typename T>
struct Backward {
  const T *dy, *x, *out;
  T *dx, *dout;
  int64_t n;
  float gate;
  bool residual, stream;
  const Penalty* penalty;
  Sum* dot;
};

template <typename T>
TRSP_INLINE void backward_run(const Backward<T>& given) {
  const Backward<T> run = given;  // a copy that no store can alias
  const Penalty penalty = run.penalty ? *run.penalty : Penalty{};
  Sum dot;
  if (run.dot) dot = *run.dot;
  const float g = run.gate, rest = run.residual ? 1.0f - run.gate : 0.0f;
  for_each_lanes(
      run.n,
      [&](int64_t i, auto size) __attribute__((always_inline)) {
        Lanes dy, d, cofactor, dx;
        if (run.dy) dy = load(run.dy + i, size);
        Lanes dout = g * dy;
        if (run.residual) dx = rest * dy;
        if (run.out) cofactor = d = load(run.out + i, size);
        if (run.x) d = d - load(run.x + i, size);
        if (run.residual) cofactor = d;
        if (run.dot) dot.add(dy * cofactor);
        if (run.penalty) {
          const Lanes p = penalty(d);
          dout = dout + p;
          dx = dx - p;
        }
        if (run.dout) store(dout, run.dout + i, size, run.stream);
        if (run.dx) store(dx, run.dx + i, size, run.stream);
      },
      [&]() __attribute__((always_inline)) { dot.end_block(); });
  if (run.dot) *run.dot = dot;
}

TRSP_LOOP void backward_loop(const Backward<float>& run) { backward_run(run); }
TRSP_LOOP void backward_loop(const Backward<c10::BFloat16>& run) { backward_run(run); }
TRSP_LOOP void backward_loop(const Backward<c10::Half>& run) { backward_run(run); }

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& dy_, const std::optional<Tensor>& x_,
                                            const std::optional<Tensor>& out_, const Tensor& gate_,
                                            const std::optional<Tensor>& mask_, const std::optional<Tensor>& c1_,
                                            const std::optional<Tensor>& c2_, bool residual, bool need_dx,
                                            bool need_dout, bool need_dgate) {
  const Shape shape(dy_);
  const auto c1 = per_sequence(c1_, shape, "c1"), c2 = per_sequence(c2_, shape, "c2");
  const bool penalised = (c1 || c2) && (need_dx || need_dout);
  const bool reads_x = penalised || (residual && need_dgate), reads_out = penalised || need_dgate;
  const bool reads_dy = residual || need_dout || need_dgate;
  TORCH_CHECK_VALUE((x_ || !reads_x) && (out_ || !reads_out), "x and out are needed for these gradients, got none");
  const Tensor dy = states(dy_, dy_, "dy");
  const Tensor x = reads_x ? states(*x_, dy, "x") : nothing(dy);
  const Tensor out = reads_out ? states(*out_, dy, "out") : nothing(dy);
  const Tensor gate = per_sequence(gate_, shape, "gate");
  const auto mask = penalised ? token_mask(mask_, dy) : std::nullopt;
  Tensor dx = need_dx ? output(dy) : nothing(dy), dout = need_dout ? output(dy) : nothing(dy);
  const bool stream = streams(dx.nbytes() + dout.nbytes());
  std::vector<double> partials(need_dgate ? shape.sequences * shape.tiles : 0);
  for_dtype(dy, [&](auto zero) {
    using T = decltype(zero);
    const T *dy_data = dy.const_data_ptr<T>(), *x_data = x.const_data_ptr<T>(), *out_data = out.const_data_ptr<T>();
    T *dx_data = dx.mutable_data_ptr<T>(), *dout_data = dout.mutable_data_ptr<T>();
    shape.for_each_tile([&](int64_t s, int64_t tile, int64_t begin, int64_t end) {
      Sum dot;
      const float g = gate.const_data_ptr<float>()[s];
      const Penalty of_sequence = penalty(c1, c2, s);
      for_each_run(begin, end, shape.hidden, keeps(mask, shape, s), [&](int64_t first, int64_t n, bool kept) {
        const int64_t at = s * shape.length + first;
        backward_loop(Backward<T>{reads_dy ? dy_data + at : nullptr, reads_x ? x_data + at : nullptr, reads_out ? out_data + at : nullptr,
                                  need_dx ? dx_data + at : nullptr, need_dout ? dout_data + at : nullptr, n, g,
                                  residual, stream, penalised && kept ? &of_sequence : nullptr,
                                  need_dgate ? &dot : nullptr});
      });
      if (need_dgate) partials[tile] = dot.value();
    });
  });
  if (!need_dgate) return {dx, dout, at::empty({0}, dy.options().dtype(at::kFloat))};
  return {dx, dout, gate_.dim() ? shape.sum(partials) : shape.sum_all(partials)};
}

}  // namespace

TORCH_LIBRARY_IMPL(trsp_fast, CPU, m) {
  m.impl("gated_residual_cpu", forward);
  m.impl("gated_residual_cpu_backward", backward);
}

}  // namespace trsp
