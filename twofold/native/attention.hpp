// Causal attention over the segments of a packed batch, forward and backward, with no padding, no copies of keys for their query
// heads and no scores kept: the softmax of a row is found again from its logarithm of a sum.
//
// A unit is one segment's key head with some of the queries that share it; its *places* are those queries, heads side by side.
// Its keys and values, prefix first, are brought together and laid out once. A tile of places at a time meets the keys up to the
// last that one of them may see. What a unit adds to the gradients of its keys is summed apart, and units in their order.

#pragma once

#include "tiles.hpp"

struct Span {
  int64_t start, length, prefix_start, prefix_length, first_query, queries;
};

template <class T> struct Attention {
  const T *q, *k, *v;          // (queries, heads, d), the heads without gaps, and twice (rows, key heads, d)
  int64_t q_stride, k_stride, v_stride;
  const Span* spans;
  int64_t count;
  const int64_t* asking;       // each query's row
  int64_t queries, rows, window, heads, key_heads, d;  // window 0: as far back as there are keys
  int64_t key_head_stride;     // from one key head to the next, of keys and values
  double scale, cap;           // scores are scaled, then cap tanh(score / cap); cap 0: as they are
  float* lse;                  // (queries, heads) log of the sum of a row's exponentials; null where no gradient is wanted

  int64_t group() const { return heads / key_heads; }
};

static const int64_t BLOCK = 4 * R;     // places whose gradients of keys are summed at once
static const int64_t PART = 32 * BLOCK; // places of a unit at least, and a quarter of its segment's
static const int64_t PARTS = 4;

struct Unit {
  Span span;
  int64_t head, from, to;  // places
  int64_t keys;            // that its last place may see
  int64_t slab;            // where its keys' gradients are summed
};

template <class T> struct Places {  // of one unit
  const Attention<T>& a;
  const Unit& u;
  int64_t query(int64_t p) const { return u.span.first_query + p / a.group(); }
  int64_t head(int64_t p) const { return u.head * a.group() + p % a.group(); }
  int64_t last(int64_t p) const { return u.span.prefix_length + a.asking[query(p)] - u.span.start; }
  int64_t first_key(int64_t p) const { return a.window ? std::max<int64_t>(0, last(p) - a.window + 1) : 0; }
  int64_t row(int64_t key) const { return key < u.span.prefix_length ? u.span.prefix_start + key : u.span.start + key - u.span.prefix_length; }
  int64_t at(int64_t p) const { return (query(p) * a.heads + head(p)) * a.d; }  // where there are no gaps between rows
};

template <class T> static std::vector<Unit> units(const Attention<T>& a) {
  std::vector<Unit> found;
  int64_t slab = 0;
  for (int64_t s = 0; s < a.count; s++) {
    const int64_t places = a.spans[s].queries * a.group();
    const int64_t each = std::max(PART, up((places + PARTS - 1) / PARTS, BLOCK));
    for (int64_t head = 0; head < a.key_heads; head++)
      for (int64_t from = 0; from < places; from += each) {
        Unit u{a.spans[s], head, from, std::min(places, from + each), 0, slab};
        u.keys = Places<T>{a, u}.last(u.to - 1) + 1;
        slab += 2 * up(a.d, 16) * up(u.keys, PANEL);
        found.push_back(u);
      }
  }
  return found;
}

// The longest first, so that threads end together.
static std::vector<int64_t> order(const std::vector<Unit>& found) {
  std::vector<int64_t> at(found.size());
  for (size_t i = 0; i < at.size(); i++) at[i] = i;
  std::stable_sort(at.begin(), at.end(), [&](int64_t i, int64_t j) { return found[i].keys * (found[i].to - found[i].from) > found[j].keys * (found[j].to - found[j].from); });
  return at;
}

