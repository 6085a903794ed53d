// Moves ranges between open files the cheapest way their file systems offer. Linux only; elsewhere by read and write.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

namespace trsp_fast {

struct Move {
  int from = -1, to = -1;  // open file descriptors
  std::uint64_t from_offset = 0, to_offset = 0, bytes = 0;
  bool share = false;  // try to share extents: offsets and length are whole blocks
};

// Counted while the moves run, so that another thread can show them.
struct MoveProgress {
  std::atomic<std::uint64_t> shared{0};  // bytes whose extents both files now own
  std::atomic<std::uint64_t> copied{0};  // bytes that were written
  std::atomic<bool> cancelled{false};    // set to stop after the pieces under way
};

// Runs all moves on `threads` threads. Ranges of a target must not overlap; its size grows as needed. `in_kernel` copies
// by copy_file_range, which a file server carries out itself; on a local disk it is slower than reading and writing
// where the offsets differ modulo the page cache's folios (NOTES.md).
// Throws std::system_error for what the operating system refuses, std::runtime_error for a source that ends early.
void move_ranges(const std::vector<Move>& moves, unsigned threads, bool in_kernel, MoveProgress& progress);

// Whether the file systems of the two files share extents: tried with one block, which `to` then holds.
bool can_share(int from, int to, std::uint64_t block);

}  // namespace trsp_fast
