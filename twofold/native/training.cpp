// What a training step does over many rows, on a CPU with vectors of 512 bits: its products with what is added to them, attention,
// and the work between two products in one pass over its values each.
//
// A product y = sum_i x_i W_i is made 32 columns at a time; what is laid out of them is not kept. All terms go into the same
// sums: a base's product and its low-rank update are one pass, rounded once.
//
// Sums are in float32, each by one thread in the order of the inputs: results do not depend on how many threads there are.
// Processors with matrix units for bfloat16 (AMX) are left to the library that knows them.

#include "attention.hpp"
#include "tiles.hpp"

// ---- products -------------------------------------------------------------------------------------------------------

template <class T> struct Product {
  const Term<T>* terms;
  int64_t count;
  const T* bias;  // null for none, as `onto`
  const T* onto;
  int64_t onto_stride;
  T* y;
  int64_t rows, width, y_stride;
};

static const int64_t LAID = 288;           // words that are laid out at once: 36 KiB
static const int64_t CACHED = 400 * 1024;  // bytes of rows that stay in the second cache from one piece to the next

struct Room {
  __m512i laid[LAID * 2];
  __m512 sums[1];  // of each row, between one stretch of words and the next
};

// Some words of one term into the sums of a tile's rows.
template <class T, int B>
static void add_term(const Term<T>& t, int64_t begin, int64_t words, int64_t row, int rows, const __m512i* laid, __m512 (&sums)[R][B]) {
  const T* x[R];
  for (int r = 0; r < rows; r++) x[r] = t.x + (row + r) * t.x_stride + begin * Word<T>::inputs;
  tiles<T, B>(rows, x, laid, words, sums);
}

template <class T, int B>
static void finish(const Product<T>& p, int64_t n, int64_t row, int rows, const __m512 (&sums)[R][B]) {
  for (int r = 0; r < rows; r++)
    for (int b = 0; b < B; b++) {
      const int64_t at = n + b * 16;
      const __mmask16 m = first(p.width - at);
      __m512 sum = p.bias ? _mm512_add_ps(sums[r][b], get(p.bias + at, m)) : sums[r][b];
      if (p.onto) sum = _mm512_add_ps(sum, get(p.onto + (row + r) * p.onto_stride + at, m));
      put(sum, p.y + (row + r) * p.y_stride + at, m);
    }
}

// B blocks of columns from the n-th on, of some rows.
template <class T, int B> static void columns(const Product<T>& p, int64_t n, int64_t from, int64_t to, Room& room) {
  const int64_t passes = (to - from + R - 1) / R;
  for (int64_t i = 0; i < p.count; i++) {
    const int64_t all = p.terms[i].inputs / Word<T>::inputs;
    for (int64_t begin = 0; begin < all; begin += LAID) {
      const int64_t words = std::min(LAID, all - begin);
      const bool is_first = i == 0 && begin == 0, is_last = i == p.count - 1 && begin + words == all;
      lay<T, B>(p.terms[i], n, p.width, begin, words, room.laid);
      for (int64_t pass = 0, row = from; pass < passes; pass++) {
        const int rows = int((to - row + passes - pass - 1) / (passes - pass));
        __m512 sums[R][B], *kept = room.sums + (row - from) * B;
        for (int j = 0; j < rows * B; j++) sums[j / B][j % B] = is_first ? _mm512_setzero_ps() : kept[j];
        add_term<T, B>(p.terms[i], begin, words, row, rows, room.laid, sums);
        if (is_last) finish(p, n, row, rows, sums);
        else for (int j = 0; j < rows * B; j++) kept[j] = sums[j / B][j % B];
        row += rows;
      }
    }
  }
}