// One head of a unit's keys or values: together, then laid out by key (inputs along d) or along the keys (columns along d).
template <class T> struct Laid {
  int64_t d, panels, words;  // words: of all keys
  Own<T> together;
  Own<Words> by_key, along;

  Laid(int64_t d, int64_t most) : d(d), panels(0), words(0), together(owned<T>(up(most, PANEL) * d)), by_key(nullptr, std::free), along(nullptr, std::free) {
    by_key = owned<Words>(up(most, PANEL) / PANEL * d * BLOCKS);
    along = owned<Words>(up(d, PANEL) / PANEL * up(most, PANEL) * BLOCKS);
  }
  void bring(const T* x, int64_t stride, const Places<T>& places) {
    panels = up(places.u.keys, PANEL) / PANEL;
    words = panels * PANEL / Word<T>::inputs;
    for (int64_t j = 0; j < places.u.keys; j++) std::memcpy(together.get() + j * d, x + places.row(j) * stride + places.u.head * places.a.key_head_stride, d * sizeof(T));
    std::memset((void*)(together.get() + places.u.keys * d), 0, (panels * PANEL - places.u.keys) * d * sizeof(T));
  }
  void lay_by_key() {
    const Term<T> t{nullptr, 0, together.get(), d, d, 0, 1};
    for (int64_t p = 0; p < panels; p++) lay<T, BLOCKS>(t, p * PANEL, panels * PANEL, 0, d / Word<T>::inputs, panel(p));
  }
  void lay_along() {
    const Term<T> t{nullptr, 0, together.get(), d, panels * PANEL, 1, 1};
    for (int64_t n = 0; n < d; n += PANEL) lay<T, BLOCKS>(t, n, d, 0, words, column(n, 0));
  }
  Words* panel(int64_t p) { return by_key.get() + p * (d / Word<T>::inputs) * BLOCKS; }
  Words* column(int64_t n, int64_t key) { return along.get() + (n / PANEL * words + key / Word<T>::inputs) * BLOCKS; }
};

// Products of a tile of rows with the panels of keys [base, end), scaled and bent, into rows of `to` with room for `width` keys.
template <class T>
static void meet(const Factor<T>* const* x, int rows, Laid<T>& keys, int64_t base, int64_t end, float scale, float cap, float* to, int64_t width) {
  for (int64_t at = base; at < end; at += PANEL) {
    Floats sums[R][BLOCKS] = {};
    tiles<T, BLOCKS>(rows, x, keys.panel(at / PANEL), keys.d / Word<T>::inputs, sums);
    for (int r = 0; r < rows; r++) EACH(b, BLOCKS) put(bent(sums[r][b], scale, cap), to + r * width + at + 16 * b);
  }
}

// Products of a tile of rows over the keys [base, end) with what lies along them, each row times its `by`, into rows of d values.
template <class T>
static void gather(const Factor<T>* p, int64_t width, int rows, Laid<T>& values, int64_t base, int64_t end, const float* by, T* const* to) {
  const Factor<T>* x[R];
  for (int r = 0; r < rows; r++) x[r] = p + r * width + base;
  for (int64_t n = 0; n < values.d; n += PANEL) {
    Floats sums[R][BLOCKS] = {};
    tiles<T, BLOCKS>(rows, x, values.column(n, base), (end - base) / Word<T>::inputs, sums);
    for (int r = 0; r < rows; r++) EACH(b, BLOCKS) put(sums[r][b] * all(by[r]), to[r] + n + 16 * b, values.d - n - 16 * b);
  }
}

// Which keys some places may see, to whole panels.
template <class T> static void seen(const Places<T>& places, int64_t from, int64_t to, int64_t& base, int64_t& end) {
  base = places.first_key(from) / PANEL * PANEL, end = places.last(to - 1) / PANEL * PANEL + PANEL;
}

// Rows of d values as what multiplies, with room for where they are widened.
template <class T> struct Brought {
  int64_t d;
  Own<Factor<T>> room;

  Brought(int64_t d, int64_t rows) : d(d), room(owned<Factor<T>>(std::is_same_v<T, Factor<T>> ? 0 : rows * d)) {}
  const Factor<T>* row(int64_t r, const T* x) {
    if constexpr (std::is_same_v<T, Factor<T>>) return x;
    else return factors(x, d, room.get() + r * d), room.get() + r * d;
  }
};

// What the forward of a unit works in.
template <class T> struct Seat {
  Laid<T> keys, values;
  Brought<T> q;
  Own<float> scores;  // (rows of a tile, keys), as p
  Own<Factor<T>> p;

  Seat(int64_t d, int64_t most) : keys(d, most), values(d, most), q(d, R), scores(owned<float>(R * up(most, PANEL))), p(owned<Factor<T>>(R * up(most, PANEL))) {}
};

