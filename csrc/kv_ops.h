// The ops on a KV slab, kv_compact_ and kv_regrid_: their checks, and their moves by whatever copies on a device.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <algorithm>

#include "kv_moves.h"

namespace trsp {

using at::Tensor;

// [batch, heads, length, key width, value width] of a slot, in elements.
inline SlotShape slot_shape(at::IntArrayRef sizes, const Tensor& slab, const char* name) {
  TORCH_CHECK_VALUE(sizes.size() == 5, name, " must be [batch, heads, length, key width, value width], got ", sizes);
  const int64_t item = slab.element_size();
  int64_t product = 2 * item;  // of everything at once: no smaller product overflows then either
  for (const int64_t size : sizes)
    TORCH_CHECK_VALUE(size >= 0 && !__builtin_mul_overflow(product, std::max<int64_t>(size, 1), &product), name,
                      " must be sizes whose product is an address, got ", sizes);
  return {sizes[0], sizes[1], sizes[2], sizes[3] * item, sizes[4] * item};
}

inline Filled filled_part(at::IntArrayRef filled, const SlotShape& shape) {
  TORCH_CHECK_VALUE(filled.size() == 2 && filled[0] >= 0 && filled[0] <= shape.batch && filled[1] >= 0 &&
                        filled[1] <= shape.length,
                    "filled must be [batch, length] within the slot, got ", filled);
  return {filled[0], filled[1]};
}

inline void check_slab(const Tensor& slab, int64_t slots, const SlotShape& shape) {
  TORCH_CHECK_VALUE(slab.dim() == 1 && slab.is_contiguous(), "the slab must be one contiguous dimension, got ",
                    slab.sizes());
  const int64_t bytes = static_cast<int64_t>(slab.nbytes());
  TORCH_CHECK_VALUE(slots == 0 || shape.bytes() <= bytes / slots, slots, " slots of ", shape.bytes(),
                    " bytes do not fit into a slab of ", bytes);
}

// `move` is compact_slots with what copies on the slab's device.
template <typename Move>
void compact(const Tensor& slab, at::IntArrayRef slots, at::IntArrayRef sizes, at::IntArrayRef filled_,
             const Move& move) {
  const SlotShape shape = slot_shape(sizes, slab, "sizes");
  const Filled filled = filled_part(filled_, shape);
  for (size_t i = 0; i < slots.size(); ++i)
    TORCH_CHECK_VALUE(slots[i] >= static_cast<int64_t>(i) && (i == 0 || slots[i] > slots[i - 1]),
                      "the slots to keep must ascend, got ", slots);
  check_slab(slab, slots.empty() ? 0 : slots.back() + 1, shape);
  move(static_cast<char*>(slab.mutable_data_ptr()), slots.data(), static_cast<int64_t>(slots.size()), shape, filled);
}

template <typename Copy>
void regrid(const Tensor& slab, const Tensor& scratch, int64_t count, at::IntArrayRef before_, at::IntArrayRef after_,
            at::IntArrayRef filled_, const Copy& copy) {
  const SlotShape before = slot_shape(before_, slab, "before"), after = slot_shape(after_, slab, "after");
  TORCH_CHECK_VALUE(before.heads == after.heads && before.key_bytes == after.key_bytes &&
                        before.value_bytes == after.value_bytes,
                    "a slot keeps its heads and widths, got ", before_, " and ", after_);
  TORCH_CHECK_VALUE(count >= 0, "the number of slots must not be negative, got ", count);
  const Filled filled = filled_part(filled_, before);
  filled_part(filled_, after);
  check_slab(slab, count, before);
  check_slab(slab, count, after);
  TORCH_CHECK_VALUE(scratch.device() == slab.device() && scratch.is_contiguous(),
                    "the scratch must be contiguous on the slab's device, got ", scratch.device());
  SlotShape tight = before;
  tight.batch = filled.batch;
  tight.length = filled.length;
  TORCH_CHECK_VALUE(static_cast<int64_t>(scratch.nbytes()) >= tight.bytes(), "the scratch must hold ", tight.bytes(),
                    " bytes, got ", scratch.nbytes());
  regrid_slots(static_cast<char*>(slab.mutable_data_ptr()), static_cast<char*>(scratch.mutable_data_ptr()), count,
               before, after, filled, copy);
}

}  // namespace trsp
