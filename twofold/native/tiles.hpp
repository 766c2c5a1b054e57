// Products made tile by tile, in float32 and bfloat16, from what lies as it will be read.
//
// The columns of a matrix are laid out a block or two of 16 at a time: of each word of inputs 16 words a block, one a column.
// Where the processor multiplies bfloat16 by itself, a word is a pair of inputs, and one instruction multiplies and adds 16
// columns of it; elsewhere a word is one input in float32, widened as it is laid out. Then as many rows as there are registers
// for their sums read once what was laid out.

#pragma once

#include <type_traits>

#include "lanes.hpp"

#if defined(REGISTERS_OF_512)
static const int R = 12, BLOCKS = 2;  // rows of a tile, and blocks of 16 columns
#else
static const int R = 6, BLOCKS = 1;
#endif
static const int64_t PANEL = 16 * BLOCKS;

template <class T> struct Term {
  const T* x;         // (rows, inputs)
  int64_t x_stride;
  const T* w;         // (inputs, columns) where `as_read`, else (columns, inputs)
  int64_t w_stride;
  int64_t inputs;     // even, in bfloat16
  int64_t as_read;
  double scale;
};

// One input, of a matrix of T, as a word of float32.
template <class T> struct Word {
  typedef float Factor;  // what multiplies it
  static const int inputs = 1;
  INLINE Floats add(Floats sum, Words w, const float* x) { return fma(floats(w), all(*x), sum); }
  INLINE Words scaled(Words w, float by) { return words(floats(w) * all(by)); }
  INLINE Words rows(const T* w, int64_t, int64_t n) { return words(get(w, n)); }  // of up to 16 columns
  INLINE Words along(const T* w, int64_t n) { return words(get(w, n)); }          // up to 16 words of one column
};
#if defined(__AVX512BF16__)
// A pair of inputs in bfloat16.
template <> struct Word<bf16> {
  typedef bf16 Factor;
  static const int inputs = 2;
  INLINE Floats add(Floats sum, Words w, const bf16* x) {
    int32_t pair;
    std::memcpy(&pair, x, 4);
    return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)_mm512_set1_epi32(pair));
  }
  INLINE Words together(__m256i low, __m256i high) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
  }
  INLINE Words scaled(Words w, float by) { return together(narrowed(low_halves(w) * all(by)), narrowed(high_halves(w) * all(by))); }
  INLINE Words rows(const bf16* w, int64_t stride, int64_t n) {
    return together(_mm256_maskz_loadu_epi16(first(n), w), _mm256_maskz_loadu_epi16(first(n), w + stride));
  }
  INLINE Words along(const bf16* w, int64_t n) { return _mm512_maskz_loadu_epi32(first(n), w); }
};
#endif
template <class T> using Factor = typename Word<T>::Factor;
template <class T> INLINE Factor<T> factor(T v) {
  if constexpr (std::is_same_v<T, Factor<T>>) return v;
  else return widen(v);
}
template <class T> INLINE void factors(const T* x, int64_t n, Factor<T>* to) {
  for (int64_t i = 0; i < n; i += 16) put(get(x + i, n - i), to + i, n - i);
}

// Room that a thread keeps from one product to the next: what comes and goes by the megabyte would leave the heap full of holes.
static char* kept_room(int64_t bytes) {
  static thread_local Own<char> room(nullptr, std::free);
  static thread_local int64_t size = 0;
  if (size < bytes) room = owned<char>(bytes), size = bytes;
  return room.get();
}

template <class T> static constexpr bool WIDENED = !std::is_same_v<T, Factor<T>>;
// Values that a row of d takes in that room.
template <class T> INLINE int64_t widened(int64_t d) { return WIDENED<T> ? d : 0; }

// Rows as what multiplies words: where they are, or widened into `room`, which then begins behind them.
template <class T> struct Rows {
  const Factor<T>* at;
  int64_t stride;

  Rows(const T* x, int64_t x_stride, int64_t rows, int64_t d, Factor<T>*& room) {
    if constexpr (!WIDENED<T>) {
      at = x, stride = x_stride;
    } else {
      Factor<T>* const to = room;
#pragma omp parallel for schedule(static) if (rows > 16)
      for (int64_t r = 0; r < rows; r++) factors(x + r * x_stride, d, to + r * d);
      at = to, stride = d, room += rows * d;
    }
  }
};

// B blocks of 16 columns from the n-th of `width` on, of some words, as [word][block][16].
template <class T, int B> static void lay(const Term<T>& t, int64_t n, int64_t width, int64_t begin, int64_t count, Words* to) {
  const int inputs = Word<T>::inputs;
  for (int b = 0; b < B; b++) {
    const int64_t at = n + b * 16;
    if (t.as_read) {
      for (int64_t s = 0; s < count; s++)
        to[s * B + b] = Word<T>::rows(t.w + (begin + s) * inputs * t.w_stride + at, t.w_stride, width - at);
    } else {
      for (int64_t s = 0; s < count; s += 16) {
        Words r[16];
        EACH(i, 16) r[i] = at + i < width ? Word<T>::along(t.w + (at + i) * t.w_stride + (begin + s) * inputs, count - s) : words(none());
        transpose(r);
        for (int i = 0; i < std::min<int64_t>(16, count - s); i++) to[(s + i) * B + b] = r[i];
      }
    }
  }
  if (t.scale != 1)
    for (int64_t i = 0; i < count * B; i++) to[i] = Word<T>::scaled(to[i], float(t.scale));
}

// Added to `sums` a stretch of words at a time: a sum of sums is nearer the truth than one long sum.
static const int64_t STRETCH = 192;

template <class T, int M, int B> INLINE void tile(const Factor<T>* const* x, const Words* w, int64_t count, Floats (&sums)[R][B]) {
  for (int64_t s = 0; s < count;) {
    Floats a[M][B];
    EACH(r, M) EACH(b, B) a[r][b] = none();
    for (const int64_t end = std::min(count, s + STRETCH); s < end; s++) {
      Words column[B];
      EACH(b, B) column[b] = w[s * B + b];
      EACH(r, M) EACH(b, B) a[r][b] = Word<T>::add(a[r][b], column[b], x[r] + s * Word<T>::inputs);
    }
    EACH(r, M) EACH(b, B) sums[r][b] = sums[r][b] + a[r][b];
  }
}

// `run` with the number of rows of a tile as a constant.
#define CASE(M) case M: if constexpr (M <= R) return run(std::integral_constant<int, M>()); break;
template <class F> INLINE void with_rows(int64_t rows, F run) {
  switch (rows) { CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12) }
}
#undef CASE

template <class T, int B> static void tiles(int rows, const Factor<T>* const* x, const Words* w, int64_t count, Floats (&sums)[R][B]) {
  with_rows(rows, [&](auto m) { tile<T, decltype(m)::value, B>(x, w, count, sums); });
}