template <class T> static void attend(const Attention<T>& a, const Unit& u, T* out, Seat<T>& seat) {
  const Places<T> places{a, u};
  seat.keys.bring(a.k, a.k_stride, places), seat.keys.lay_by_key();
  seat.values.bring(a.v, a.v_stride, places), seat.values.lay_along();
  const int64_t width = seat.keys.panels * PANEL;
  float* scores = seat.scores.get();
  for (int64_t from = u.from; from < u.to; from += R) {
    const int rows = int(std::min<int64_t>(R, u.to - from));
    int64_t base, end;
    seen(places, from, from + rows, base, end);
    const Factor<T>* x[R];
    T* y[R];
    float by[R];
    for (int r = 0; r < rows; r++) x[r] = seat.q.row(r, a.q + places.query(from + r) * a.q_stride + places.head(from + r) * a.d), y[r] = out + places.at(from + r);
    meet(x, rows, seat.keys, base, end, float(a.scale), float(a.cap), scores, width);
    for (int r = 0; r < rows; r++) {
      const int64_t begin = places.first_key(from + r), stop = places.last(from + r) + 1;
      Floats top = all(-INFINITY), total = none();
      for (int64_t at = base; at < end; at += 16) top = max(top, where(between(at, begin, stop), get(scores + r * width + at), all(-INFINITY)));
      const float peak = most(top);
      for (int64_t at = base; at < end; at += 16) {
        const Floats e = where(between(at, begin, stop), exp16(get(scores + r * width + at) - all(peak)));
        total = total + e;
        put(e, seat.p.get() + r * width + at);
      }
      const float all_of = sum(total);
      by[r] = 1 / all_of;
      if (a.lse) a.lse[places.query(from + r) * a.heads + places.head(from + r)] = peak + std::log(all_of);
    }
    gather(seat.p.get(), width, rows, seat.values, base, end, by, y);
  }
}

// Rows side by side, as many as a word holds; a missing one is zero.
INLINE Words word(Floats v, Floats, float) { return words(v); }
#if defined(__AVX512BF16__)
INLINE Words word(Floats low, Floats high, bf16) { return Word<bf16>::together(narrowed(low), narrowed(high)); }
#endif

// What the backward of a unit works in.
template <class T> struct Desk {
  int64_t width;
  Laid<T> keys, values;
  Brought<T> q, dout;
  Own<float> scores, dp, slopes;          // (rows of a tile, keys)
  Own<Factor<T>> ds;                      // likewise
  Own<Words> p_words, ds_words;           // [panel of keys][word of places][block]
  Own<Factor<T>> q_turned, dout_turned;   // (d, places of a block)

  Desk(int64_t d, int64_t most)
      : width(up(most, PANEL)), keys(d, most), values(d, most), q(d, BLOCK), dout(d, BLOCK), scores(owned<float>(R * width)), dp(owned<float>(R * width)),
        slopes(owned<float>(R * width)), ds(owned<Factor<T>>(R * width)), p_words(owned<Words>(width / PANEL * BLOCK * BLOCKS)),
        ds_words(owned<Words>(width / PANEL * BLOCK * BLOCKS)), q_turned(owned<Factor<T>>(d * BLOCK)), dout_turned(owned<Factor<T>>(d * BLOCK)) {}
};

// x^T of a block's rows, filled up with zeros.
template <class X> static void turn(const X* const* x, int64_t rows, int64_t d, X* to) {
  std::memset((void*)to, 0, d * BLOCK * sizeof(X));
  for (int64_t r = 0; r < rows; r++)
    for (int64_t i = 0; i < d; i++) to[i * BLOCK + r] = x[r][i];
}

// sums (d, keys) += x (d, places) w (places, keys).
template <class T>
static void add_block(const Factor<T>* x, int64_t d, const Words* w, int64_t count, int64_t base, int64_t end, float* sums, int64_t width) {
  for (int64_t at = base; at < end; at += PANEL)
    for (int64_t i = 0; i < d; i += R) {
      const int rows = int(std::min<int64_t>(R, d - i));
      const Factor<T>* from[R];
      Floats s[R][BLOCKS];
      for (int r = 0; r < rows; r++) {
        from[r] = x + (i + r) * BLOCK;
        EACH(b, BLOCKS) s[r][b] = get(sums + (i + r) * width + at + 16 * b);
      }
      tiles<T, BLOCKS>(rows, from, w + at / PANEL * BLOCK * BLOCKS, count, s);
      for (int r = 0; r < rows; r++) EACH(b, BLOCKS) put(s[r][b], sums + (i + r) * width + at + 16 * b);
    }
}

