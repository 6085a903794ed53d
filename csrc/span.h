// Short runs of hidden states in fp32: the loops that every CPU op is made of.
//
// Each loop is compiled for three instruction sets and chosen when the program starts. Sums go into a fixed number of
// lanes and -ffp-contract=off forbids fused multiply-adds, so all three give the same bits.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__)
#define TRSP_LOOP [[maybe_unused]] __attribute__((noinline, target_clones("avx512f", "avx2", "default"))) static
#else
#define TRSP_LOOP [[maybe_unused]] static
#endif

namespace trsp {

constexpr int64_t kTile = 4096;   // elements of one sequence behind one partial sum
constexpr int64_t kBlock = 512;   // elements widened at a time: 2 KiB per buffer, all buffers stay in L1
constexpr int64_t kGrain = 8;     // tiles per task, 32 Ki elements as in ATen
constexpr int kLanes = 16;        // one AVX-512 register, two of AVX2

// ---- fp32 <-> half precision, by integers: hardware conversion is not in every instruction set above

inline float widen_bits(uint16_t bits, c10::BFloat16*) { return std::bit_cast<float>(uint32_t{bits} << 16); }

inline float widen_bits(uint16_t bits, c10::Half*) {
  const uint32_t sign = uint32_t{bits} << 16 & 0x80000000u;
  const uint32_t magnitude = uint32_t{bits & 0x7fffu} << 13;
  const uint32_t exponent = magnitude & 0x0f800000u;
  const uint32_t normal = magnitude + (112u << 23) + (exponent == 0x0f800000u ? 112u << 23 : 0u);
  // A subnormal half is the difference of two normal floats, so flush-to-zero mode cannot lose it.
  const float tiny = std::bit_cast<float>(magnitude + (113u << 23)) - std::bit_cast<float>(113u << 23);
  return std::bit_cast<float>((exponent == 0 ? std::bit_cast<uint32_t>(tiny) : normal) | sign);
}

inline uint16_t narrow_bits(float value, c10::BFloat16*) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  const uint32_t nan = bits >> 16 | 0x40u;  // rounding could carry a NaN's payload into Inf
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
}

inline uint16_t narrow_bits(float value, c10::Half*) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  // Adding 0.5 leaves a float whose last place is a half's subnormal step, rounded to nearest even by the adder.
  const float shifted = std::bit_cast<float>(magnitude) + 0.5f;
  const uint32_t tiny = std::bit_cast<uint32_t>(shifted) - std::bit_cast<uint32_t>(0.5f);
  const uint32_t huge = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t finite = magnitude < 0x38800000u ? tiny : normal;
  return static_cast<uint16_t>((magnitude >= 0x47800000u ? huge : finite) | sign);
}

#define TRSP_CONVERSIONS(T)                                              \
  TRSP_LOOP void widen_loop(const T* from, int64_t n, float* to) {       \
    const auto* bits = reinterpret_cast<const uint16_t*>(from);          \
    for (int64_t i = 0; i < n; ++i) to[i] = widen_bits(bits[i], (T*)nullptr); \
  }                                                                      \
  TRSP_LOOP void narrow_loop(const float* from, int64_t n, T* to) {      \
    auto* bits = reinterpret_cast<uint16_t*>(to);                        \
    for (int64_t i = 0; i < n; ++i) bits[i] = narrow_bits(from[i], (T*)nullptr); \
  }
TRSP_CONVERSIONS(c10::BFloat16)
TRSP_CONVERSIONS(c10::Half)
#undef TRSP_CONVERSIONS

// The fp32 view of a block: the tensor itself when it is fp32, else a widened copy in `buffer`.
inline const float* widen(const float* from, int64_t, float*) { return from; }
template <typename T>
const float* widen(const T* from, int64_t n, float* buffer) {
  widen_loop(from, n, buffer);
  return buffer;
}

// Where to compute a block of an output, and how to finish it; nothing is left to do for fp32.
inline float* landing(float* to, float*) { return to; }
template <typename T>
float* landing(T*, float* buffer) { return buffer; }
inline void narrow(const float*, int64_t, float*) {}
template <typename T>
void narrow(const float* from, int64_t n, T* to) { narrow_loop(from, n, to); }

