// What a training step does over many rows, on a CPU: its products with what is added to them, attention, and the work between
// two products in one pass over its values each.
//
// A product y = sum_i x_i W_i is made a panel of columns at a time; what is laid out of it is not kept. All terms go into the
// same sums: a base's product and its low-rank update are one pass, rounded once.
//
// Sums are in float32, each by one thread in the order of the inputs: results do not depend on how many threads there are.
// Processors with matrix units for bfloat16 (AMX) are left to the library that knows them.

#if !defined(__AVX512F__) && !(defined(__AVX2__) && defined(__FMA__))
#error "this processor has no vectors of 256 bits"
#endif

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

static const int64_t LAID = 288;           // words that are laid out at once: 18 KiB a block
static const int64_t CACHED = 400 * 1024;  // bytes of rows that stay in the second cache from one piece to the next
static const int64_t WIDE = 4 << 20;      // bytes of rows that are widened at once

struct Room {
  Words laid[LAID * BLOCKS];
  Floats sums[1];  // of each row, between one stretch of words and the next
};

// Some words of one term into the sums of a tile's rows.
template <class T, int B>
static void add_term(const Rows<T>& x, int64_t begin, int64_t count, int64_t row, int rows, const Words* laid, Floats (&sums)[R][B]) {
  const Factor<T>* from[R];
  for (int r = 0; r < rows; r++) from[r] = x.at + (row + r) * x.stride + begin * Word<T>::inputs;
  tiles<T, B>(rows, from, laid, count, sums);
}

template <class T, int B>
static void finish(const Product<T>& p, int64_t n, int64_t row, int rows, const Floats (&sums)[R][B]) {
  for (int r = 0; r < rows; r++)
    for (int b = 0; b < B; b++) {
      const int64_t at = n + b * 16, left = p.width - at;
      Floats sum = p.bias ? sums[r][b] + get(p.bias + at, left) : sums[r][b];
      if (p.onto) sum = sum + get(p.onto + (row + r) * p.onto_stride + at, left);
      put(sum, p.y + (row + r) * p.y_stride + at, left);
    }
}

// B blocks of columns from the n-th on, of some rows.
template <class T, int B> static void columns(const Product<T>& p, const Rows<T>* xs, int64_t n, int64_t from, int64_t to, Room& room) {
  const int64_t passes = (to - from + R - 1) / R;
  for (int64_t i = 0; i < p.count; i++) {
    const int64_t all_of = p.terms[i].inputs / Word<T>::inputs;
    for (int64_t begin = 0; begin < all_of; begin += LAID) {
      const int64_t count = std::min(LAID, all_of - begin);
      const bool is_first = i == 0 && begin == 0, is_last = i == p.count - 1 && begin + count == all_of;
      lay<T, B>(p.terms[i], n, p.width, begin, count, room.laid);
      for (int64_t pass = 0, row = from; pass < passes; pass++) {
        const int rows = int((to - row + passes - pass - 1) / (passes - pass));
        Floats sums[R][B], *kept = room.sums + (row - from) * B;
        for (int j = 0; j < rows * B; j++) sums[j / B][j % B] = is_first ? none() : kept[j];
        add_term<T, B>(xs[i], begin, count, row, rows, room.laid, sums);
        if (is_last) finish(p, n, row, rows, sums);
        else for (int j = 0; j < rows * B; j++) kept[j] = sums[j / B][j % B];
        row += rows;
      }
    }
  }
}

