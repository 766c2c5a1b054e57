// Vectors of 512 bits, and products made tile by tile of them, in float32 and bfloat16.
//
// The columns of a matrix are laid out 32 at a time as they will be read: of each pair of inputs (one input, in float32) 32 words,
// one a column, so that one instruction multiplies and adds 16 columns. Then up to 12 rows at a time have their sums in 24
// registers while what was laid out is read once.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <omp.h>
#if !defined(__AVX512F__) || !defined(__AVX512BW__) || !defined(__AVX512VL__)
#error "this processor has no vectors of 512 bits"
#endif
#include <immintrin.h>

// A loop of fixed length whose every turn has registers of its own.
#define EACH(i, n) _Pragma("GCC unroll 16") for (int i = 0; i < n; i++)

struct bf16 {
  uint16_t bits;
};

static inline __mmask16 first(int64_t n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : __mmask16((1u << n) - 1); }
static inline __m512 get(const float* p, __mmask16 m) { return _mm512_maskz_loadu_ps(m, p); }
static inline __m512 get(const bf16* p, __mmask16 m) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(m, p)), 16));
}
// To bfloat16, halves to the even neighbour; not a number stays none.
static inline __m256i narrowed(__m512 v) {
#if defined(__AVX512BF16__)
  return (__m256i)_mm512_cvtneps_pbh(v);
#else
  __m512i bits = _mm512_castps_si512(v), even = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i up = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(even, _mm512_set1_epi32(0x7fff))), 16);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(up, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc0)));
#endif
}
static inline void put(__m512 v, float* p, __mmask16 m) { _mm512_mask_storeu_ps(p, m, v); }
static inline void put(__m512 v, bf16* p, __mmask16 m) { _mm256_mask_storeu_epi16(p, m, narrowed(v)); }
static inline __m512 rounded(__m512 v, float) { return v; }
static inline __m512 rounded(__m512 v, bf16) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrowed(v)), 16)); }
static inline __m512 all(float v) { return _mm512_set1_ps(v); }

// e^x, to two units in the last place (the polynomial of the Cephes library); what is not a number stays none.
static inline __m512 exp16(__m512 x) {
  x = _mm512_min_ps(all(110), _mm512_max_ps(all(-110), x));
  __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, all(1.44269504f)), 0);
  x = _mm512_fnmadd_ps(n, all(0.693359375f), x);
  x = _mm512_fmadd_ps(n, all(2.12194440e-4f), x);
  __m512 y = all(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) y = _mm512_fmadd_ps(y, x, all(c));
  y = _mm512_add_ps(_mm512_fmadd_ps(_mm512_mul_ps(y, x), x, x), all(1));
  return _mm512_scalef_ps(y, n);
}

// ---- tiles of a product ----------------------------------------------------------------------------------------------

static const int R = 12, WORDS = 16;  // rows and words of a tile

template <class T> struct Term {
  const T* x;         // (rows, inputs)
  int64_t x_stride;
  const T* w;         // (inputs, columns) where `as_read`, else (columns, inputs)
  int64_t w_stride;
  int64_t inputs;     // even, in bfloat16
  int64_t as_read;
  double scale;
};

template <class T> struct Word;
template <> struct Word<float> {
  static const int inputs = 1;
  static inline __m512 add(__m512 sum, __m512i w, const float* x) { return _mm512_fmadd_ps(_mm512_castsi512_ps(w), all(*x), sum); }
  static inline __m512i scaled(__m512i w, float by) { return _mm512_castps_si512(_mm512_mul_ps(_mm512_castsi512_ps(w), all(by))); }
  static inline __m512i rows(const float* w, int64_t, __mmask16 m) { return _mm512_maskz_loadu_epi32(m, w); }
};
#if defined(__AVX512BF16__)
template <> struct Word<bf16> {
  static const int inputs = 2;
  static inline __m512 add(__m512 sum, __m512i w, const bf16* x) {
    int32_t pair;
    std::memcpy(&pair, x, 4);
    return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)_mm512_set1_epi32(pair));
  }
  static inline __m512i together(__m256i low, __m256i high) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
  }
  static inline __m512i scaled(__m512i w, float by) {
    __m512 low = _mm512_castsi512_ps(_mm512_slli_epi32(w, 16)), high = _mm512_castsi512_ps(_mm512_and_si512(w, _mm512_set1_epi32(0xffff0000)));
    return together(narrowed(_mm512_mul_ps(low, all(by))), narrowed(_mm512_mul_ps(high, all(by))));
  }
  static inline __m512i rows(const bf16* w, int64_t stride, __mmask16 m) {
    return together(_mm256_maskz_loadu_epi16(m, w), _mm256_maskz_loadu_epi16(m, w + stride));
  }
};
#endif

static inline void transpose(__m512i (&r)[16]) {
  __m512i t[16];
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

// B blocks of 16 columns from the n-th of `width` on, of some words, as [word][block][16].
template <class T, int B> static void lay(const Term<T>& t, int64_t n, int64_t width, int64_t begin, int64_t words, __m512i* to) {
  const int inputs = Word<T>::inputs;
  for (int b = 0; b < B; b++) {
    const int64_t at = n + b * 16;
    if (t.as_read) {
      for (int64_t s = 0; s < words; s++)
        to[s * B + b] = Word<T>::rows(t.w + (begin + s) * inputs * t.w_stride + at, t.w_stride, first(width - at));
    } else {
      for (int64_t s = 0; s < words; s += WORDS) {
        __m512i r[16];
        EACH(i, 16) r[i] = at + i < width ? _mm512_maskz_loadu_epi32(first(words - s), t.w + (at + i) * t.w_stride + (begin + s) * inputs) : _mm512_setzero_si512();
        transpose(r);
        for (int i = 0; i < std::min<int64_t>(WORDS, words - s); i++) to[(s + i) * B + b] = r[i];
      }
    }
  }
  if (t.scale != 1)
    for (int64_t i = 0; i < words * B; i++) to[i] = Word<T>::scaled(to[i], float(t.scale));
}

// Added to `sums` a stretch of words at a time: a sum of sums is nearer the truth than one long sum.
static const int64_t STRETCH = 192;

template <class T, int M, int B> static inline void tile(const T* const* x, const __m512i* w, int64_t words, __m512 (&sums)[R][B]) {
  for (int64_t s = 0; s < words;) {
    __m512 a[M][B];
    EACH(r, M) EACH(b, B) a[r][b] = _mm512_setzero_ps();
    for (const int64_t end = std::min(words, s + STRETCH); s < end; s++) {
      __m512i column[B];
      EACH(b, B) column[b] = w[s * B + b];
      EACH(r, M) EACH(b, B) a[r][b] = Word<T>::add(a[r][b], column[b], x[r] + s * Word<T>::inputs);
    }
    EACH(r, M) EACH(b, B) sums[r][b] = _mm512_add_ps(sums[r][b], a[r][b]);
  }
}

template <class T, int B> static void tiles(int rows, const T* const* x, const __m512i* w, int64_t words, __m512 (&sums)[R][B]) {
#define ROWS(M) case M: tile<T, M, B>(x, w, words, sums); break;
  switch (rows) { ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) ROWS(6) ROWS(7) ROWS(8) ROWS(9) ROWS(10) ROWS(11) ROWS(12) }
#undef ROWS
}
