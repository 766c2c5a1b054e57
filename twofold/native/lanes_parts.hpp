// Sixteen floats in the registers of a processor with smaller ones: parts side by side, by the compiler's own vectors. What it makes badly
// of these is written with AVX2's instructions where there are some.

#pragma once

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