template <class T> static void product_of_some(const Product<T>& p, Factor<T>* widened) {
  int64_t words = 1;
  std::vector<Rows<T>> xs;
  for (int64_t i = 0; i < p.count; i++) {
    words = std::max(words, std::min(LAID, p.terms[i].inputs / Word<T>::inputs));
    xs.emplace_back(p.terms[i].x, p.terms[i].x_stride, p.rows, p.terms[i].inputs, widened);
  }
  const int64_t pieces = (p.width + PANEL - 1) / PANEL, enough = 4 * omp_get_max_threads();
  int64_t parts = (p.rows * words * 4 + CACHED - 1) / CACHED;
  if (pieces < enough) parts = std::max(parts, (enough + pieces - 1) / pieces);
  const int64_t each = up((p.rows + parts - 1) / parts, R);
  parts = (p.rows + each - 1) / each;
#pragma omp parallel
  {
    const Own<char> room = owned<char>(sizeof(Room) + each * BLOCKS * sizeof(Floats));
#pragma omp for schedule(dynamic, 1)
    for (int64_t task = 0; task < pieces * parts; task++) {
      const int64_t n = task % pieces * PANEL, from = task / pieces * each, to = std::min(p.rows, from + each);
      if (p.width - n > PANEL - 16) columns<T, BLOCKS>(p, xs.data(), n, from, to, *(Room*)room.get());
      else columns<T, 1>(p, xs.data(), n, from, to, *(Room*)room.get());
    }
  }
}

// All rows, or as many at a time as are widened in WIDE bytes.
template <class T> static void product(const Product<T>& p) {
  int64_t a_row = 0;
  for (int64_t i = 0; i < p.count; i++) a_row += widened<T>(p.terms[i].inputs) * sizeof(Factor<T>);
  const int64_t each = a_row ? std::min(p.rows, std::max<int64_t>(R, WIDE / a_row / R * R)) : p.rows;
  Factor<T>* const room = (Factor<T>*)kept_room(a_row * each);
  for (int64_t from = 0; from < p.rows; from += each) {
    std::vector<Term<T>> terms(p.terms, p.terms + p.count);
    for (Term<T>& t : terms) t.x += from * t.x_stride;
    const T* onto = p.onto ? p.onto + from * p.onto_stride : nullptr;
    product_of_some<T>({terms.data(), p.count, p.bias, onto, p.onto_stride, p.y + from * p.y_stride, std::min(each, p.rows - from), p.width, p.y_stride}, room);
  }
}

// ---- crossed products: of all rows, for the gradient of a factor ----------------------------------------------------

