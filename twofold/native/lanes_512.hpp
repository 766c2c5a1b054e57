// Sixteen floats in one register of 512 bits.

#pragma once

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