template <class T> static void product(const Product<T>& p) {
  int64_t words = 1;
  for (int64_t i = 0; i < p.count; i++) words = std::max(words, std::min(LAID, p.terms[i].inputs / Word<T>::inputs));
  const int64_t pieces = (p.width + 31) / 32, enough = 4 * omp_get_max_threads();
  int64_t parts = (p.rows * words * 4 + CACHED - 1) / CACHED;
  if (pieces < enough) parts = std::max(parts, (enough + pieces - 1) / pieces);
  const int64_t each = ((p.rows + parts - 1) / parts + R - 1) / R * R;
  parts = (p.rows + each - 1) / each;
#pragma omp parallel
  {
    const size_t bytes = sizeof(Room) + each * 2 * sizeof(__m512);
    std::unique_ptr<void, decltype(&std::free)> room(std::aligned_alloc(64, bytes), std::free);
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < pieces * parts; task++) {
      const int64_t n = task % pieces * 32, from = task / pieces * each, to = std::min(p.rows, from + each);
      if (p.width - n > 16) columns<T, 2>(p, n, from, to, *(Room*)room.get());
      else columns<T, 1>(p, n, from, to, *(Room*)room.get());
    }
  }
}

// ---- crossed products: of all rows, for the gradient of a factor ----------------------------------------------------

// Two rows' 32 values as the words of two blocks, in an order of their own, or one row's.
static inline void words_of(const float* x, int64_t, int64_t, __mmask16 low, __mmask16 high, __m512i (&w)[2]) {
  w[0] = _mm512_maskz_loadu_epi32(low, x), w[1] = _mm512_maskz_loadu_epi32(high, x + 16);
}
static inline void in_order(__m512 (&)[2], float) {}
#if defined(__AVX512BF16__)
static inline void words_of(const bf16* x, int64_t stride, int64_t rows, __mmask16 low, __mmask16 high, __m512i (&w)[2]) {
  const __mmask32 m = __mmask32(high) << 16 | low;
  __m512i one = _mm512_maskz_loadu_epi16(m, x), two = _mm512_maskz_loadu_epi16(rows > 1 ? m : 0, x + stride);
  w[0] = _mm512_unpacklo_epi16(one, two), w[1] = _mm512_unpackhi_epi16(one, two);
}
static inline void in_order(__m512 (&v)[2], bf16) {
  const __m512i early = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i late = _mm512_add_epi32(early, _mm512_set1_epi32(8));
  __m512 a = _mm512_permutex2var_ps(v[0], early, v[1]), b = _mm512_permutex2var_ps(v[0], late, v[1]);
  v[0] = a, v[1] = b;
}
#endif

// scale * narrow^T wide in float32, (m, n), or (n, m) where `turned`.
template <class T> struct Crossed {
  const T* narrow;  // (rows, m)
  int64_t narrow_stride;
  const T* wide;    // (rows, n)
  int64_t wide_stride;
  int64_t rows, m, n, turned;
  double scale;
  float* y;
};

// M rows from the i-th on, of the 32 columns from the at-th on; `left` holds the narrow one's words, m side by side.
template <class T, int M> static void crossed_tile(const Crossed<T>& c, const T* left, int64_t i, int64_t at) {
  const int inputs = Word<T>::inputs;
  const __mmask16 low = first(c.n - at), high = first(c.n - at - 16);
  __m512 sums[M][2] = {};
  for (int64_t row = 0; row < c.rows;) {
    __m512 a[M][2];
    EACH(r, M) EACH(b, 2) a[r][b] = _mm512_setzero_ps();
    for (const int64_t end = std::min(c.rows, row + STRETCH * inputs); row < end; row += inputs) {
      __m512i w[2];
      words_of(c.wide + row * c.wide_stride + at, c.wide_stride, c.rows - row, low, high, w);
      EACH(r, M) EACH(b, 2) a[r][b] = Word<T>::add(a[r][b], w[b], left + (row / inputs * c.m + i + r) * inputs);
    }
    EACH(r, M) EACH(b, 2) sums[r][b] = _mm512_add_ps(sums[r][b], a[r][b]);
  }
  EACH(r, M) {
    in_order(sums[r], T{});
    EACH(b, 2) {
      const __m512 v = _mm512_mul_ps(sums[r][b], all(float(c.scale)));
      if (!c.turned) put(v, c.y + (i + r) * c.n + at + 16 * b, b ? high : low);
      else _mm512_mask_i32scatter_ps(c.y + (at + 16 * b) * c.m + i + r, b ? high : low, _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), _mm512_set1_epi32(int(c.m))), v, 4);
    }
  }
}