// Probabilities and gradients of the scores of a tile of places, which are the block's from the `at_word`-th word on.
template <class T>
static void scores_backward(const Attention<T>& a, const Places<T>& places, int64_t from, int rows, int64_t base, int64_t end, int64_t at_word, int64_t wide_base, int64_t wide_end, Desk<T>& desk) {
  const int64_t width = desk.width;
  float *p = desk.scores.get(), *ds = desk.dp.get(), *slopes = desk.slopes.get();
  for (int r = 0; r < rows; r++) {
    const int64_t begin = places.first_key(from + r), stop = places.last(from + r) + 1;
    const Floats lse = all(a.lse[places.query(from + r) * a.heads + places.head(from + r)]);
    Floats shared = none();
    for (int64_t at = base; at < end; at += 16) {
      const Mask m = between(at, begin, stop);
      const Floats s = get(p + r * width + at), over = s / all(float(a.cap));
      const Floats e = where(m, exp16(s - lse));
      if (a.cap) put(fnma(over, over, all(1)), slopes + r * width + at);
      shared = where(m, fma(e, get(ds + r * width + at), shared), shared);
      put(e, p + r * width + at);
    }
    const Floats mean = all(sum(shared));
    for (int64_t at = base; at < end; at += 16) {
      Floats e = get(p + r * width + at) * all(float(a.scale));
      if (a.cap) e = e * get(slopes + r * width + at);
      const Floats g = where(between(at, begin, stop), e * (get(ds + r * width + at) - mean));
      put(g, ds + r * width + at);
      put(g, desk.ds.get() + r * width + at);
    }
  }
  const int in_word = Word<T>::inputs;
  for (int r = 0; r < rows; r += in_word)
    for (int64_t at = wide_base; at < wide_end; at += 16) {
      const bool inside = at >= base && at < end, pair = inside && r + 1 < rows;
      const int64_t to = (at / PANEL * BLOCK + at_word + r / in_word) * BLOCKS + at / 16 % BLOCKS;
      const int64_t one = r * width + at, two = one + width;
      desk.p_words.get()[to] = word(inside ? get(p + one) : none(), pair ? get(p + two) : none(), Factor<T>{});
      desk.ds_words.get()[to] = word(inside ? get(ds + one) : none(), pair ? get(ds + two) : none(), Factor<T>{});
    }
}

template <class T> static void attend_backward(const Attention<T>& a, const Unit& u, const T* dout, T* dq, float* slab, Desk<T>& desk) {
  const Places<T> places{a, u};
  desk.keys.bring(a.k, a.k_stride, places), desk.keys.lay_by_key(), desk.keys.lay_along();
  desk.values.bring(a.v, a.v_stride, places), desk.values.lay_by_key();
  const int64_t keys = up(u.keys, PANEL);
  float *dk = slab, *dv = slab + up(a.d, 16) * keys;
  std::memset(slab, 0, 2 * up(a.d, 16) * keys * sizeof(float));
  float ones[R];
  std::fill_n(ones, R, 1.0f);
  for (int64_t begin = u.from; begin < u.to; begin += BLOCK) {
    const int64_t count = std::min(BLOCK, u.to - begin);
    const Factor<T> *x[BLOCK], *g[BLOCK];
    for (int64_t r = 0; r < count; r++) {
      x[r] = desk.q.row(r, a.q + places.query(begin + r) * a.q_stride + places.head(begin + r) * a.d);
      g[r] = desk.dout.row(r, dout + places.at(begin + r));
    }
    int64_t wide_base, wide_end;
    seen(places, begin, begin + count, wide_base, wide_end);
    for (int64_t from = 0; from < count; from += R) {
      const int rows = int(std::min<int64_t>(R, count - from));
      int64_t base, end;
      seen(places, begin + from, begin + from + rows, base, end);
      meet(x + from, rows, desk.keys, base, end, float(a.scale), float(a.cap), desk.scores.get(), desk.width);
      meet(g + from, rows, desk.values, base, end, 1, 0, desk.dp.get(), desk.width);
      scores_backward(a, places, begin + from, rows, base, end, from / Word<T>::inputs, wide_base, wide_end, desk);
      T* to[R];
      for (int r = 0; r < rows; r++) to[r] = dq + places.at(begin + from + r);
      gather(desk.ds.get(), desk.width, rows, desk.keys, base, end, ones, to);
    }
    const int64_t words = (count + Word<T>::inputs - 1) / Word<T>::inputs;
    turn(x, count, a.d, desk.q_turned.get()), turn(g, count, a.d, desk.dout_turned.get());
    add_block<T>(desk.q_turned.get(), a.d, desk.ds_words.get(), words, wide_base, wide_end, dk, keys);
    add_block<T>(desk.dout_turned.get(), a.d, desk.p_words.get(), words, wide_base, wide_end, dv, keys);
  }
}