// ---- the maths, d = out - x

// All lanes at once, whatever the register width: GCC does not find this form in a loop over float[kLanes].
using Lanes = float __attribute__((vector_size(kLanes * sizeof(float))));
using LaneBits = uint32_t __attribute__((vector_size(kLanes * sizeof(float))));

// A block adds at most 32 values to each fp32 lane before the lanes go to fp64. Squares of bf16 differences end in few
// bit patterns, so longer fp32 sums round to one side: 5e-7 of l2 was lost with 256 values per lane.
TRSP_LOOP void add_norms(const float* x, const float* out, int64_t n, double* l1, double* l2) {
  Lanes a = {}, b = {};
  for (int64_t i = 0; i < n; i += kLanes) {
    Lanes p = {}, q = {};  // lanes past the end stay 0 and add 0
    if (i + kLanes <= n) {
      std::memcpy(&p, x + i, sizeof p);
      std::memcpy(&q, out + i, sizeof q);
    } else {
      std::memcpy(&p, x + i, (n - i) * sizeof(float));
      std::memcpy(&q, out + i, (n - i) * sizeof(float));
    }
    const Lanes d = q - p;
    a += reinterpret_cast<Lanes>(reinterpret_cast<LaneBits>(d) & 0x7fffffffu);  // |d|
    b += d * d;
  }
  for (int j = 0; j < kLanes; ++j) {
    l1[j] += a[j];
    l2[j] += b[j];
  }
}

TRSP_LOOP void add_dot(const float* p, const float* q, int64_t n, double* sum) {
  Lanes total = {};
  for (int64_t i = 0; i < n; i += kLanes) {
    Lanes a = {}, b = {};
    if (i + kLanes <= n) {
      std::memcpy(&a, p + i, sizeof a);
      std::memcpy(&b, q + i, sizeof b);
    } else {
      std::memcpy(&a, p + i, (n - i) * sizeof(float));
      std::memcpy(&b, q + i, (n - i) * sizeof(float));
    }
    total += a * b;
  }
  for (int j = 0; j < kLanes; ++j) sum[j] += total[j];
}

TRSP_LOOP void scale(const float* p, int64_t n, float factor, float* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = factor * p[i];
}

TRSP_LOOP void mix(const float* p, float factor, const float* q, float other, int64_t n, float* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = factor * p[i] + other * q[i];
}

TRSP_LOOP void subtract(const float* p, const float* q, int64_t n, float* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = p[i] - q[i];
}

// c1*sign(d) + 2*c2*d. Without c2 the second term is left out, not multiplied by 0: d may be infinite.
TRSP_LOOP void penalty(const float* x, const float* out, int64_t n, float c1, const float* c2, float* to) {
  const float slope = c2 ? 2.0f * *c2 : 0.0f;
  if (c2)
    for (int64_t i = 0; i < n; ++i) {
      const float d = out[i] - x[i];
      to[i] = (d > 0.0f ? c1 : 0.0f) - (d < 0.0f ? c1 : 0.0f) + slope * d;
    }
  else
    for (int64_t i = 0; i < n; ++i) {
      const float d = out[i] - x[i];
      to[i] = (d > 0.0f ? c1 : 0.0f) - (d < 0.0f ? c1 : 0.0f);
    }
}

inline double fold(const double* lanes) {
  double total = 0.0;
  for (int j = 0; j < kLanes; ++j) total += lanes[j];
  return total;
}

// Calls work(first, count, kept) for the elements [begin, end) of a sequence, in blocks that the mask treats alike.
// Neighbouring tokens join, so a mask of ones gives the blocks, and the bits, of no mask.
template <typename Work>
void for_each_block(int64_t begin, int64_t end, int64_t hidden, const bool* keeps, const Work& work) {
  while (begin < end) {
    int64_t token = begin / hidden;
    const bool kept = !keeps || keeps[token];
    int64_t stop = end;
    if (keeps) {
      while ((token + 1) * hidden < end && keeps[token + 1] == kept) ++token;
      stop = std::min(end, (token + 1) * hidden);
    }
    for (; begin < stop; begin += kBlock) work(begin, std::min(kBlock, stop - begin), kept);
    begin = stop;
  }
}

}  // namespace trsp
