// Sixteen hidden states in fp32: how they are read, written and summed.
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

constexpr int kLanes = 16;       // one AVX-512 register, two of AVX2, four of SSE
constexpr int64_t kBlock = 512;  // elements whose sums stay in fp32, see Sum

using Lanes = float __attribute__((vector_size(kLanes * sizeof(float))));
using LaneBits = uint32_t __attribute__((vector_size(kLanes * sizeof(uint32_t))));
using LaneHalves = uint16_t __attribute__((vector_size(kLanes * sizeof(uint16_t))));
using LaneDoubles = double __attribute__((vector_size(kLanes * sizeof(double))));

// ---- fp32 <-> half precision, by integers: hardware conversion is not in every instruction set above

TRSP_INLINE Lanes widen(LaneHalves from, c10::BFloat16*) {
  return std::bit_cast<Lanes>(__builtin_convertvector(from, LaneBits) << 16);
}

TRSP_INLINE Lanes widen(LaneHalves from, c10::Half*) {
  const LaneBits bits = __builtin_convertvector(from, LaneBits);
  const LaneBits sign = (bits & 0x8000u) << 16;
  const LaneBits magnitude = (bits & 0x7fffu) << 13;
  const LaneBits exponent = magnitude & 0x0f800000u;
  const LaneBits bias = LaneBits{} + (112u << 23);
  const LaneBits normal = magnitude + bias + (exponent == 0x0f800000u ? bias : LaneBits{});
  // A subnormal half is the difference of two normal floats, so flush-to-zero mode cannot lose it.
  const LaneBits least = bias + (1u << 23);
  const LaneBits tiny = std::bit_cast<LaneBits>(std::bit_cast<Lanes>(magnitude + least) - std::bit_cast<Lanes>(least));
  return std::bit_cast<Lanes>((exponent == 0 ? tiny : normal) | sign);
}

TRSP_INLINE LaneHalves narrow(Lanes from, c10::BFloat16*) {
  const LaneBits bits = std::bit_cast<LaneBits>(from);
  const LaneBits rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  const LaneBits nan = bits >> 16 | 0x40u;  // rounding could carry a NaN's payload into Inf
  return __builtin_convertvector((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded, LaneHalves);
}

TRSP_INLINE LaneHalves narrow(Lanes from, c10::Half*) {
  const LaneBits bits = std::bit_cast<LaneBits>(from);
  const LaneBits sign = bits >> 16 & 0x8000u;
  const LaneBits magnitude = bits & 0x7fffffffu;
  const LaneBits normal = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  // Adding 0.5 leaves a float whose last place is a half's subnormal step, rounded to nearest even by the adder.
  const LaneBits tiny = std::bit_cast<LaneBits>(std::bit_cast<Lanes>(magnitude) + 0.5f) - std::bit_cast<uint32_t>(0.5f);
  const LaneBits infinite = LaneBits{} + 0x7c00u;
  const LaneBits huge = infinite + (magnitude > 0x7f800000u ? LaneBits{} + 0x200u : LaneBits{});
  const LaneBits finite = magnitude < 0x38800000u ? tiny : normal;
  return __builtin_convertvector((magnitude >= 0x47800000u ? huge : finite) | sign, LaneHalves);
}

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
  Lanes lanes = {};  // lanes that do not exist are 0 and add 0
  std::memcpy(&lanes, from, size.count * sizeof(float));
  return lanes;
}

template <typename T, typename Size>
TRSP_INLINE Lanes load(const T* from, Size size) {
  LaneHalves halves = {};
  std::memcpy(&halves, from, size.count * sizeof(T));
  return widen(halves, static_cast<T*>(nullptr));
}

// Streaming stores leave the cache alone and spare the read of the line that is overwritten.
template <typename Vector>
TRSP_INLINE void put(const Vector& lanes, void* to, bool stream) {
#if defined(__SSE2__)
  if (stream && reinterpret_cast<uintptr_t>(to) % 16 == 0) {
    __m128i pieces[sizeof lanes / 16];
    std::memcpy(pieces, &lanes, sizeof lanes);
    for (size_t i = 0; i < sizeof lanes / 16; ++i) _mm_stream_si128(static_cast<__m128i*>(to) + i, pieces[i]);
    return;
  }
#endif
  std::memcpy(to, &lanes, sizeof lanes);
}

TRSP_INLINE void store(Lanes lanes, float* to, Whole, bool stream) { put(lanes, to, stream); }
TRSP_INLINE void store(Lanes lanes, float* to, Part size, bool) { std::memcpy(to, &lanes, size.count * sizeof(float)); }

template <typename T>
TRSP_INLINE void store(Lanes lanes, T* to, Whole, bool stream) {
  put(narrow(lanes, static_cast<T*>(nullptr)), to, stream);
}
template <typename T>
TRSP_INLINE void store(Lanes lanes, T* to, Part size, bool) {
  const LaneHalves halves = narrow(lanes, static_cast<T*>(nullptr));
  std::memcpy(to, &halves, size.count * sizeof(T));
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
  LaneDoubles total = {};
  Lanes block = {};

  TRSP_INLINE void end_block() {
    total += __builtin_convertvector(block, LaneDoubles);
    block = Lanes{};
  }
  double value() const {
    double sum = 0.0;
    for (int i = 0; i < kLanes; ++i) sum += total[i];
    return sum;
  }
};

TRSP_INLINE Lanes absolute(Lanes lanes) { return std::bit_cast<Lanes>(std::bit_cast<LaneBits>(lanes) & 0x7fffffffu); }

// What a sequence's norms pass back to each of its elements: c1*sign(d) + 2*c2*d. A missing term is left out, not
// multiplied by 0: d may be infinite.
struct Penalty {
  float c1 = 0.0f;             // 0 where it is missing
  const float* c2 = nullptr;  // null where it is missing

  TRSP_INLINE Lanes operator()(Lanes d) const {
    const Lanes zero = {}, step = zero + c1;
    const Lanes sign = (d > 0.0f ? step : zero) - (d < 0.0f ? step : zero);
    return c2 ? sign + 2.0f * *c2 * d : sign;
  }
};

}  // namespace trsp
