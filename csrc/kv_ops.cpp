// kv_compact_ and kv_regrid_ on the CPU: rows copied by memcpy on all threads.
#include "kv_ops.h"

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>

namespace trsp {
namespace {

// Rows are cut into chunks, so that a few long ones and many short ones both feed all threads; less than a chunk is not
// worth another thread.
void copy_rows(const Rows& all) {
  if (all.rows == 0 || all.bytes == 0) return;
  constexpr int64_t kChunk = 256 << 10;
  const int64_t chunk = std::min(all.bytes, kChunk), chunks = (all.bytes + chunk - 1) / chunk;
  at::parallel_for(0, all.rows * chunks, std::max<int64_t>(1, kChunk / chunk), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / chunks, first = i % chunks * chunk;
      std::memcpy(all.to + row * all.to_stride + first, all.from + row * all.from_stride + first,
                  std::min(chunk, all.bytes - first));
    }
  });
}

void copy(const SlotRows& both) {
  for (const Rows& rows : both) copy_rows(rows);
}

void compact_cpu(const Tensor& slab, at::IntArrayRef slots, at::IntArrayRef sizes, at::IntArrayRef filled) {
  compact(slab, slots, sizes, filled, [](auto... what) { compact_slots(what..., copy); });
}

void regrid_cpu(const Tensor& slab, const Tensor& scratch, int64_t count, at::IntArrayRef before,
                at::IntArrayRef after, at::IntArrayRef filled) {
  regrid(slab, scratch, count, before, after, filled, copy);
}

}  // namespace

TORCH_LIBRARY_IMPL(trsp_fast, CPU, m) {
  m.impl("kv_compact_", compact_cpu);
  m.impl("kv_regrid_", regrid_cpu);
}

}  // namespace trsp
