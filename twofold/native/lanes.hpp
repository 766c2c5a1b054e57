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

static inline int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
template <class V> using Own = std::unique_ptr<V, decltype(&std::free)>;
template <class V> static Own<V> owned(int64_t n) { return Own<V>((V*)std::aligned_alloc(64, up(std::max<int64_t>(1, n) * sizeof(V), 64)), std::free); }

struct bf16 {
  uint16_t bits;
};

static inline float widen(float v) { return v; }
static inline float widen(bf16 v) {
  uint32_t bits = uint32_t(v.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, 4);
  return wide;
}
static inline void narrow(float v, float* to) { *to = v; }
static inline void narrow(float v, bf16* to) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  to->bits = v != v ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define REGISTERS_OF_512

typedef __m512 Floats;
typedef __m512i Words;
typedef __mmask16 Mask;

static inline Mask first(int64_t n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : Mask((1u << n) - 1); }
static inline Mask between(int64_t at, int64_t from, int64_t to) { return first(to - at) & ~first(from - at); }
static inline Floats where(Mask m, Floats yes, Floats no) { return _mm512_mask_mov_ps(no, m, yes); }
static inline Floats where(Mask m, Floats yes) { return _mm512_maskz_mov_ps(m, yes); }

static inline Floats all(float v) { return _mm512_set1_ps(v); }
static inline Floats none() { return _mm512_setzero_ps(); }
static inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
static inline Floats fnma(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }
static inline Floats max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
static inline Floats min(Floats a, Floats b) { return _mm512_min_ps(a, b); }
static inline Floats magnitude(Floats v) { return _mm512_abs_ps(v); }
static inline Floats with_sign(Floats v, Floats of) { return _mm512_or_ps(v, _mm512_and_ps(of, all(-0.0f))); }
static inline float sum(Floats v) { return _mm512_reduce_add_ps(v); }
static inline float most(Floats v) { return _mm512_reduce_max_ps(v); }
static inline Floats whole(Floats v) { return _mm512_roundscale_ps(v, 0); }
static inline Floats times_power(Floats v, Floats n) { return _mm512_scalef_ps(v, n); }

static inline Floats floats(Words w) { return _mm512_castsi512_ps(w); }
static inline Words words(Floats v) { return _mm512_castps_si512(v); }
static inline Floats low_halves(Words w) { return floats(_mm512_slli_epi32(w, 16)); }
static inline Floats high_halves(Words w) { return floats(_mm512_and_si512(w, _mm512_set1_epi32(0xffff0000))); }
static inline Words words_at(const void* p) { return _mm512_loadu_si512(p); }

static inline __m256i narrowed(Floats v) {
#if defined(__AVX512BF16__)
  return (__m256i)_mm512_cvtneps_pbh(v);
#else
  __m512i bits = words(v), even = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i up = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(even, _mm512_set1_epi32(0x7fff))), 16);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(up, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0)));
#endif
}
static inline Words widened(__m256i halves) { return _mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16); }

// The first n of 16; what is not there reads as `otherwise`.
static inline Floats get(const float* p, int64_t n = 16, float otherwise = 0) {
  return otherwise ? _mm512_mask_loadu_ps(all(otherwise), first(n), p) : _mm512_maskz_loadu_ps(first(n), p);
}
static inline Floats get(const bf16* p, int64_t n = 16, float otherwise = 0) {
  Floats v = floats(widened(_mm256_maskz_loadu_epi16(first(n), p)));
  return otherwise ? where(first(n), v, all(otherwise)) : v;
}
static inline void put(Floats v, float* p, int64_t n = 16) { _mm512_mask_storeu_ps(p, first(n), v); }
static inline void put(Floats v, bf16* p, int64_t n = 16) { _mm256_mask_storeu_epi16(p, first(n), narrowed(v)); }
static inline void scatter(Floats v, float* p, int64_t stride, int64_t n) {
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  _mm512_mask_i32scatter_ps(p, first(n), _mm512_mullo_epi32(lanes, _mm512_set1_epi32(int(stride))), v, 4);
}
static inline Floats rounded(Floats v, float) { return v; }
static inline Floats rounded(Floats v, bf16) { return floats(widened(narrowed(v))); }
static inline Floats from_bytes(const int8_t* p) { return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p))); }

