// Moves inside the slab of a KV cache, by bytes and without torch: the CPU and the GPU differ in how rows are copied.
//
// A slab is a row of slots, one per layer; a slot is [K, V], each of them batch x heads rows of `length` tokens. Rows are
// filled from their front.
#pragma once

#include <cstdint>
#include <initializer_list>

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

// `rows` pieces of `bytes` each, at their strides; source and target do not overlap.
struct Rows {
  const char* from;
  char* to;
  int64_t rows, bytes, from_stride, to_stride;
};

// Copies the filled rows of a slot to where `to` has them, by copy_rows(Rows). The two must not overlap.
template <typename CopyRows>
void copy_slot(const char* from, const SlotShape& from_shape, char* to, const SlotShape& to_shape, const Filled& filled,
               const CopyRows& copy_rows) {
  for (const bool values : {false, true}) {
    const int64_t token = values ? from_shape.value_bytes : from_shape.key_bytes;
    Rows all{from + (values ? from_shape.keys() : 0), to + (values ? to_shape.keys() : 0),
             filled.batch * from_shape.heads,         filled.length * token,
             from_shape.length * token,               to_shape.length * token};
    if (all.bytes == all.from_stride && all.bytes == all.to_stride) {  // rows without gaps are one piece
      all.bytes *= all.rows;
      all.rows = all.rows ? 1 : 0;
    }
    if (all.rows && all.bytes) copy_rows(all);
  }
}

// Moves slots down to make them neighbours: slots[i], ascending, to slot i. A slot never overlaps another, so nothing is
// needed beside the slab.
template <typename CopyRows>
void compact_slots(char* slab, const int64_t* slots, int64_t count, const SlotShape& shape, const Filled& filled,
                   const CopyRows& copy_rows) {
  for (int64_t i = 0; i < count; ++i)
    if (slots[i] != i)
      copy_slot(slab + slots[i] * shape.bytes(), shape, slab + i * shape.bytes(), shape, filled, copy_rows);
}

// Gives `count` neighbouring slots another shape, in place. Growing slots are moved last first and shrinking ones first
// first, so that no slot is overwritten before it is read; `scratch` holds the filled part of one.
template <typename CopyRows>
void regrid_slots(char* slab, char* scratch, int64_t count, const SlotShape& before, const SlotShape& after,
                  const Filled& filled, const CopyRows& copy_rows) {
  SlotShape tight = before;
  tight.batch = filled.batch;
  tight.length = filled.length;
  const bool grows = after.bytes() >= before.bytes();
  for (int64_t n = 0; n < count; ++n) {
    const int64_t i = grows ? count - 1 - n : n;
    copy_slot(slab + i * before.bytes(), before, scratch, tight, filled, copy_rows);
    copy_slot(scratch, tight, slab + i * after.bytes(), after, filled, copy_rows);
  }
}

}  // namespace trsp
