// The CUDA kernels of trsp_fast: they move the slots of a KV slab. No torch here.
#pragma once

#include <cuda_runtime_api.h>

#include "../kv_moves.h"

namespace trsp {

// Both queue their work on `stream` of the current device and give cudaGetLastError().

cudaError_t copy_on_gpu(const SlotRows& both, cudaStream_t stream);

// What compact_slots does, in one launch for 512 slots: a thread takes its piece of the first slot through all of them.
cudaError_t compact_on_gpu(char* slab, const int64_t* slots, int64_t count, const SlotShape& shape,
                           const Filled& filled, cudaStream_t stream);

}  // namespace trsp