// 16 columns of one key head's gradient, of all rows: what every unit adds to it, in their order.
template <class T> static void collect(const Attention<T>& a, const std::vector<Unit>& all_units, const float* slabs, int64_t head, int64_t which, int64_t n, T* to) {
  std::vector<Floats> sums(a.rows, none());
  for (const Unit& u : all_units) {
    if (u.head != head) continue;
    const Places<T> places{a, u};
    const int64_t keys = up(u.keys, PANEL);
    const float* from = slabs + u.slab + (which * up(a.d, 16) + n) * keys;
    for (int64_t j = 0; j < u.keys; j += 16) {
      Words r[16];
      EACH(i, 16) r[i] = words_at(from + i * keys + j);
      transpose(r);
      for (int64_t i = 0; i < std::min<int64_t>(16, u.keys - j); i++) {
        Floats& total = sums[places.row(j + i)];
        total = total + floats(r[i]);
      }
    }
  }
  for (int64_t row = 0; row < a.rows; row++) put(sums[row], to + (row * a.key_heads + head) * a.d + n, a.d - n);
}

// Queries of no span are filler: nothing comes of them.
template <class T> static void clear_others(const Attention<T>& a, T* of_queries) {
  std::vector<char> covered(a.queries, 0);
  for (int64_t s = 0; s < a.count; s++) std::fill_n(covered.begin() + a.spans[s].first_query, a.spans[s].queries, 1);
  for (int64_t i = 0; i < a.queries; i++)
    if (!covered[i]) std::memset((void*)(of_queries + i * a.heads * a.d), 0, a.heads * a.d * sizeof(T));
}

static int64_t most_keys(const std::vector<Unit>& found) {
  int64_t most = 0;
  for (const Unit& u : found) most = std::max(most, u.keys);
  return most;
}

template <class T> static void attention_forward(const Attention<T>& a, T* out) {
  const std::vector<Unit> found = units(a);
  const std::vector<int64_t> turns = order(found);
  const int64_t most = most_keys(found);
  clear_others(a, out);
#pragma omp parallel
  {
    Seat<T> seat(a.d, most);
#pragma omp for schedule(dynamic, 1)
    for (size_t i = 0; i < turns.size(); i++) attend(a, found[turns[i]], out, seat);
  }
}

template <class T> static void attention_backward(const Attention<T>& a, const T* dout, T* dq, T* dk, T* dv) {
  const std::vector<Unit> found = units(a);
  const std::vector<int64_t> turns = order(found);
  const int64_t most = most_keys(found);
  const Own<float> slabs = owned<float>(found.empty() ? 0 : found.back().slab + 2 * up(a.d, 16) * up(found.back().keys, PANEL));
  clear_others(a, dq);
#pragma omp parallel
  {
    Desk<T> desk(a.d, most);
#pragma omp for schedule(dynamic, 1)
    for (size_t i = 0; i < turns.size(); i++) attend_backward(a, found[turns[i]], dout, dq, slabs.get() + found[turns[i]].slab, desk);
    const int64_t columns = up(a.d, 16) / 16;
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < a.key_heads * 2 * columns; i++) {
      const int64_t which = i % 2, n = i / 2 % columns * 16, head = i / 2 / columns;
      collect(a, found, slabs.get(), head, which, n, which ? dv : dk);
    }
  }
}
