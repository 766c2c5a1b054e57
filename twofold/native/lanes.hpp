// Vectors of 16 floats, in the registers that the processor has: one of 512 bits, or a few smaller ones side by side.
//
// All kernels are written once, over these. Sums are in float32; bfloat16 is widened when it is read and rounded when it is
// written, halves to the even neighbour; what is not a number stays none.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>
#include <omp.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

// A loop of fixed length whose every turn has registers of its own.
#define EACH(i, n) _Pragma("GCC unroll 16") for (int i = 0; i < n; i++)

#define INLINE static inline __attribute__((always_inline))

INLINE int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
template <class V> using Own = std::unique_ptr<V, decltype(&std::free)>;
template <class V> static Own<V> owned(int64_t n) { return Own<V>((V*)std::aligned_alloc(64, up(std::max<int64_t>(1, n) * sizeof(V), 64)), std::free); }

struct bf16 {
  uint16_t bits;
};

INLINE float widen(float v) { return v; }
INLINE float widen(bf16 v) {
  uint32_t bits = uint32_t(v.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}
INLINE void narrow(float v, float* to) { *to = v; }
INLINE void narrow(float v, bf16* to) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  to->bits = v != v ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include "lanes_512.hpp"
#else
#include "lanes_parts.hpp"
#endif

// e^x, to two units in the last place (the polynomial of the Cephes library).
INLINE Floats exp16(Floats x) {
  x = min(all(110), max(all(-110), x));
  Floats n = whole(x * all(1.44269504f));
  x = fnma(n, all(0.693359375f), x);
  x = fma(n, all(2.12194440e-4f), x);
  Floats y = all(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) y = fma(y, x, all(c));
  y = fma(y * x, x, x) + all(1);
  return times_power(y, n);
}

INLINE Floats tanh16(Floats x) {
  const Floats e = exp16(magnitude(x) * all(-2));
  return with_sign((all(1) - e) / (all(1) + e), x);
}
INLINE Floats bent(Floats x, float scale, float cap) {
  x = x * all(scale);
  return cap ? all(cap) * tanh16(x / all(cap)) : x;
}

// f(x) = x sigma(z): silu with z = x, gelu by tanh with z = 2 sqrt(2 / pi) (x + 0.044715 x^3).
static const float GELU = 1.5957691216f, CUBE = 0.044715f;
INLINE Floats sigma(Floats z) { return all(1) / (all(1) + exp16(none() - z)); }
INLINE Floats inner(Floats x, bool gelu) { return gelu ? x * all(GELU) * fma(x * x, all(CUBE), all(1)) : x; }
INLINE Floats slope(Floats x, bool gelu) { return gelu ? all(GELU) * fma(x * x, all(3 * CUBE), all(1)) : all(1); }
INLINE Floats activated(Floats x, bool gelu) { return x * sigma(inner(x, gelu)); }

// Of 16 vectors the sums, as one: each fold adds pairs of vectors into one, whose lanes are sums of `step` lanes less.
template <int step> INLINE Part fold(Part a, Part b) {
  typedef int32_t Index __attribute__((vector_size(4 * LANES)));
  Index low;
  for (int i = 0; i < LANES; i++) low[i] = (i / step) % 2 * LANES + i / (2 * step) * (2 * step) + i % step;
  return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, low + step);
}
INLINE Floats sums_of_16(const Floats (&v)[16]) {
  Part parts[16];
  EACH(i, 16) parts[i] = folded(v[i]);
  EACH(i, 8) parts[i] = fold<1>(parts[2 * i], parts[2 * i + 1]);
  EACH(i, 4) parts[i] = fold<2>(parts[2 * i], parts[2 * i + 1]);
  if constexpr (LANES > 4) EACH(i, 2) parts[i] = fold<4>(parts[2 * i], parts[2 * i + 1]);
  if constexpr (LANES > 8) parts[0] = fold<8>(parts[0], parts[1]);
  return joined(parts);
}
