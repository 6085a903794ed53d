#include "move_ranges.h"

#include <algorithm>
#include <cerrno>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>

#include <unistd.h>

#if defined(__linux__)
#include <linux/fs.h>
#include <sys/ioctl.h>
#endif

namespace trsp_fast {
namespace {

constexpr std::uint64_t kPiece = 64 << 20;  // of a move: what one thread does before it looks for cancellation
constexpr std::size_t kBuffer = 1 << 20;    // per thread; writes end at multiples of it

[[noreturn]] void fail(const char* doing) { throw std::system_error(errno, std::generic_category(), doing); }

[[noreturn]] void ended_early(std::uint64_t offset) {
  throw std::runtime_error("a source file ended early, at byte " + std::to_string(offset));
}

bool share(const Move& move) {
#if defined(FICLONERANGE)
  file_clone_range range{};
  range.src_fd = move.from;
  range.src_offset = move.from_offset;
  range.src_length = move.bytes;
  range.dest_offset = move.to_offset;
  return ioctl(move.to, FICLONERANGE, &range) == 0;
#else
  (void)move;
  return false;
#endif
}

// Whether the kernel refuses this way of copying between these two files, rather than failing at it.
bool is_refusal(int error) {
  return error == EXDEV || error == EINVAL || error == ENOSYS || error == EOPNOTSUPP || error == EPERM ||
         error == ENOTTY || error == EBADF;
}

// Copies inside the kernel as far as it goes; false where the file systems cannot.
bool copy_in_kernel(Move& rest, MoveProgress& progress) {
#if defined(__linux__)
  while (rest.bytes) {
    off_t from = static_cast<off_t>(rest.from_offset), to = static_cast<off_t>(rest.to_offset);
    const ssize_t moved = copy_file_range(rest.from, &from, rest.to, &to, rest.bytes, 0);
    if (moved < 0 && errno == EINTR) continue;
    if (moved < 0 && is_refusal(errno)) return false;
    if (moved < 0) fail("copying");
    if (moved == 0) return false;  // some file systems say so instead of refusing; reading tells a real end
    rest.from_offset += moved;
    rest.to_offset += moved;
    rest.bytes -= moved;
    progress.copied += moved;
  }
  return true;
#else
  (void)rest, (void)progress;
  return false;
#endif
}

void copy_by_hand(Move& rest, std::vector<char>& buffer, MoveProgress& progress) {
  buffer.resize(kBuffer);
  while (rest.bytes) {
    // Aligned in the target, so that its page cache is made of large folios.
    const std::size_t wanted = std::min<std::uint64_t>(rest.bytes, kBuffer - rest.to_offset % kBuffer);
    const ssize_t got = pread(rest.from, buffer.data(), wanted, static_cast<off_t>(rest.from_offset));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) fail("reading");
    if (got == 0) ended_early(rest.from_offset);
    for (ssize_t written = 0; written < got;) {
      const ssize_t put = pwrite(rest.to, buffer.data() + written, got - written,
                                 static_cast<off_t>(rest.to_offset + written));
      if (put < 0 && errno == EINTR) continue;
      if (put < 0) fail("writing");
      written += put;
    }
    rest.from_offset += got;
    rest.to_offset += got;
    rest.bytes -= got;
    progress.copied += got;
  }
}

// Pieces of all moves, handed out in order.
class Queue {
 public:
  explicit Queue(const std::vector<Move>& moves) : moves_(moves) {}

  bool next(Move& piece) {
    const std::lock_guard lock(mutex_);
    while (move_ < moves_.size() && done_ == moves_[move_].bytes) {
      ++move_;
      done_ = 0;
    }
    if (move_ == moves_.size()) return false;
    piece = moves_[move_];
    piece.from_offset += done_;
    piece.to_offset += done_;
    piece.bytes = std::min(piece.bytes - done_, kPiece);
    done_ += piece.bytes;
    return true;
  }

 private:
  const std::vector<Move>& moves_;
  std::mutex mutex_;
  std::size_t move_ = 0;
  std::uint64_t done_ = 0;
};

void work(Queue& queue, bool in_kernel, MoveProgress& progress) {
  std::vector<char> buffer;
  Move piece;
  while (!progress.cancelled && queue.next(piece)) {
    if (piece.share && share(piece)) {
      progress.shared += piece.bytes;
      continue;
    }
    if (!in_kernel || !copy_in_kernel(piece, progress)) copy_by_hand(piece, buffer, progress);
  }
}

}  // namespace

void move_ranges(const std::vector<Move>& moves, unsigned threads, bool in_kernel, MoveProgress& progress) {
  Queue queue(moves);
  std::exception_ptr error;
  std::mutex error_mutex;
  const auto guarded = [&] {
    try {
      work(queue, in_kernel, progress);
    } catch (...) {
      const std::lock_guard lock(error_mutex);
      if (!error) error = std::current_exception();
      progress.cancelled = true;
    }
  };
  std::vector<std::thread> pool;
  try {
    for (unsigned i = 1; i < threads; ++i) pool.emplace_back(guarded);
  } catch (const std::system_error&) {
    // No more threads to be had: those that run, this one at least, do the work.
  }
  guarded();
  for (std::thread& thread : pool) thread.join();
  if (error) std::rethrow_exception(error);
}

bool can_share(int from, int to, std::uint64_t block) { return share({from, to, 0, 0, block, true}); }

}  // namespace trsp_fast
