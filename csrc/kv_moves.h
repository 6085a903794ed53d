// Moves inside the slab of a KV cache, by bytes and without torch: the CPU and the GPU differ in how rows are copied.
//
// A slab is a row of slots, one per layer; a slot is [K, V], each of them batch x heads rows of `length` tokens. Rows are
// filled from their front.
#pragma once

#include <array>
#include <cstdint>

namespace trsp {

// Sizes of one slot, in rows and bytes.
struct SlotShape {
  int64_t batch, heads, length;    // rows = batch * heads, tokens per row
  int64_t key_bytes, value_bytes;  // of one token in one row

  int64_t rows() const { return batch * heads; }
  int64_t keys() const { return rows() * length * key_bytes; }  // where V begins
  int64_t bytes() const { return keys() + rows() * length * value_bytes; }
};

// How much of each slot holds something: the first `batch` sequences, the first `length` tokens of each row.
struct Filled {
  int64_t batch, length;
};

// `rows` pieces of `bytes` each, at their strides; source and target do not overlap. Nothing where one of them is 0.
struct Rows {
  const char* from;
  char* to;
  int64_t rows, bytes, from_stride, to_stride;
};

using SlotRows = std::array<Rows, 2>;  // K and V

// The filled rows of a slot, from where `from` has them to where `to` does.
inline SlotRows slot_rows(const char* from, const SlotShape& from_shape, char* to, const SlotShape& to_shape,
                          const Filled& filled) {
  SlotRows both;
  for (const bool values : {false, true}) {
    const int64_t token = values ? from_shape.value_bytes : from_shape.key_bytes;
    Rows all{from + (values ? from_shape.keys() : 0), to + (values ? to_shape.keys() : 0),
             filled.batch * from_shape.heads,         filled.length * token,
             from_shape.length * token,               to_shape.length * token};
    if (all.bytes == all.from_stride && all.bytes == all.to_stride) {  // rows without gaps are one piece
      all.bytes *= all.rows;
      all.rows = all.rows ? 1 : 0;
    }
    both[values] = all;
  }
  return both;
}

// Moves slots down to make them neighbours: slots[i], ascending, to slot i. A slot never overlaps another, so nothing is
// needed beside the slab. Each slot by copy(SlotRows), in this order.
template <typename Copy>
void compact_slots(char* slab, const int64_t* slots, int64_t count, const SlotShape& shape, const Filled& filled,
                   const Copy& copy) {
  for (int64_t i = 0; i < count; ++i)
    if (slots[i] != i)
      copy(slot_rows(slab + slots[i] * shape.bytes(), shape, slab + i * shape.bytes(), shape, filled));
}

// Gives `count` neighbouring slots another shape, in place. Growing slots are moved last first and shrinking ones first
// first, so that no slot is overwritten before it is read. One that would overlap itself goes through `scratch`, which
// holds the filled part of one.
template <typename Copy>
void regrid_slots(char* slab, char* scratch, int64_t count, const SlotShape& before, const SlotShape& after,
                  const Filled& filled, const Copy& copy) {
  SlotShape tight = before;
  tight.batch = filled.batch;
  tight.length = filled.length;
  const bool grows = after.bytes() >= before.bytes();
  for (int64_t n = 0; n < count; ++n) {
    const int64_t i = grows ? count - 1 - n : n;
    const int64_t from = i * before.bytes(), to = i * after.bytes();
    if (to >= from + before.bytes() || from >= to + after.bytes()) {
      copy(slot_rows(slab + from, before, slab + to, after, filled));
      continue;
    }
    copy(slot_rows(slab + from, before, scratch, tight, filled));
    copy(slot_rows(scratch, tight, slab + to, after, filled));
  }
}

}  // namespace trsp
