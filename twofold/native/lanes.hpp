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

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define REGISTERS_OF_512

typedef __m512 Floats;
typedef __m512i Words;
typedef __mmask16 Mask;

INLINE Mask first(int64_t n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : Mask((1u << n) - 1); }
INLINE Mask between(int64_t at, int64_t from, int64_t to) { return first(to - at) & ~first(from - at); }
INLINE Floats where(Mask m, Floats yes, Floats no) { return _mm512_mask_mov_ps(no, m, yes); }
INLINE Floats where(Mask m, Floats yes) { return _mm512_maskz_mov_ps(m, yes); }

INLINE Floats all(float v) { return _mm512_set1_ps(v); }
INLINE Floats none() { return _mm512_setzero_ps(); }
INLINE Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
INLINE Floats fnma(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }
INLINE Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
INLINE Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }
INLINE Floats magnitude(Floats v) { return _mm512_abs_ps(v); }
INLINE Floats with_sign(Floats v, Floats of) { return _mm512_or_ps(v, _mm512_and_ps(of, all(-0.0f))); }
INLINE float sum(Floats v) { return _mm512_reduce_add_ps(v); }
INLINE float most(Floats v) { return _mm512_reduce_max_ps(v); }
INLINE Floats whole(Floats v) { return _mm512_roundscale_ps(v, 0); }
INLINE Floats times_power(Floats v, Floats n) { return _mm512_scalef_ps(v, n); }

INLINE Floats floats(Words w) { return _mm512_castsi512_ps(w); }
INLINE Words words(Floats v) { return _mm512_castps_si512(v); }
INLINE Floats low_halves(Words w) { return floats(_mm512_slli_epi32(w, 16)); }
INLINE Floats high_halves(Words w) { return floats(_mm512_and_si512(w, _mm512_set1_epi32(0xffff0000))); }
INLINE Words words_at(const void* p) { return _mm512_loadu_si512(p); }

INLINE __m256i narrowed(Floats v) {
#if defined(__AVX512BF16__)
  return (__m256i)_mm512_cvtneps_pbh(v);
#else
  __m512i bits = words(v), even = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i up = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(even, _mm512_set1_epi32(0x7fff))), 16);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(up, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0)));
#endif
}
INLINE Words widened(__m256i halves) { return _mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16); }

// The first n of 16; what is not there reads as `otherwise`.
INLINE Floats get(const float* p, int64_t n = 16, float otherwise = 0) {
  return otherwise ? _mm512_mask_loadu_ps(all(otherwise), first(n), p) : _mm512_maskz_loadu_ps(first(n), p);
}
INLINE Floats get(const bf16* p, int64_t n = 16, float otherwise = 0) {
  Floats v = floats(widened(_mm256_maskz_loadu_epi16(first(n), p)));
  return otherwise ? where(first(n), v, all(otherwise)) : v;
}
INLINE void put(Floats v, float* p, int64_t n = 16) { _mm512_mask_storeu_ps(p, first(n), v); }
INLINE void put(Floats v, bf16* p, int64_t n = 16) { _mm256_mask_storeu_epi16(p, first(n), narrowed(v)); }
INLINE void scatter(Floats v, float* p, int64_t stride, int64_t n) {
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  _mm512_mask_i32scatter_ps(p, first(n), _mm512_mullo_epi32(lanes, _mm512_set1_epi32(int(stride))), v, 4);
}
INLINE Floats rounded(Floats v, float) { return v; }
INLINE Floats rounded(Floats v, bf16) { return floats(widened(narrowed(v))); }
INLINE Floats from_bytes(const int8_t* p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p))); }

INLINE void transpose(Words (&r)[16]) {
  Words t[16];
  EACH(i, 8) t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]), t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  EACH(i, 4) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]), r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]), r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  EACH(i, 4) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88), t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88), t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  EACH(i, 4) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88), r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88), r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

static const int LANES = 16;  // of a register
typedef float Part __attribute__((vector_size(64)));
INLINE Part folded(Floats v) { return (Part)v; }
INLINE Floats joined(const Part* parts) { return (Floats)parts[0]; }

#else

#if defined(__AVX2__)
static const int LANES = 8;
#else
static const int LANES = 4;
#endif
static const int PARTS_OF_16 = 16 / LANES;
typedef float Part __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef int8_t Bytes __attribute__((vector_size(LANES)));

struct Floats {
  Part v[PARTS_OF_16];
};
struct Words {
  Bits v[PARTS_OF_16];
};
struct Mask {
  Ints v[PARTS_OF_16];
};

#define MADE(type, ...) type made; EACH(i, PARTS_OF_16) made.v[i] = __VA_ARGS__; return made
template <class V> INLINE V read(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}