template <class T> static void crossed(const Crossed<T>& c) {
  const int inputs = Word<T>::inputs;
  const std::unique_ptr<T[]> left(new T[up(c.rows, inputs) * c.m]());
  for (int64_t row = 0; row < c.rows; row++)
    for (int64_t i = 0; i < c.m; i++) left[(row / inputs * c.m + i) * inputs + row % inputs] = c.narrow[row * c.narrow_stride + i];
  const int64_t panels = (c.n + 31) / 32, passes = (c.m + R - 1) / R;
#pragma omp parallel for schedule(dynamic, 1)
  for (int64_t at = 0; at < panels * 32; at += 32)
    for (int64_t pass = 0, i = 0; pass < passes; pass++) {
      const int64_t rows = (c.m - i + passes - pass - 1) / (passes - pass);
#define ROWS(M) case M: crossed_tile<T, M>(c, left.get(), i, at); break;
      switch (rows) { ROWS(1) ROWS(2) ROWS(3) ROWS(4) ROWS(5) ROWS(6) ROWS(7) ROWS(8) ROWS(9) ROWS(10) ROWS(11) ROWS(12) }
#undef ROWS
      i += rows;
    }
}

// ---- between the products -------------------------------------------------------------------------------------------

#define OVER_ROWS _Pragma("omp parallel for schedule(static)") for (int64_t r = 0; r < rows; r++)
#define OVER(i, d) for (int64_t i = 0; i < d; i += 16)

// W: the weight's type. Of the same type as x, x rho is rounded before it is multiplied; wider, after.
template <class T, class W> static inline __m512 normed(__m512 x, float rho, const W* weight, __mmask16 m) {
  __m512 even = _mm512_mul_ps(x, all(rho));
  return _mm512_mul_ps(sizeof(W) == sizeof(T) ? rounded(even, T{}) : even, get(weight, m));
}

template <class T> static void reciprocal_rms(const T* x, double eps, int64_t rows, int64_t d, float* rho) {
  OVER_ROWS {
    __m512 squares = _mm512_setzero_ps();
    OVER(i, d) {
      __m512 v = get(x + r * d + i, first(d - i));
      squares = _mm512_fmadd_ps(v, v, squares);
    }
    rho[r] = float(1.0 / std::sqrt(double(_mm512_reduce_add_ps(squares)) / double(d) + eps));
  }
}

template <class T, class W> static void norm(const T* x, const float* rho, const W* weight, int64_t rows, int64_t d, T* y) {
  OVER_ROWS OVER(i, d) {
    const __mmask16 m = first(d - i);
    put(normed<T>(get(x + r * d + i, m), rho[r], weight + i, m), y + r * d + i, m);
  }
}

template <class T, class W>
static void norm_backward(const T* dy, const T* x, const float* rho, const W* weight, const T* onto, int64_t rows, int64_t d, T* dx) {
  OVER_ROWS {
    __m512 shared = _mm512_setzero_ps();
    OVER(i, d) {
      const __mmask16 m = first(d - i);
      __m512 g = _mm512_mul_ps(get(dy + r * d + i, m), get(weight + i, m));
      shared = _mm512_fmadd_ps(g, get(x + r * d + i, m), shared);
    }
    const float by = -_mm512_reduce_add_ps(shared) * rho[r] * rho[r] * rho[r] / float(d);
    OVER(i, d) {
      const __mmask16 m = first(d - i);
      __m512 g = _mm512_mul_ps(get(dy + r * d + i, m), get(weight + i, m));
      __m512 found = _mm512_fmadd_ps(get(x + r * d + i, m), all(by), _mm512_mul_ps(g, all(rho[r])));
      put(onto ? _mm512_add_ps(found, get(onto + r * d + i, m)) : found, dx + r * d + i, m);
    }
  }
}

