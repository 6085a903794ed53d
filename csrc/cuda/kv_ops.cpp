// kv_compact_ and kv_regrid_ on CUDA tensors: the kernels of kv_move.cu on the current stream. A later copy reads what an
// earlier one wrote, and the stream keeps their order.
#include "../kv_ops.h"

#include <c10/core/DeviceGuard.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "kv_move.h"

namespace trsp {
namespace {

void copy(const SlotRows& both) { C10_CUDA_CHECK(copy_on_gpu(both, c10::cuda::getCurrentCUDAStream())); }

void compact_cuda(const Tensor& slab, at::IntArrayRef slots, at::IntArrayRef sizes, at::IntArrayRef filled) {
  const c10::DeviceGuard guard(slab.device());
  compact(slab, slots, sizes, filled, [](auto... what) {
    C10_CUDA_CHECK(compact_on_gpu(what..., c10::cuda::getCurrentCUDAStream()));
  });
}

void regrid_cuda(const Tensor& slab, const Tensor& scratch, int64_t count, at::IntArrayRef before,
                 at::IntArrayRef after, at::IntArrayRef filled) {
  const c10::DeviceGuard guard(slab.device());
  regrid(slab, scratch, count, before, after, filled, copy);
}

}  // namespace

TORCH_LIBRARY_IMPL(trsp_fast, CUDA, m) {
  m.impl("kv_compact_", compact_cuda);
  m.impl("kv_regrid_", regrid_cuda);
}

}  // namespace trsp
