// Thirty-two hidden states in fp32: how they are read, written and summed.
//
// Each loop made of these is compiled for three instruction sets and chosen when the program starts. A sum always has
// the same lanes and -ffp-contract=off forbids fused multiply-adds, so all three give the same bits.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#if defined(TRSP_LOOP)
// Given by a test that compiles for one instruction set at a time.
#elif defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__)
#define TRSP_LOOP __attribute__((noinline, target_clones("avx512f", "avx2", "default")))
#else
#define TRSP_LOOP
#endif
// Inlined into every clone of a TRSP_LOOP: only so is it compiled for that clone's instruction set.
#define TRSP_INLINE inline __attribute__((always_inline))

namespace trsp {

using Vector = float __attribute__((vector_size(64)));  // one AVX-512 register, two of AVX2, four of SSE
using Bits = uint32_t __attribute__((vector_size(64)));
using Signed = int32_t __attribute__((vector_size(64)));
using Doubles = double __attribute__((vector_size(128)));

constexpr int kLanes = 32;
constexpr int64_t kBlock = 1024;  // elements whose sums stay in fp32, see Sum

// Two vectors. Of fp32 they are the first and the second half of 32 neighbours; of half precision the even and the odd
// ones, as they share the 32-bit words of memory: widening and narrowing then need shifts and no shuffles.
struct Lanes {
  Vector a = {}, b = {};
};

TRSP_INLINE Lanes operator+(Lanes p, Lanes q) { return {p.a + q.a, p.b + q.b}; }
TRSP_INLINE Lanes operator-(Lanes p, Lanes q) { return {p.a - q.a, p.b - q.b}; }
TRSP_INLINE Lanes operator*(Lanes p, Lanes q) { return {p.a * q.a, p.b * q.b}; }
TRSP_INLINE Lanes operator*(float factor, Lanes p) { return {factor * p.a, factor * p.b}; }
TRSP_INLINE Lanes operator-(Lanes p) { return {-p.a, -p.b}; }

TRSP_INLINE Bits bits(Vector v) { return std::bit_cast<Bits>(v); }
TRSP_INLINE Vector floats(Bits v) { return std::bit_cast<Vector>(v); }
TRSP_INLINE Vector absolute(Vector v) { return floats(bits(v) & 0x7fffffffu); }
TRSP_INLINE Lanes absolute(Lanes p) { return {absolute(p.a), absolute(p.b)}; }

// ---- fp32 <-> half precision, by integers: hardware conversion is not in every instruction set above.
// A word holds two of them. Subnormals need a processor that keeps them, see KeepsSubnormals.

static_assert(std::endian::native == std::endian::little);

TRSP_INLINE Lanes widen(Bits words, c10::BFloat16*) { return {floats(words << 16), floats(words & 0xffff0000u)}; }

// A half in the upper 16 bits. Moved three places down its exponent is 112 too small, which a product mends exactly.
TRSP_INLINE Vector widen_upper(Bits upper) {
  const Bits moved = std::bit_cast<Bits>(std::bit_cast<Signed>(upper) >> 3) & 0x8fffe000u;
  const Bits scaled = bits(floats(moved) * 0x1p112f);
  return floats((moved & 0x0f800000u) == 0x0f800000u ? scaled | 0x7f800000u : scaled);  // Inf and NaN
}

TRSP_INLINE Lanes widen(Bits words, c10::Half*) {
  return {widen_upper(words << 16), widen_upper(words & 0xffff0000u)};
}

// Rounded to nearest even, in the upper 16 bits; the lower ones are anything.
TRSP_INLINE Bits round_upper(Vector from, c10::BFloat16*) {
  const Bits value = bits(from);
  const Bits rounded = value + 0x7fffu + (value >> 16 & 1u);
  return (value & 0x7fffffffu) > 0x7f800000u ? value | 0x400000u : rounded;  // rounding could turn a NaN into Inf
}

TRSP_INLINE Bits round_upper(Vector from, c10::Half*) {
  const Bits value = bits(from), magnitude = value & 0x7fffffffu;
  const Bits overflow = Bits{} + 0x47800000u, capped = magnitude < overflow ? magnitude : overflow;
  // A power of two whose last place is that of the half: adding it rounds, to nearest even, subnormals like the rest.
  const Bits exponent = capped & 0x7f800000u, least = Bits{} + 0x38800000u;
  const Vector step = floats((exponent > least ? exponent : least) + (13u << 23));
  const Vector rounded = floats(capped) + step - step;
  const Bits upper = bits(rounded * 0x1p-112f) << 3;
  return (magnitude > 0x7f800000u ? upper | 0x2000000u : upper) | (value & 0x80000000u);
}

template <typename T>
TRSP_INLINE Bits narrow(Lanes from) {
  const Bits even = round_upper(from.a, static_cast<T*>(nullptr)), odd = round_upper(from.b, static_cast<T*>(nullptr));
  return even >> 16 | (odd & 0xffff0000u);
}

// While it lives, this thread computes with subnormal numbers whatever torch.set_flush_denormal said: that holds for
// the calling thread only, and a result must not depend on which thread made it.
class KeepsSubnormals {
#if defined(__SSE2__)
  static constexpr unsigned kFlush = 0x8040;  // flush results to zero, take denormals as zero
  const unsigned before_ = _mm_getcsr();