static inline void transpose(Words (&r)[16]) {
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
static inline Part folded(Floats v) { return (Part)v; }
static inline Floats joined(const Part* parts) { return (Floats)parts[0]; }

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
struct alignas(64) Words {
  Bits v[PARTS_OF_16];
};
struct Mask {
  Ints v[PARTS_OF_16];
};

#define MADE(type, ...) type made; EACH(i, PARTS_OF_16) made.v[i] = __VA_ARGS__; return made
template <class V> static inline V read(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}

static inline Ints lanes_of(int i) {
  Ints lanes;
  for (int j = 0; j < LANES; j++) lanes[j] = i * LANES + j;
  return lanes;
}
static inline Mask between(int64_t at, int64_t from, int64_t to) {
  const int32_t begin = int32_t(std::clamp<int64_t>(from - at, 0, 16)), end = int32_t(std::clamp<int64_t>(to - at, 0, 16));
  MADE(Mask, (lanes_of(i) >= begin) & (lanes_of(i) < end));
}
static inline Floats where(Mask m, Floats yes, Floats no) { MADE(Floats, (Part)(((Ints)yes.v[i] & m.v[i]) | ((Ints)no.v[i] & ~m.v[i]))); }
static inline Floats where(Mask m, Floats yes) { MADE(Floats, (Part)((Ints)yes.v[i] & m.v[i])); }

static inline Floats all(float v) { MADE(Floats, v - (Part){}); }
static inline Floats none() { return all(0); }
static inline Floats operator+(Floats a, Floats b) { MADE(Floats, a.v[i] + b.v[i]); }
static inline Floats operator-(Floats a, Floats b) { MADE(Floats, a.v[i] - b.v[i]); }
static inline Floats operator*(Floats a, Floats b) { MADE(Floats, a.v[i] * b.v[i]); }
static inline Floats operator/(Floats a, Floats b) { MADE(Floats, a.v[i] / b.v[i]); }
static inline Floats fma(Floats a, Floats b, Floats c) { MADE(Floats, a.v[i] * b.v[i] + c.v[i]); }
static inline Floats fnma(Floats a, Floats b, Floats c) { MADE(Floats, c.v[i] - a.v[i] * b.v[i]); }
static inline Floats max(Floats a, Floats b) { MADE(Floats, a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
static inline Floats min(Floats a, Floats b) { MADE(Floats, a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
static inline Floats magnitude(Floats v) { MADE(Floats, (Part)((Bits)v.v[i] & 0x7fffffffu)); }
static inline Floats with_sign(Floats v, Floats of) { MADE(Floats, (Part)((Bits)v.v[i] | ((Bits)of.v[i] & 0x80000000u))); }
static inline Part folded(Floats v) {
  Part total = v.v[0];
  for (int i = 1; i < PARTS_OF_16; i++) total += v.v[i];
  return total;
}
static inline Floats joined(const Part* parts) { MADE(Floats, parts[i]); }
static inline float sum(Floats v) {
  const Part part = folded(v);
  float total = 0;
  for (int i = 0; i < LANES; i++) total += part[i];
  return total;
}
static inline float most(Floats v) {
  Part top = v.v[0];
  for (int i = 1; i < PARTS_OF_16; i++) top = v.v[i] > top ? v.v[i] : top;
  float found = top[0];
  for (int i = 1; i < LANES; i++) found = std::max(found, top[i]);
  return found;
}
// To the nearest whole number, of values far below 2^23 in size.
static inline Floats whole(Floats v) {
  const float shift = 12582912;  // 1.5 * 2^23: what is added to it has no room for a fraction
  MADE(Floats, (v.v[i] + shift) - shift);
}
// v 2^n for whole n from -160 to 160, in two steps, so that neither leaves the range of a float.
static inline Floats times_power(Floats v, Floats n) {
  const auto power = [](Ints of) { return (Part)((of + 127) << 23); };
  const auto ints = [&](int i) { return __builtin_convertvector(n.v[i], Ints); };
  MADE(Floats, v.v[i] * power(ints(i) >> 1) * power(ints(i) - (ints(i) >> 1)));
}

static inline Floats floats(Words w) { MADE(Floats, (Part)w.v[i]); }
static inline Words words(Floats v) { MADE(Words, (Bits)v.v[i]); }
static inline Floats low_halves(Words w) { MADE(Floats, (Part)(w.v[i] << 16)); }
static inline Floats high_halves(Words w) { MADE(Floats, (Part)(w.v[i] & 0xffff0000u)); }
static inline Words words_at(const void* p) { return read<Words>(p); }

static inline Bits narrowed_bits(Part v) {
  const Bits bits = (Bits)v, up = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Bits none = (Bits)(v != v);
  return (up & ~none) | (none & 0x7fc0u);
}

// The first n of 16; what is not there reads as `otherwise`.
static inline Floats get(const float* p, int64_t n = 16, float otherwise = 0) {
  if (n >= 16) { MADE(Floats, read<Part>(p + i * LANES)); }
  Floats some = all(otherwise);
  if (n > 0) std::memcpy(&some, p, n * sizeof(float));
  return some;
}
static inline Floats get(const bf16* p, int64_t n = 16, float otherwise = 0) {
  if (n >= 16) { MADE(Floats, (Part)(__builtin_convertvector(read<Halves>(p + i * LANES), Bits) << 16)); }
  float some[16];
  for (int64_t i = 0; i < 16; i++) some[i] = i < n ? widen(p[i]) : otherwise;
  return get(some);
}
static inline void put(Floats v, float* p, int64_t n = 16) { std::memcpy(p, &v, std::clamp<int64_t>(n, 0, 16) * sizeof(float)); }
static inline void put(Floats v, bf16* p, int64_t n = 16) {
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
static inline void scatter(Floats v, float* p, int64_t stride, int64_t n) {
  float some[16];
  put(v, some);
  for (int64_t i = 0; i < std::min<int64_t>(16, n); i++) p[i * stride] = some[i];
}
static inline Floats rounded(Floats v, float) { return v; }
static inline Floats rounded(Floats v, bf16) { MADE(Floats, (Part)(narrowed_bits(v.v[i]) << 16)); }
static inline Floats from_bytes(const int8_t* p) { MADE(Floats, __builtin_convertvector(__builtin_convertvector(read<Bytes>(p + i * LANES), Ints), Part)); }

// A square of as many words as a register has lanes.
static inline void transpose_part(Bits (&r)[LANES]) {
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
static inline void transpose(Words (&r)[16]) {
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
static inline Floats exp16(Floats x) {
  x = min(all(110), max(all(-110), x));
  Floats n = whole(x * all(1.44269504f));
  x = fnma(n, all(0.693359375f), x);
  x = fma(n, all(2.12194440e-4f), x);
  Floats y = all(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) y = fma(y, x, all(c));
  y = fma(y * x, x, x) + all(1);
  return times_power(y, n);
}

// Of 16 vectors the sums, as one: each fold adds pairs of vectors into one, whose lanes are sums of `step` lanes less.
template <int step> static inline Part fold(Part a, Part b) {
  typedef int32_t Index __attribute__((vector_size(4 * LANES)));
  Index low;
  for (int i = 0; i < LANES; i++) low[i] = (i / step) % 2 * LANES + i / (2 * step) * (2 * step) + i % step;
  return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, low + step);
}
static inline Floats sums_of_16(const Floats (&v)[16]) {
  Part parts[16];
  EACH(i, 16) parts[i] = folded(v[i]);
  EACH(i, 8) parts[i] = fold<1>(parts[2 * i], parts[2 * i + 1]);
  EACH(i, 4) parts[i] = fold<2>(parts[2 * i], parts[2 * i + 1]);
  if constexpr (LANES > 4) EACH(i, 2) parts[i] = fold<4>(parts[2 * i], parts[2 * i + 1]);
  if constexpr (LANES > 8) parts[0] = fold<8>(parts[0], parts[1]);
  return joined(parts);
}