// f(x) = x sigma(z): silu with z = x, gelu by tanh with z = 2 sqrt(2 / pi) (x + 0.044715 x^3).
static const float GELU = 1.5957691216f, CUBE = 0.044715f;
static inline __m512 sigma(__m512 z) { return _mm512_div_ps(all(1), _mm512_add_ps(all(1), exp16(_mm512_sub_ps(_mm512_setzero_ps(), z)))); }
static inline __m512 inner(__m512 x, bool gelu) {
  return gelu ? _mm512_mul_ps(_mm512_mul_ps(x, all(GELU)), _mm512_fmadd_ps(_mm512_mul_ps(x, x), all(CUBE), all(1))) : x;
}
static inline __m512 slope(__m512 x, bool gelu) {
  return gelu ? _mm512_mul_ps(all(GELU), _mm512_fmadd_ps(_mm512_mul_ps(x, x), all(3 * CUBE), all(1))) : all(1);
}

template <class T>
static void gated(const T* gate, int64_t gate_stride, const T* up, int64_t up_stride, int64_t gelu, int64_t rows, int64_t d, T* y) {
  OVER_ROWS OVER(i, d) {
    const __mmask16 m = first(d - i);
    __m512 x = get(gate + r * gate_stride + i, m);
    __m512 f = _mm512_mul_ps(x, sigma(inner(x, gelu)));
    put(_mm512_mul_ps(f, get(up + r * up_stride + i, m)), y + r * d + i, m);
  }
}

template <class T>
static void gated_backward(const T* dy, const T* gate, int64_t gate_stride, const T* up, int64_t up_stride, int64_t gelu, int64_t rows, int64_t d, T* dgate, T* dup) {
  OVER_ROWS OVER(i, d) {
    const __mmask16 m = first(d - i);
    __m512 x = get(gate + r * gate_stride + i, m), s = sigma(inner(x, gelu)), g = get(dy + r * d + i, m);
    __m512 bend = _mm512_mul_ps(_mm512_mul_ps(x, slope(x, gelu)), _mm512_sub_ps(all(1), s));
    put(_mm512_mul_ps(g, _mm512_mul_ps(x, s)), dup + r * d + i, m);
    put(_mm512_mul_ps(_mm512_mul_ps(g, get(up + r * up_stride + i, m)), _mm512_fmadd_ps(s, bend, s)), dgate + r * d + i, m);
  }
}

// y_i = x_i cos_i + x_(i + turned / 2) sin_i, cyclically over the turned ones; the rest as they are.
template <class T>
static void rotate(const T* x, int64_t stride, const T* cos, const T* sin, int64_t rows, int64_t heads, int64_t d, int64_t turned, T* y) {
  const int64_t half = turned / 2;
  OVER_ROWS for (int64_t h = 0; h < heads; h++) {
    const T* from = x + r * stride + h * d;
    T* to = y + (r * heads + h) * d;
    OVER(i, turned) {
      __m512 other = get(from + (i < half ? i + half : i - half), 0xffff);
      __m512 v = _mm512_mul_ps(get(from + i, 0xffff), get(cos + r * turned + i, 0xffff));
      put(_mm512_fmadd_ps(other, get(sin + r * turned + i, 0xffff), v), to + i, 0xffff);
    }
    for (int64_t i = turned; i < d; i++) to[i] = from[i];
  }
}