// A word's rows of a panel's values as the words of its blocks, in an order of their own.
template <class T> INLINE void words_of(const T* x, int64_t, int64_t, int64_t n, Words (&w)[BLOCKS]) { EACH(b, BLOCKS) w[b] = words(get(x + 16 * b, n - 16 * b)); }
INLINE void in_order(Floats (&)[BLOCKS], float) {}
#if defined(__AVX512BF16__)
INLINE void words_of(const bf16* x, int64_t stride, int64_t rows, int64_t n, Words (&w)[2]) {
  const __mmask32 m = __mmask32(first(n - 16)) << 16 | first(n);
  __m512i one = _mm512_maskz_loadu_epi16(m, x), two = _mm512_maskz_loadu_epi16(rows > 1 ? m : 0, x + stride);
  w[0] = _mm512_unpacklo_epi16(one, two), w[1] = _mm512_unpackhi_epi16(one, two);
}
INLINE void in_order(Floats (&v)[2], bf16) {
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

static const int64_t GROUP = 12;   // panels side by side of the wide one at most, of which a row is read in one piece
static const int64_t CHUNK = 192;  // rows of a group that are laid out at once: they stay in the second cache
static const int64_t AHEAD = 8;    // rows between the one that is laid out and the one that is asked for

// Some rows of `count` panels, panel by panel: as they lie, rows a power of two apart would push each other out of the caches.
template <class T> static void lay_panels(const Crossed<T>& c, int64_t first_panel, int64_t count, int64_t from, int64_t to, Words* laid) {
  const int inputs = Word<T>::inputs;
  for (int64_t row = from, s = 0; row < to; row += inputs, s++)
    for (int64_t p = 0; p < count; p++) {
      const int64_t at = (first_panel + p) * PANEL;
      Words w[BLOCKS];
      for (int i = 0; i < inputs; i++) __builtin_prefetch(c.wide + (row + AHEAD + i) * c.wide_stride + at);
      words_of(c.wide + row * c.wide_stride + at, c.wide_stride, c.rows - row, c.n - at, w);
      EACH(b, BLOCKS) laid[(p * CHUNK / inputs + s) * BLOCKS + b] = w[b];
    }
}

// A panel's sums, scaled, to where they belong.
template <class T> static void finish(const Crossed<T>& c, int64_t at, const Floats* kept) {
  for (int64_t i = 0; i < c.m; i++) {
    Floats sums[BLOCKS];
    EACH(b, BLOCKS) sums[b] = kept[i * BLOCKS + b];
    in_order(sums, Factor<T>{});
    for (int b = 0; b < BLOCKS; b++) {
      const Floats v = sums[b] * all(float(c.scale));
      const int64_t column = at + 16 * b;
      if (!c.turned) put(v, c.y + i * c.n + column, c.n - column);
      else scatter(v, c.y + column * c.m + i, c.m, c.n - column);
    }
  }
}

template <class T> static void crossed(const Crossed<T>& c) {
  const int inputs = Word<T>::inputs;
  const int64_t length = up(c.rows, inputs);
  const std::unique_ptr<Factor<T>[]> left(new Factor<T>[length * c.m]());  // the narrow one's transpose
#pragma omp parallel for schedule(static)
  for (int64_t i = 0; i < c.m; i++)
    for (int64_t row = 0; row < c.rows; row++) left[i * length + row] = factor(c.narrow[row * c.narrow_stride + i]);
  const int64_t panels = (c.n + PANEL - 1) / PANEL, passes = (c.m + R - 1) / R;
  const int64_t group = std::min(GROUP, std::max<int64_t>(1, panels / (4 * omp_get_max_threads())));
#pragma omp parallel
  {
    const Own<Floats> kept = owned<Floats>(GROUP * c.m * BLOCKS);
    const Own<Words> laid = owned<Words>(GROUP * CHUNK / inputs * BLOCKS);
#pragma omp for schedule(dynamic, 1)
    for (int64_t first_panel = 0; first_panel < panels; first_panel += group) {
      const int64_t count = std::min(group, panels - first_panel);
      std::fill_n(kept.get(), GROUP * c.m * BLOCKS, none());
      for (int64_t from = 0; from < c.rows; from += CHUNK) {
        const int64_t to = std::min(c.rows, from + CHUNK);
        lay_panels(c, first_panel, count, from, to, laid.get());
        for (int64_t p = 0; p < count; p++)
          for (int64_t pass = 0, i = 0; pass < passes; pass++) {
            const int64_t rows = (c.m - i + passes - pass - 1) / (passes - pass);
            const Factor<T>* x[R];
            Floats sums[R][BLOCKS], *of_panel = kept.get() + (p * c.m + i) * BLOCKS;
            for (int r = 0; r < rows; r++) x[r] = left.get() + (i + r) * length + from;
            for (int j = 0; j < rows * BLOCKS; j++) sums[j / BLOCKS][j % BLOCKS] = of_panel[j];
            tiles<T, BLOCKS>(int(rows), x, laid.get() + p * CHUNK / inputs * BLOCKS, (to - from + inputs - 1) / inputs, sums);
            for (int j = 0; j < rows * BLOCKS; j++) of_panel[j] = sums[j / BLOCKS][j % BLOCKS];
            i += rows;
          }
      }
      for (int64_t p = 0; p < count; p++) finish(c, (first_panel + p) * PANEL, kept.get() + p * c.m * BLOCKS);
    }
  }
}

// ---- between the products -------------------------------------------------------------------------------------------

#define OVER_ROWS _Pragma("omp parallel for schedule(static)") for (int64_t r = 0; r < rows; r++)
#define OVER(i, d) for (int64_t i = 0; i < d; i += 16)

// W: the weight's type. Of the same type as x, x rho is rounded before it is multiplied; wider, after.
template <class T, class W> INLINE Floats normed(Floats x, float rho, const W* weight, int64_t n) {
  const Floats even = x * all(rho);
  return (sizeof(W) == sizeof(T) ? rounded(even, T{}) : even) * get(weight, n);
}

template <class T> static void reciprocal_rms(const T* x, double eps, int64_t rows, int64_t d, float* rho) {
  OVER_ROWS {
    Floats squares = none();
    OVER(i, d) {
      const Floats v = get(x + r * d + i, d - i);
      squares = fma(v, v, squares);
    }
    rho[r] = float(1.0 / std::sqrt(double(sum(squares)) / double(d) + eps));
  }
}

template <class T, class W> static void norm(const T* x, const float* rho, const W* weight, int64_t rows, int64_t d, T* y) {
  OVER_ROWS OVER(i, d) put(normed<T>(get(x + r * d + i, d - i), rho[r], weight + i, d - i), y + r * d + i, d - i);
}

template <class T, class W>
static void norm_backward(const T* dy, const T* x, const float* rho, const W* weight, const T* onto, int64_t rows, int64_t d, T* dx) {
  OVER_ROWS {
    Floats shared = none();
    OVER(i, d) shared = fma(get(dy + r * d + i, d - i) * get(weight + i, d - i), get(x + r * d + i, d - i), shared);
    const float by = -sum(shared) * rho[r] * rho[r] * rho[r] / float(d);
    OVER(i, d) {
      const Floats g = get(dy + r * d + i, d - i) * get(weight + i, d - i);
      const Floats found = fma(get(x + r * d + i, d - i), all(by), g * all(rho[r]));
      put(onto ? found + get(onto + r * d + i, d - i) : found, dx + r * d + i, d - i);
    }
  }
}

template <class T>
static void gated(const T* gate, int64_t gate_stride, const T* up, int64_t up_stride, int64_t gelu, int64_t rows, int64_t d, T* y) {
  OVER_ROWS OVER(i, d) {
    const Floats x = get(gate + r * gate_stride + i, d - i);
    put(activated(x, gelu) * get(up + r * up_stride + i, d - i), y + r * d + i, d - i);
  }
}

template <class T>
static void gated_backward(const T* dy, const T* gate, int64_t gate_stride, const T* up, int64_t up_stride, int64_t gelu, int64_t rows, int64_t d, T* dgate, T* dup) {
  OVER_ROWS OVER(i, d) {
    const Floats x = get(gate + r * gate_stride + i, d - i), s = sigma(inner(x, gelu)), g = get(dy + r * d + i, d - i);
    const Floats bend = x * slope(x, gelu) * (all(1) - s);
    put(g * (x * s), dup + r * d + i, d - i);
    put(g * get(up + r * up_stride + i, d - i) * fma(s, bend, s), dgate + r * d + i, d - i);
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
      const Floats other = get(from + (i < half ? i + half : i - half));
      put(fma(other, get(sin + r * turned + i), get(from + i) * get(cos + r * turned + i)), to + i);
    }
    for (int64_t i = turned; i < d; i++) to[i] = from[i];
  }
}

// -log softmax at each row's label, whether no other logit is larger, and with `gradient` softmax - onehot in place.
template <class T>
static void loss(T* logits, const int64_t* labels, int64_t gradient, int64_t rows, int64_t vocabulary, float* losses, int64_t* right) {
  OVER_ROWS {
    T* row = logits + r * vocabulary;
    Floats top = all(-INFINITY), total = none();
    OVER(i, vocabulary) top = max(top, get(row + i, vocabulary - i, -INFINITY));
    const float peak = most(top);
    OVER(i, vocabulary) total = total + exp16(get(row + i, vocabulary - i, -INFINITY) - all(peak));
    const float all_of = sum(total), picked = widen(row[labels[r]]);
    losses[r] = std::log(all_of) + peak - picked;
    right[r] = picked == peak;
    if (!gradient) continue;
    OVER(i, vocabulary) put(exp16(get(row + i, vocabulary - i) - all(peak)) * all(1 / all_of), row + i, vocabulary - i);
    narrow(std::exp(picked - peak) / all_of - 1, row + labels[r]);
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
int64_t widens_bfloat16() { return Word<bf16>::inputs == 1; }
DOORS(float32, float)
#if !defined(__AMX_BF16__)
DOORS(bfloat16, bf16)
#endif
}