INLINE Ints lanes_of(int i) {
  Ints lanes;
  for (int j = 0; j < LANES; j++) lanes[j] = i * LANES + j;
  return lanes;
}
INLINE Mask between(int64_t at, int64_t from, int64_t to) {
  const int32_t begin = int32_t(std::clamp<int64_t>(from - at, 0, 16)), end = int32_t(std::clamp<int64_t>(to - at, 0, 16));
  MADE(Mask, (lanes_of(i) >= begin) & (lanes_of(i) < end));
}
INLINE Floats where(Mask m, Floats yes, Floats no) { MADE(Floats, (Part)(((Ints)yes.v[i] & m.v[i]) | ((Ints)no.v[i] & ~m.v[i]))); }
INLINE Floats where(Mask m, Floats yes) { MADE(Floats, (Part)((Ints)yes.v[i] & m.v[i])); }

INLINE Floats all(float v) { MADE(Floats, v - (Part){}); }
INLINE Floats none() { return all(0); }
INLINE Floats operator+(Floats a, Floats b) { MADE(Floats, a.v[i] + b.v[i]); }
INLINE Floats operator-(Floats a, Floats b) { MADE(Floats, a.v[i] - b.v[i]); }
INLINE Floats operator*(Floats a, Floats b) { MADE(Floats, a.v[i] * b.v[i]); }
INLINE Floats operator/(Floats a, Floats b) { MADE(Floats, a.v[i] / b.v[i]); }
INLINE Floats fma(Floats a, Floats b, Floats c) { MADE(Floats, a.v[i] * b.v[i] + c.v[i]); }
INLINE Floats fnma(Floats a, Floats b, Floats c) { MADE(Floats, c.v[i] - a.v[i] * b.v[i]); }
INLINE Floats max(Floats a, Floats b) { MADE(Floats, a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
INLINE Floats min(Floats a, Floats b) { MADE(Floats, a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
INLINE Floats magnitude(Floats v) { MADE(Floats, (Part)((Bits)v.v[i] & 0x7fffffffu)); }
INLINE Floats with_sign(Floats v, Floats of) { MADE(Floats, (Part)((Bits)v.v[i] | ((Bits)of.v[i] & 0x80000000u))); }
INLINE Part folded(Floats v) {
  Part total = v.v[0];
  for (int i = 1; i < PARTS_OF_16; i++) total += v.v[i];
  return total;
}
INLINE Floats joined(const Part* parts) { MADE(Floats, parts[i]); }
INLINE float sum(Floats v) {
  const Part part = folded(v);
  float total = 0;
  for (int i = 0; i < LANES; i++) total += part[i];
  return total;
}
INLINE float most(Floats v) {
  Part top = v.v[0];
  for (int i = 1; i < PARTS_OF_16; i++) top = v.v[i] > top ? v.v[i] : top;
  float found = top[0];
  for (int i = 1; i < LANES; i++) found = std::max(found, top[i]);
  return found;
}
// To the nearest whole number, of values far below 2^23 in size.
INLINE Floats whole(Floats v) {
  const float shift = 12582912;  // 1.5 * 2^23: what is added to it has no room for a fraction
  MADE(Floats, (v.v[i] + shift) - shift);
}
// v 2^n for whole n from -160 to 160, in two steps, so that neither leaves the range of a float.
INLINE Floats times_power(Floats v, Floats n) {
  const auto power = [](Ints of) { return (Part)((of + 127) << 23); };
  const auto ints = [&](int i) { return __builtin_convertvector(n.v[i], Ints); };
  MADE(Floats, v.v[i] * power(ints(i) >> 1) * power(ints(i) - (ints(i) >> 1)));
}

INLINE Floats floats(Words w) { MADE(Floats, (Part)w.v[i]); }
INLINE Words words(Floats v) { MADE(Words, (Bits)v.v[i]); }
INLINE Floats low_halves(Words w) { MADE(Floats, (Part)(w.v[i] << 16)); }
INLINE Floats high_halves(Words w) { MADE(Floats, (Part)(w.v[i] & 0xffff0000u)); }
INLINE Words words_at(const void* p) { MADE(Words, read<Bits>((const char*)p + i * 4 * LANES)); }

INLINE Bits narrowed_bits(Part v) {
  const Bits bits = (Bits)v, up = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Bits none = (Bits)(v != v);
  return (up & ~none) | (none & 0x7fc0u);
}

// The first n of 16; what is not there reads as `otherwise`.
INLINE Floats get(const float* p, int64_t n = 16, float otherwise = 0) {
  if (n >= 16) { MADE(Floats, read<Part>(p + i * LANES)); }
  Floats some = all(otherwise);
  if (n > 0) std::memcpy(&some, p, n * sizeof(float));
  return some;
}
INLINE Floats get(const bf16* p, int64_t n = 16, float otherwise = 0) {
  if (n >= 16) { MADE(Floats, (Part)(__builtin_convertvector(read<Halves>(p + i * LANES), Bits) << 16)); }
  float some[16];
  for (int64_t i = 0; i < 16; i++) some[i] = i < n ? widen(p[i]) : otherwise;
  return get(some);
}
INLINE void put(Floats v, float* p, int64_t n = 16) {
  if (n >= 16) { EACH(i, PARTS_OF_16) std::memcpy(p + i * LANES, &v.v[i], sizeof(Part)); }
  else if (n > 0) std::memcpy(p, &v, n * sizeof(float));
}
INLINE void put(Floats v, bf16* p, int64_t n = 16) {
  alignas(32) bf16 some[16];
#if defined(__AVX2__)
  const __m256i packed = _mm256_packus_epi32((__m256i)narrowed_bits(v.v[0]), (__m256i)narrowed_bits(v.v[1]));
  const __m256i in_order = _mm256_permute4x64_epi64(packed, 0xd8);
  if (n >= 16) return _mm256_storeu_si256((__m256i*)p, in_order);
  _mm256_store_si256((__m256i*)some, in_order);
#else
  EACH(i, PARTS_OF_16) {
    const Halves narrowed = __builtin_convertvector(narrowed_bits(v.v[i]), Halves);
    std::memcpy(some + i * LANES, &narrowed, sizeof(narrowed));
  }
#endif
  std::memcpy((void*)p, some, std::clamp<int64_t>(n, 0, 16) * sizeof(bf16));
}
INLINE void scatter(Floats v, float* p, int64_t stride, int64_t n) {
  float some[16];
  put(v, some);
  for (int64_t i = 0; i < std::min<int64_t>(16, n); i++) p[i * stride] = some[i];
}
INLINE Floats rounded(Floats v, float) { return v; }
INLINE Floats rounded(Floats v, bf16) { MADE(Floats, (Part)(narrowed_bits(v.v[i]) << 16)); }
#if defined(__AVX2__)
INLINE Floats from_bytes(const int8_t* p) { MADE(Floats, _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(p + i * LANES))))); }
#else
INLINE Floats from_bytes(const int8_t* p) { MADE(Floats, __builtin_convertvector(__builtin_convertvector(read<Bytes>(p + i * LANES), Ints), Part)); }
#endif

// A square of as many words as a register has lanes.
INLINE void transpose_part(Bits (&r)[LANES]) {
#if defined(__AVX2__)
  Bits t[8];
  EACH(i, 4) t[2 * i] = (Bits)_mm256_unpacklo_epi32((__m256i)r[2 * i], (__m256i)r[2 * i + 1]), t[2 * i + 1] = (Bits)_mm256_unpackhi_epi32((__m256i)r[2 * i], (__m256i)r[2 * i + 1]);
  EACH(i, 2) {
    r[4 * i] = (Bits)_mm256_unpacklo_epi64((__m256i)t[4 * i], (__m256i)t[4 * i + 2]), r[4 * i + 1] = (Bits)_mm256_unpackhi_epi64((__m256i)t[4 * i], (__m256i)t[4 * i + 2]);
    r[4 * i + 2] = (Bits)_mm256_unpacklo_epi64((__m256i)t[4 * i + 1], (__m256i)t[4 * i + 3]), r[4 * i + 3] = (Bits)_mm256_unpackhi_epi64((__m256i)t[4 * i + 1], (__m256i)t[4 * i + 3]);
  }
  EACH(i, 8) t[i] = r[i];
  EACH(i, 4) {
    r[i] = (Bits)_mm256_permute2x128_si256((__m256i)t[i], (__m256i)t[i + 4], 0x20);
    r[i + 4] = (Bits)_mm256_permute2x128_si256((__m256i)t[i], (__m256i)t[i + 4], 0x31);
  }
#else
  for (int i = 0; i < LANES; i++)
    for (int j = 0; j < i; j++) std::swap(r[i][j], r[j][i]);
#endif
}
INLINE void transpose(Words (&r)[16]) {
  Words t[16];
  EACH(row, PARTS_OF_16) EACH(column, PARTS_OF_16) {
    Bits square[LANES];
    EACH(i, LANES) square[i] = r[row * LANES + i].v[column];
    transpose_part(square);
    EACH(i, LANES) t[column * LANES + i].v[row] = square[i];
  }
  EACH(i, 16) r[i] = t[i];
}
#undef MADE

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
