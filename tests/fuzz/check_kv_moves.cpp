// Random slabs through compact_slots and regrid_slots, against a model that keeps every byte by name: check_kv_moves RUNS.
//
// A program of its own, without torch, so that the sanitizers see every access beside a slot.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <map>
#include <random>
#include <tuple>
#include <vector>

#include "../../csrc/kv_moves.h"

namespace {

using namespace trsp;
using Random = std::mt19937_64;
// (layer, values, row of batch x heads, byte in the row) -> content
using Contents = std::map<std::tuple<int64_t, bool, int64_t, int64_t>, char>;

void copy_rows(const Rows& all) {
  if (all.bytes == 0) return;
  for (int64_t row = 0; row < all.rows; ++row) {
    const char* from = all.from + row * all.from_stride;
    char* to = all.to + row * all.to_stride;
    if (from < to + all.bytes && to < from + all.bytes) {
      std::cerr << "check_kv_moves: rows that overlap\n";
      std::abort();
    }
    std::memcpy(to, from, all.bytes);
  }
}

void copy(const SlotRows& both) {
  for (const Rows& rows : both) copy_rows(rows);
}

// Calls visit(key, byte of the slab) for everything that is filled in slot `slot` of layer `layer`.
template <typename Visit>
void for_each_byte(char* slab, int64_t slot, int64_t layer, const SlotShape& shape, const Filled& filled,
                   const Visit& visit) {
  for (const bool values : {false, true}) {
    const int64_t token = values ? shape.value_bytes : shape.key_bytes;
    char* begin = slab + slot * shape.bytes() + (values ? shape.keys() : 0);
    for (int64_t row = 0; row < filled.batch * shape.heads; ++row)
      for (int64_t i = 0; i < filled.length * token; ++i)
        visit(std::make_tuple(layer, values, row, i), begin[row * shape.length * token + i]);
  }
}

void expect(char* slab, const std::vector<int64_t>& slots, const std::vector<int64_t>& layers, const SlotShape& shape,
            const Filled& filled, Contents contents, const char* after) {
  for (size_t i = 0; i < layers.size(); ++i)
    for_each_byte(slab, slots[i], layers[i], shape, filled, [&](const auto& key, char& byte) {
      if (contents.at(key) != byte) {
        std::cerr << "check_kv_moves: a byte was lost by " << after << "\n";
        std::abort();
      }
      contents.erase(key);
    });
}

int64_t between(Random& random, int64_t low, int64_t high) {
  return low + static_cast<int64_t>(random() % static_cast<uint64_t>(high - low + 1));
}

void run(Random& random) {
  SlotShape shape{between(random, 1, 3), between(random, 1, 3), between(random, 1, 9), between(random, 1, 9),
                  between(random, 1, 9)};
  const Filled filled{between(random, 0, shape.batch), between(random, 0, shape.length)};
  const int64_t count = between(random, 1, 6);
  // On the heap and exactly as large as needed: a byte too far is seen.
  std::vector<char> slab(count * shape.bytes());
  Contents contents;
  std::vector<int64_t> slots, layers, front;
  for (int64_t i = 0; i < count; ++i) {
    for_each_byte(slab.data(), i, i, shape, filled, [&](const auto& key, char& byte) {
      contents[key] = byte = static_cast<char>(random());
    });
    if (random() % 2) slots.push_back(i), layers.push_back(i), front.push_back(front.size());
  }
  compact_slots(slab.data(), slots.data(), static_cast<int64_t>(slots.size()), shape, filled, copy);
  expect(slab.data(), front, layers, shape, filled, contents, "compact_slots");
  if (slots.empty()) return;
  for (int again = 0; again < 2; ++again) {
    SlotShape next = shape;
    next.batch = between(random, std::max<int64_t>(filled.batch, 1), 5);
    next.length = between(random, std::max<int64_t>(filled.length, 1), 20);
    if (next.bytes() * static_cast<int64_t>(slots.size()) > static_cast<int64_t>(slab.size())) continue;
    SlotShape tight = shape;
    tight.batch = filled.batch, tight.length = filled.length;
    std::vector<char> scratch(tight.bytes());
    regrid_slots(slab.data(), scratch.data(), static_cast<int64_t>(slots.size()), shape, next, filled, copy);
    shape = next;
    expect(slab.data(), front, layers, shape, filled, contents, "regrid_slots");
  }
}

}  // namespace

int main(int count, char** arguments) {
  const long runs = count > 1 ? std::strtol(arguments[1], nullptr, 10) : 0;
  if (runs < 1) {
    std::cerr << "usage: check_kv_moves RUNS [SEED]\n";
    return 2;
  }
  Random random(count > 2 ? std::strtoull(arguments[2], nullptr, 10) : 0);
  for (long i = 0; i < runs; ++i) run(random);
  std::cout << "check_kv_moves: " << runs << " slabs\n";
}