// -log softmax at each row's label, whether no other logit is larger, and with `gradient` softmax - onehot in place.
template <class T>
static void loss(T* logits, const int64_t* labels, int64_t gradient, int64_t rows, int64_t vocabulary, float* losses, int64_t* right) {
  OVER_ROWS {
    T* row = logits + r * vocabulary;
    __m512 top = all(-INFINITY), total = _mm512_setzero_ps();
    OVER(i, vocabulary) top = _mm512_mask_max_ps(top, first(vocabulary - i), top, get(row + i, first(vocabulary - i)));
    const float most = _mm512_reduce_max_ps(top);
    OVER(i, vocabulary) {
      const __mmask16 m = first(vocabulary - i);
      total = _mm512_mask_add_ps(total, m, total, exp16(_mm512_sub_ps(get(row + i, m), all(most))));
    }
    const float sum = _mm512_reduce_add_ps(total), picked = _mm512_cvtss_f32(get(row + labels[r], 1));
    losses[r] = std::log(sum) + most - picked;
    right[r] = picked == most;
    if (!gradient) continue;
    OVER(i, vocabulary) {
      const __mmask16 m = first(vocabulary - i);
      put(_mm512_mul_ps(exp16(_mm512_sub_ps(get(row + i, m), all(most))), all(1 / sum)), row + i, m);
    }
    put(all(std::exp(picked - most) / sum - 1), row + labels[r], 1);
  }
}

// ---- by name --------------------------------------------------------------------------------------------------------

#define DOORS(name, T) \
  void product_##name(const Term<T>* terms, int64_t count, const T* bias, const T* onto, int64_t os, T* y, int64_t rows, int64_t width, int64_t ys) { \
    product<T>({terms, count, bias, onto, os, y, rows, width, ys}); \
  } \
  void crossed_##name(const T* narrow, int64_t ns, const T* wide, int64_t ws, int64_t rows, int64_t m, int64_t n, int64_t turned, double scale, float* y) { \
    crossed<T>({narrow, ns, wide, ws, rows, m, n, turned, scale, y}); \
  } \
  void reciprocal_rms_##name(const T* x, double eps, int64_t rows, int64_t d, float* rho) { reciprocal_rms(x, eps, rows, d, rho); } \
  void norm_##name(const T* x, const float* rho, const void* w, int64_t wide, int64_t rows, int64_t d, T* y) { \
    wide ? norm(x, rho, (const float*)w, rows, d, y) : norm(x, rho, (const T*)w, rows, d, y); \
  } \
  void norm_backward_##name(const T* dy, const T* x, const float* rho, const void* w, int64_t wide, const T* onto, int64_t rows, int64_t d, T* dx) { \
    wide ? norm_backward(dy, x, rho, (const float*)w, onto, rows, d, dx) : norm_backward(dy, x, rho, (const T*)w, onto, rows, d, dx); \
  } \
  void gated_##name(const T* gate, int64_t gs, const T* up, int64_t us, int64_t gelu, int64_t rows, int64_t d, T* y) { gated(gate, gs, up, us, gelu, rows, d, y); } \
  void gated_backward_##name(const T* dy, const T* gate, int64_t gs, const T* up, int64_t us, int64_t gelu, int64_t rows, int64_t d, T* dgate, T* dup) { \
    gated_backward(dy, gate, gs, up, us, gelu, rows, d, dgate, dup); \
  } \
  void rotate_##name(const T* x, int64_t stride, const T* cos, const T* sin, int64_t rows, int64_t heads, int64_t d, int64_t turned, T* y) { \
    rotate(x, stride, cos, sin, rows, heads, d, turned, y); \
  } \
  void loss_##name(T* logits, const int64_t* labels, int64_t gradient, int64_t rows, int64_t vocabulary, float* losses, int64_t* right) { \
    loss(logits, labels, gradient, rows, vocabulary, losses, right); \
  } \
  void attention_##name(const Attention<T>* of, T* out) { attention_forward(*of, out); } \
  void attention_backward_##name(const Attention<T>* of, const T* dout, T* dq, T* dk, T* dv) { attention_backward(*of, dout, dq, dk, dv); }

extern "C" {
DOORS(float32, float)
#if defined(__AVX512BF16__) && !defined(__AMX_BF16__)
DOORS(bfloat16, bf16)
#endif
}
