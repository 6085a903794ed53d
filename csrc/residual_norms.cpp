// residual_norms on the CPU: sums of |out - x| and (out - x)^2 per sequence, and their gradients.
#include <torch/library.h>

#include "tensors.h"

namespace trsp {
namespace {

template <typename T>
TRSP_INLINE void forward_run(const T* x, const T* out, int64_t n, Sum& l1_sum, Sum& l2_sum) {
  Sum l1 = l1_sum, l2 = l2_sum;
  for_each_lanes(
      n,
      [&](int64_t i, auto size) __attribute__((always_inline)) {
        const Lanes d = load(out + i, size) - load(x + i, size);
        l1.add(absolute(d));
        l2.add(d * d);
      },
      [&]() __attribute__((always_inline)) { l1.end_block(), l2.end_block(); });
  l1_sum = l1, l2_sum = l2;
}

// One run of a sequence backwards; a pointer that is null is not written, without a penalty nothing is read.
template <typename T>
struct Backward {
  const T *x, *out;
  T *dx, *dout;
  int64_t n;
  bool stream;
  const Penalty* penalty;
};

template <typename T>
TRSP_INLINE void backward_run(const Backward<T>& given) {
  const Backward<T> run = given;  // a copy that no store can alias
  const Penalty penalty = run.penalty ? *run.penalty : Penalty{};
  for_each_lanes(
      run.n,
      [&](int64_t i, auto size) __attribute__((always_inline)) {
        Lanes p;
        if (run.penalty) p = penalty(load(run.out + i, size) - load(run.x + i, size));
        if (run.dout) store(p, run.dout + i, size, run.stream);
        if (run.dx) store(-p, run.dx + i, size, run.stream);
      },
      [] {});
}

#define TRSP_LOOPS(T)                                                                             \
  TRSP_LOOP void forward_loop(const T* x, const T* out, int64_t n, Sum& l1, Sum& l2) {            \
    forward_run(x, out, n, l1, l2);                                                               \
  }                                                                                               \
  TRSP_LOOP void backward_loop(const Backward<T>& run) { backward_run(run); }
TRSP_LOOPS(float)
TRSP_LOOPS(c10::BFloat16)
TRSP_LOOPS(c10::Half)
#undef TRSP_LOOPS

std::tuple<Tensor, Tensor> forward(const Tensor& x_, const Tensor& out_, const std::optional<Tensor>& mask_) {
  const Shape shape(x_);
  const Tensor x = states(x_, x_, "x"), out = states(out_, x_, "out");
  const auto mask = token_mask(mask_, x);
  std::vector<double> p1(shape.sequences * shape.tiles), p2(p1.size());
  for_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const T *x_data = x.const_data_ptr<T>(), *out_data = out.const_data_ptr<T>();
    shape.for_each_tile([&](int64_t s, int64_t tile, int64_t begin, int64_t end) {
      Sum l1, l2;
      for_each_run(begin, end, shape.hidden, keeps(mask, shape, s), [&](int64_t first, int64_t n, bool kept) {
        const int64_t at = s * shape.length + first;
        if (kept) forward_loop(x_data + at, out_data + at, n, l1, l2);
      });
      p1[tile] = l1.value();
      p2[tile] = l2.value();
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
  Tensor dx = need_dx ? output(x) : nothing(x), dout = need_dout ? output(x) : nothing(x);
  const bool stream = streams(dx.nbytes() + dout.nbytes());
  for_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const T *x_data = x.const_data_ptr<T>(), *out_data = out.const_data_ptr<T>();
    T *dx_data = dx.mutable_data_ptr<T>(), *dout_data = dout.mutable_data_ptr<T>();
    shape.for_each_tile([&](int64_t s, int64_t, int64_t begin, int64_t end) {
      const Penalty of_sequence = penalty(c1, c2, s);
      for_each_run(begin, end, shape.hidden, keeps(mask, shape, s), [&](int64_t first, int64_t n, bool kept) {
        const int64_t at = s * shape.length + first;
        backward_loop(Backward<T>{x_data + at, out_data + at, need_dx ? dx_data + at : nullptr,
                                  need_dout ? dout_data + at : nullptr, n, stream, kept ? &of_sequence : nullptr});
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