 public:
  KeepsSubnormals() { _mm_setcsr(before_ & ~kFlush); }
  ~KeepsSubnormals() { _mm_setcsr(before_); }
  KeepsSubnormals(const KeepsSubnormals&) = delete;
  KeepsSubnormals& operator=(const KeepsSubnormals&) = delete;
#endif
};

// ---- memory

// How many of the lanes exist: all in a loop's body, fewer at its end.
struct Whole {
  static constexpr int64_t count = kLanes;
};
struct Part {
  int64_t count;
};

template <typename Size>
TRSP_INLINE Lanes load(const float* from, Size size) {
  Lanes lanes;  // lanes that do not exist are 0 and add 0
  std::memcpy(&lanes, from, size.count * sizeof(float));
  return lanes;
}

template <typename T, typename Size>
TRSP_INLINE Lanes load(const T* from, Size size) {
  Bits words = {};
  std::memcpy(&words, from, size.count * sizeof(T));
  return widen(words, static_cast<T*>(nullptr));
}

// Streaming stores leave the cache alone and spare the read of the line that is overwritten.
template <typename Value>
TRSP_INLINE void put(const Value& value, void* to, bool stream) {
#if defined(__SSE2__)
  if (stream && reinterpret_cast<uintptr_t>(to) % 16 == 0) {
    __m128i pieces[sizeof value / 16];
    std::memcpy(pieces, &value, sizeof value);
    for (size_t i = 0; i < sizeof value / 16; ++i) _mm_stream_si128(static_cast<__m128i*>(to) + i, pieces[i]);
    return;
  }
#endif
  std::memcpy(to, &value, sizeof value);
}

TRSP_INLINE void store(Lanes lanes, float* to, Whole, bool stream) { put(lanes, to, stream); }
TRSP_INLINE void store(Lanes lanes, float* to, Part size, bool) { std::memcpy(to, &lanes, size.count * sizeof(float)); }

template <typename T>
TRSP_INLINE void store(Lanes lanes, T* to, Whole, bool stream) {
  put(narrow<T>(lanes), to, stream);
}
template <typename T>
TRSP_INLINE void store(Lanes lanes, T* to, Part size, bool) {
  const Bits words = narrow<T>(lanes);
  std::memcpy(to, &words, size.count * sizeof(T));
}

// Streaming stores of this thread become visible to the others.
inline void finish_streaming() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// ---- loops and sums

// body(first, size) for the elements [0, n), kLanes at a time; end_of_block() after every kBlock of them.
template <typename Body, typename EndOfBlock>
TRSP_INLINE void for_each_lanes(int64_t n, const Body& body, const EndOfBlock& end_of_block) {
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, n);
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) body(i, Whole{});
    if (i < end) body(i, Part{end - i});
    end_of_block();
  }
}

// A sum in fixed lanes: at most 32 values in fp32, then fp64. Squares of bf16 differences end in few bit patterns, so
// longer fp32 sums round to one side: 5e-7 of l2 was lost with 256 values per lane.
struct Sum {
  Doubles a = {}, b = {};
  Lanes block;

  TRSP_INLINE void add(Lanes lanes) { block = block + lanes; }
  TRSP_INLINE void end_block() {
    a += __builtin_convertvector(block.a, Doubles);
    b += __builtin_convertvector(block.b, Doubles);
    block = Lanes{};
  }
  double value() const {
    double sum = 0.0;
    for (int i = 0; i < kLanes / 2; ++i) sum += a[i] + b[i];
    return sum;
  }
};

// What a sequence's norms pass back to each of its elements: c1*sign(d) + 2*c2*d. A missing term is left out, not
// multiplied by 0: d may be infinite.
struct Penalty {
  float c1 = 0.0f;            // 0 where it is missing
  const float* c2 = nullptr;  // null where it is missing

  TRSP_INLINE Vector sign(Vector d) const {
    const Vector zero = {}, step = zero + c1;
    return (d > 0.0f ? step : zero) - (d < 0.0f ? step : zero);
  }
  TRSP_INLINE Lanes operator()(Lanes d) const {
    const Lanes signs = {sign(d.a), sign(d.b)};
    return c2 ? signs + 2.0f * *c2 * d : signs;
  }
};

}  // namespace trsp
