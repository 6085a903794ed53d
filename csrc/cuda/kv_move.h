// The one CUDA kernel of trsp_fast: it copies rows of a KV slab. No torch here.
#pragma once

#include <cuda_runtime_api.h>

#include "../kv_moves.h"

namespace trsp {

// Queues the copy on `stream` of the current device; gives cudaGetLastError().
cudaError_t copy_rows_on_gpu(const Rows& rows, cudaStream_t stream);

}  // namespace trsp
