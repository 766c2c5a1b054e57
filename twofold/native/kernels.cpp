// A decoder's forward pass over few rows, on a CPU: what a step of generation does between reading one weight and the next.
//
// With few rows a step takes as long as its weights take to be read, so each weight is laid once in the order in which it is
// read: blocks of 16 outputs, of each block all inputs, one after the other, so many at a time as fill 64 bytes for the 16
// outputs (one float, or two bfloat16, which one instruction multiplies and adds where the machine has it). A block is read once
// for up to 12 rows, which wait in registers. The factors of adapters lie in the same order: A is a linear map into the ranks, B
// one out of them, and the rows of each adapter are gathered by their numbers, so that every factor is read once a step too.
// A weight may also lie in eight bits: whole numbers, four inputs at a time, and a scale for each output, by which its sum is
// multiplied at the end. The numbers are exact in either type, so nothing is rounded but what any product rounds.
//
// Sums are in float32, results rounded once. Threads are OpenMP's, the library that PyTorch loaded.

#include <functional>

#include "attention.hpp"

// ---- products -------------------------------------------------------------------------------------------------------

// The form of a weight that multiplies inputs of T: how many inputs lie side by side, where in the 64 bytes each value is, and as
// how many vectors, of a word of inputs each, it multiplies.
template <class T> struct Dense {
  typedef T Value;
  static const int inputs = 4 / sizeof(T), vectors = inputs / Word<T>::inputs;
  INLINE int64_t place(int64_t output, int64_t input) { return output * inputs + input; }
  INLINE T kept(T value) { return value; }
  INLINE T given(T value) { return value; }
  INLINE void vectors_of(const char* w, Words (&to)[vectors]) {
    const Words both = words_at(w);
    if constexpr (vectors == 1) to[0] = both;
    else to[0] = words(low_halves(both)), to[1] = words(high_halves(both));
  }
};

// Whole numbers from -127 to 127, one behind the other input by input.
template <class T> struct Codes {
  typedef int8_t Value;
  static const int inputs = 4, vectors = inputs / Word<T>::inputs;
  INLINE int64_t place(int64_t output, int64_t input) { return input * 16 + output; }
  INLINE int8_t kept(int8_t value) { return value; }
  INLINE int8_t given(int8_t value) { return value; }
  INLINE void vectors_of(const char* w, Words (&to)[vectors]) {
    Floats wide[4];
    EACH(i, 4) wide[i] = from_bytes((const int8_t*)w + i * 16);
    if constexpr (vectors == 4) EACH(i, 4) to[i] = words(wide[i]);
#if defined(__AVX512BF16__)
    else EACH(i, 2) to[i] = Word<bf16>::together(narrowed(wide[2 * i]), narrowed(wide[2 * i + 1]));
#endif
  }
};
#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
// The two bytes of a bfloat16 from 0 to 127, to be looked up 64 numbers at a time.
struct Bytes {
  alignas(64) uint8_t high[128], low[128];
};
static constexpr Bytes bytes_of_numbers() {
  Bytes found{};
  for (int number = 1; number < 128; number++) {
    int power = 0;
    while (number >> (power + 1)) power++;
    int bits = (127 + power) << 7 | (number - (1 << power)) << (7 - power);
    found.high[number] = uint8_t(bits >> 8), found.low[number] = uint8_t(bits);
  }
  return found;
}
static constexpr Bytes BYTES = bytes_of_numbers();

// As sign and magnitude, pairs of inputs of four outputs in turn, so that unpacking the bytes looked up gives bfloat16 in order.
template <> struct Codes<bf16> {
  typedef int8_t Value;
  static const int inputs = 4, vectors = 2;
  INLINE int64_t place(int64_t output, int64_t input) { return output / 4 * 16 + input / 2 * 8 + output % 4 * 2 + input % 2; }
  INLINE int8_t kept(int8_t value) { return value < 0 ? int8_t(-value | 0x80) : value; }
  INLINE int8_t given(int8_t kept) { return kept < 0 ? int8_t(-(kept & 0x7f)) : kept; }
  INLINE void vectors_of(const char* w, Words (&to)[2]) {
    const __m512i *high = (const __m512i*)BYTES.high, *low = (const __m512i*)BYTES.low, code = _mm512_loadu_si512(w);
    __m512i l = _mm512_permutex2var_epi8(low[0], code, low[1]), h = _mm512_permutex2var_epi8(high[0], code, high[1]);
    h = _mm512_ternarylogic_epi64(h, code, _mm512_set1_epi8(char(0x80)), 0xf8);  // the sign
    to[0] = _mm512_unpacklo_epi8(l, h), to[1] = _mm512_unpackhi_epi8(l, h);
  }
};
#endif

template <class F> static int64_t steps_of(int64_t in) { return (in + F::inputs - 1) / F::inputs; }

// Codes take longer to be widened than to be read, and are then asked for too late; so far ahead they are asked for early.
static const int64_t AHEAD = 1024;

// Lines of 64 bytes that are read later, one behind the other.
struct Lines {
  const char *at, *end;
};

// M rows times N blocks; some lines are asked for meanwhile.
template <class F, class T, int M, int N>
INLINE void tile(const Factor<T>* const* x, const char* w, int64_t steps, Lines later, Floats (&sums)[M][N]) {
  Floats acc[M][N];
  EACH(r, M) EACH(n, N) acc[r][n] = none();
  for (int64_t s = 0; s < steps; s++)
    EACH(n, N) {
      Words wide[F::vectors];
      if (F::vectors > 1) __builtin_prefetch(w + (n * steps + s) * 64 + AHEAD);
      if (later.at < later.end) __builtin_prefetch(later.at, 0, 2), later.at += 64;
      F::vectors_of(w + (n * steps + s) * 64, wide);
      EACH(i, F::vectors) EACH(r, M) acc[r][n] = Word<T>::add(acc[r][n], wide[i], x[r] + s * F::inputs + i * Word<T>::inputs);
    }
  EACH(r, M) EACH(n, N) sums[r][n] = acc[r][n];
}

// Some steps of a weight as the words that it multiplies, for many rows.
template <class F> static void widen_steps(const char* w, int64_t steps, char* to) {
  for (int64_t s = 0; s < steps; s++) {
    Words wide[F::vectors];
    F::vectors_of(w + s * 64, wide);
    EACH(i, F::vectors) put(floats(wide[i]), (float*)to + (s * F::vectors + i) * 16);
  }
}

// What becomes of a tile's sums.
template <class Y> struct Out {
  Y* const* y;           // of each row, at the first output of the block
  const float* scale;    // by which sums are multiplied, at the first output of the block; null for none
  const Y* bias;         // likewise
  int64_t width;         // outputs from there on
  bool onto;             // added to what is there
};

template <class Y> INLINE void finish(Floats sum, int64_t r, int64_t at, const Out<Y>& out) {
  const int64_t left = out.width - at;
  Y* y = out.y[r] + at;
  if (out.scale) sum = sum * get(out.scale + at, left);
  if (out.bias) sum = sum + get(out.bias + at, left);
  if (out.onto) sum = sum + get(y, left);
  put(sum, y, left);
}

// How many rows have registers for their sums, of so many blocks; and of how many blocks many rows are the fastest.
static constexpr int most_rows(int blocks) { return blocks == 1 ? R : R * BLOCKS / blocks; }
INLINE int64_t blocks_for(int64_t rows) { return rows <= most_rows(4) ? 4 : rows <= most_rows(2) ? 2 : BLOCKS; }

template <class F, class T, class Y, int N>
static void run_rows(int64_t rows, const Factor<T>* const* x, const char* w, int64_t steps, Lines later, int64_t first, const Out<Y>& out) {
  with_rows(rows, [&](auto count) {
    constexpr int M = decltype(count)::value;
    if constexpr (M <= most_rows(N)) {
      Floats sums[M][N];
      tile<F, T, M, N>(x, w, steps, later, sums);
      for (int r = 0; r < M; r++)
        for (int n = 0; n < N; n++) finish(sums[r][n], first + r, n * 16, out);
    }
  });
}

// What is read next is asked for early: where a piece begins, the processor does not know yet that it is read in order.
INLINE void fetch(const char* p) {
  for (int i = 0; i < 8; i++) __builtin_prefetch(p + i * 64);
}

// What a thread needs for a product, kept from one piece of it to the next.
template <class T> struct Rooms {
  std::vector<T*> shifted;
  std::vector<Words> wide;
  std::vector<Lines> later;  // what is read behind these blocks, the next last
  bool at_hand = false;      // whether these blocks lie in the caches from the first pass on

  Lines take(int64_t count) {
    while (!later.empty() && later.back().at == later.back().end) later.pop_back();
    if (later.empty()) return {nullptr, nullptr};
    const Lines some{later.back().at, std::min(later.back().at + count * 64, later.back().end)};
    later.back().at = some.end;
    return some;
  }
};

// All rows against N blocks: in as few passes as the registers allow, as even as can be. What is read later is asked for in those that
// have not to wait for memory themselves.
template <class F, class T, class Y, int N>
static void run_blocks(int64_t rows, const Factor<T>* const* x, const char* w, int64_t steps, const Out<Y>& out, Rooms<T>* rooms = nullptr) {
  int64_t most = most_rows(N), passes = (rows + most - 1) / most;
  for (int64_t p = 0, first = 0; p < passes; p++) {
    int64_t count = (rows - first + passes - p - 1) / (passes - p);
    const Lines later = rooms && (p || rooms->at_hand) ? rooms->take(N * steps) : Lines{nullptr, nullptr};
    run_rows<F, T, Y, N>(count, x + first, w, steps, later, first, out);
    first += count;
  }
}

template <class Y> static Out<Y> from_output(const Out<Y>& out, int64_t at, std::vector<Y*>& y, int64_t rows) {
  y.resize(rows);
  for (int64_t r = 0; r < rows; r++) y[r] = out.y[r] + at;
  return {y.data(), out.scale ? out.scale + at : nullptr, out.bias ? out.bias + at : nullptr, out.width - at, out.onto};
}

// All rows against some blocks: 4 or 2 together where these are whole, else one by one.
template <class F, class T>
static void run_some(int64_t rows, const Factor<T>* const* x, const char* w, int64_t steps, int64_t count, const Out<T>& whole, int64_t first,
                     Rooms<T>& rooms) {
  if (count == 4 || (count == 2 && rows > most_rows(4))) {
    Out<T> part = from_output(whole, first * 16, rooms.shifted, rows);
    if (count == 4) return run_blocks<F, T, T, 4>(rows, x, w, steps, part, &rooms);
    return run_blocks<F, T, T, 2>(rows, x, w, steps, part, &rooms);
  }
  for (int64_t b = 0; b < count; b++) {
    Out<T> part = from_output(whole, (first + b) * 16, rooms.shifted, rows);
    run_blocks<F, T, T, 1>(rows, x, w + b * steps * 64, steps, part, &rooms);
  }
}

// All rows against all blocks of a weight, shared out to the threads that are here. What is not read as it multiplies is widened once
// for many rows.
template <class F, class T>
static void run_weight(int64_t rows, const Factor<T>* const* x, const char* w, int64_t in, const Out<T>& whole, Rooms<T>& rooms) {
  const int64_t steps = steps_of<F>(in), blocks = (whole.width + 15) / 16;
  const char* end = w + blocks * steps * 64;
  rooms.at_hand = F::vectors > 1 && rows > 6;
  const int64_t together = blocks_for(rows), tasks = (blocks + together - 1) / together;
#pragma omp for schedule(static) nowait
  for (int64_t t = 0; t < tasks; t++) {
    int64_t first = t * together, count = std::min(together, blocks - first);
    const char *at = w + first * steps * 64, *next = at + count * steps * 64;
    const size_t behind = rooms.later.size();
    rooms.later.push_back({next, std::min(next + count * steps * 64, end)});
    if (rooms.at_hand) {
      rooms.wide.resize(count * steps * F::vectors);
      widen_steps<F>(at, count * steps, (char*)rooms.wide.data());
      run_some<Dense<Factor<T>>, T>(rows, x, (const char*)rooms.wide.data(), steps * F::vectors, count, whole, first, rooms);
    } else {
      run_some<F, T>(rows, x, at, steps, count, whole, first, rooms);
    }
    if (rooms.later.size() > behind) rooms.later.pop_back();
  }
}

// One adapter's part of a product: its rows, and its factors over each of the outputs that lie side by side.
static const int MEMBERS = 3;
struct Segment {
  int64_t ranks;            // of one member, filled up to a multiple of 16
  const char* a;            // all members' A, one after the other; null where the adapter has none here
  const char* b[MEMBERS];
  double scale[MEMBERS];
};

template <class T>
static void linear(const T* x, int64_t x_stride, const char* w, const float* scale, const T* bias, T* y, int64_t y_stride, int64_t rows, int64_t in,
                   int64_t out, int64_t onto, int64_t members, const int64_t* widths, int64_t segments, const Segment* found,
                   const int32_t* starts, const int32_t* of_rows, const float* weights) {
  typedef Factor<T> H;
  const int64_t steps = steps_of<Dense<T>>(in);
  H* room = (H*)kept_room(rows * widened<T>(in) * sizeof(H));
  const Rows<T> given(x, x_stride, rows, in, room);
  std::vector<const H*> xs(rows);
  std::vector<T*> ys(rows);
  for (int64_t r = 0; r < rows; r++) xs[r] = given.at + r * given.stride, ys[r] = y + r * y_stride;
  const Out<T> whole{ys.data(), scale, bias, out, onto != 0};
  // Low rank: where each segment's rank columns begin, and how many tasks come before it.
  std::vector<int64_t> column(segments + 1, 0), before(segments + 1, 0);
  for (int64_t j = 0; j < segments; j++) {
    int64_t ranks = found[j].a ? members * found[j].ranks : 0;
    column[j + 1] = column[j] + ranks * (starts[j + 1] - starts[j]);
    before[j + 1] = before[j] + (ranks / 16 + 1) / 2;
  }
  std::vector<H> h(column[segments] + 64);
  const int64_t few = segments ? before[segments] : 0;
#pragma omp parallel
  {
    std::vector<const H*> from;
    std::vector<H*> into;
    std::vector<T*> to;
    Rooms<T> rooms;
    // An adapter's A and Bs lie one behind the other, and are read when the weight has been.
    const int64_t threads = omp_get_num_threads(), me = omp_get_thread_num();
    for (int64_t j = segments; j-- > 0;) {
      if (!found[j].a) continue;
      int64_t lines = members * found[j].ranks / 16 * steps;
      for (int64_t m = 0; m < members; m++) lines += found[j].b[m] ? (widths[m] + 15) / 16 * steps_of<Dense<T>>(found[j].ranks) : 0;
      rooms.later.push_back({found[j].a + lines * me / threads * 64, found[j].a + lines * (me + 1) / threads * 64});
    }
    if (scale) {
      run_weight<Codes<T>>(rows, xs.data(), w, in, whole, rooms);
    } else {
      run_weight<Dense<T>>(rows, xs.data(), w, in, whole, rooms);
    }
#pragma omp barrier
    if (segments) {
#pragma omp for schedule(dynamic, 1)
      for (int64_t t = 0; t < few; t++) {
        int64_t j = std::upper_bound(before.begin(), before.end(), t) - before.begin() - 1;
        int64_t first = 2 * (t - before[j]), left = members * found[j].ranks / 16 - first, wide = members * found[j].ranks;
        const int32_t *row = of_rows + starts[j], some = starts[j + 1] - starts[j];
        const char* a = found[j].a + first * steps * 64;
        if (j + 2 < segments && found[j + 2].a) fetch(found[j + 2].a);
        from.resize(some), into.resize(some);
        for (int32_t i = 0; i < some; i++) from[i] = xs[row[i]], into[i] = h.data() + column[j] + i * wide + first * 16;
        const Out<H> part{into.data(), nullptr, nullptr, left * 16, false};
        if (left > 1) run_blocks<Dense<T>, T, H, 2>(some, from.data(), a, steps, part);
        else run_blocks<Dense<T>, T, H, 1>(some, from.data(), a, steps, part);
        for (int32_t i = 0; i < some; i++)
          for (int64_t b = 0; b < std::min<int64_t>(2, left); b++) {
            H* ranks = into[i] + b * 16;
            put(get(ranks) * all(float(weights[starts[j] + i] * found[j].scale[(first + b) * 16 / found[j].ranks])), ranks);
          }
      }
      // Each thread adds to outputs of its own, adapter after adapter, so that it reads each B in one piece.
      for (int64_t m = 0, first = 0; m < members; first += widths[m], m++) {
        int64_t pieces = (widths[m] + 31) / 32, begin = pieces * me / threads, end = pieces * (me + 1) / threads;
        for (int64_t j = 0; j < segments; j++) {
          if (!found[j].a || !found[j].b[m]) continue;
          if (j + 1 < segments && found[j + 1].b[m]) fetch(found[j + 1].b[m] + begin * 2 * steps_of<Dense<T>>(found[j + 1].ranks) * 64);
          const int32_t *row = of_rows + starts[j], some = starts[j + 1] - starts[j];
          int64_t wide = members * found[j].ranks, deep = steps_of<Dense<T>>(found[j].ranks);
          from.resize(some), to.resize(some);
          for (int32_t i = 0; i < some; i++) {
            from[i] = h.data() + column[j] + i * wide + m * found[j].ranks;
            to[i] = ys[row[i]] + first + begin * 32;
          }
          for (int64_t t = begin; t < end; t++) {
            const char* b = found[j].b[m] + t * 2 * deep * 64;
            const Out<T> part{to.data(), nullptr, nullptr, widths[m] - t * 32, true};
            if (part.width > 16) run_blocks<Dense<T>, T, T, 2>(some, from.data(), b, deep, part);
            else run_blocks<Dense<T>, T, T, 1>(some, from.data(), b, deep, part);
            for (int32_t i = 0; i < some; i++) to[i] += 32;
          }
        }
      }
    }
  }
}

// (out, in) row by row into blocks; what is beyond the edges is zero.
template <class F> static void pack(const typename F::Value* w, int64_t out, int64_t in, typename F::Value* to) {
  const int64_t steps = steps_of<F>(in), blocks = (out + 15) / 16, values = 16 * F::inputs;
#pragma omp parallel for
  for (int64_t b = 0; b < blocks; b++)
    for (int64_t s = 0; s < steps; s++)
      for (int64_t o = 0; o < 16; o++)
        for (int64_t i = 0; i < F::inputs; i++) {
          int64_t row = b * 16 + o, col = s * F::inputs + i;
          to[(b * steps + s) * values + F::place(o, i)] = row < out && col < in ? F::kept(w[row * in + col]) : typename F::Value{};
        }
}

// Some rows of what was packed, as they were.
template <class F> static void unpack(const typename F::Value* w, int64_t in, const int64_t* rows, int64_t count, typename F::Value* to) {
  const int64_t steps = steps_of<F>(in), values = 16 * F::inputs;
#pragma omp parallel for if (count > 16)
  for (int64_t r = 0; r < count; r++)
    for (int64_t i = 0; i < in; i++)
      to[r * in + i] = F::given(w[(rows[r] / 16 * steps + i / F::inputs) * values + F::place(rows[r] % 16, i % F::inputs)]);
}

// ---- between the products -------------------------------------------------------------------------------------------

template <class T> static void normed(const T* x, const float* weight, double eps, int64_t d, T* y) {
  Floats squares = none();
  for (int64_t i = 0; i < d; i += 16) squares = fma(get(x + i), get(x + i), squares);
  const Floats rho = all(float(1.0 / std::sqrt(double(sum(squares)) / double(d) + eps)));
  for (int64_t i = 0; i < d; i += 16) put(get(x + i) * rho * get(weight + i), y + i);
}

template <class T> static void rms_norm(const T* x, const float* weight, double eps, int64_t rows, int64_t d, T* y) {
#pragma omp parallel for if (rows > 4)
  for (int64_t r = 0; r < rows; r++) normed(x + r * d, weight, eps, d, y + r * d);
}

template <class T> static void turn(T* x, const float* cos, const float* sin, int64_t turned) {
  for (int64_t i = 0, half = turned / 2; i < half; i++) {
    float a = widen(x[i]), b = widen(x[i + half]);
    narrow(a * cos[i] + b * sin[i], x + i);
    narrow(b * cos[i + half] + a * sin[i + half], x + i + half);
  }
}

struct Heads {
  int64_t queries, keys, d, turned;
};

// Normed and turned in place; the new keys and values go to their slots.
template <class T>
static void rotary(T* qkv, const Heads& heads, const float* cos, const float* sin, const float* q_weight, const float* k_weight,
                   double eps, const int32_t* slots, const int32_t* positions, int64_t capacity, T* keys, T* values, int64_t rows) {
  const int64_t d = heads.d, width = (heads.queries + 2 * heads.keys) * d;
#pragma omp parallel for if (rows > 4)
  for (int64_t r = 0; r < rows; r++) {
    T* row = qkv + r * width;
    for (int64_t h = 0; h < heads.queries + heads.keys; h++) {
      const float* weight = h < heads.queries ? q_weight : k_weight;
      if (weight) normed(row + h * d, weight, eps, d, row + h * d);
      turn(row + h * d, cos + r * heads.turned, sin + r * heads.turned, heads.turned);
    }
    for (int64_t h = 0; h < heads.keys; h++) {
      int64_t to = ((int64_t(slots[r]) * heads.keys + h) * capacity + positions[r]) * d;
      std::memcpy(keys + to, row + (heads.queries + h) * d, d * sizeof(T));
      std::memcpy(values + to, row + (heads.queries + heads.keys + h) * d, d * sizeof(T));
    }
  }
}

INLINE Floats dot(const float* a, const float* b, int64_t d) {
  Floats sum = none();
  for (int64_t i = 0; i < d; i += 16) sum = fma(get(a + i), get(b + i), sum);
  return sum;
}
INLINE Floats dot(const bf16* a, const bf16* b, int64_t d) {
  Floats sum = none();
  int64_t i = 0;
#if defined(__AVX512BF16__)
  for (; i + 32 <= d; i += 32) sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_loadu_si512(a + i), (__m512bh)_mm512_loadu_si512(b + i));
#endif
  for (; i < d; i += 16) sum = fma(get(a + i), get(b + i), sum);
  return sum;
}

// softmax of one row of scores, in place, its end filled up with zeros.
static void softmax(float* scores, int64_t seen, int64_t wide, float scale, float softcap) {
  Floats peak = all(-INFINITY), total = none();
  for (int64_t t = 0; t < wide; t += 16) {
    const Floats some = where(between(t, 0, seen), bent(get(scores + t), scale, softcap), all(-INFINITY));
    put(some, scores + t);
    peak = max(peak, some);
  }
  const Floats highest = all(most(peak));
  for (int64_t t = 0; t < wide; t += 16) {
    const Floats e = exp16(get(scores + t) - highest);
    put(e, scores + t);
    total = total + e;
  }
  const Floats inverse = all(1 / sum(total));
  for (int64_t t = 0; t < wide; t += 16) put(get(scores + t) * inverse, scores + t);
}

// Probabilities times values, of G queries, so many dimensions at a time as there are registers for.
template <class T, int G>
static void weigh(const float* p, int64_t wide, const T* values, int64_t seen, int64_t d, Lines later, T* out) {
  const int K = R / 3;
  for (int64_t i = 0; i < d; i += 16 * K) {
    const int64_t n = std::min<int64_t>(K, (d - i) / 16);
    Floats sums[G][K];
    EACH(g, G) EACH(k, K) sums[g][k] = none();
    for (int64_t t = 0; t < seen; t++) {
      for (int64_t l = 0; l < d * int64_t(sizeof(T)) && later.at < later.end; l += 64, later.at += 64) __builtin_prefetch(later.at, 0, 2);
      EACH(k, K) {
        if (k == n) break;
        const Floats value = get(values + t * d + i + k * 16);
        EACH(g, G) sums[g][k] = fma(value, all(p[g * wide + t]), sums[g][k]);
      }
    }
    EACH(g, G) EACH(k, K) {
      if (k == n) break;
      put(sums[g][k], out + g * d + i + k * 16);
    }
  }
}

// One key head's queries of one row over the slot, up to the row's own position. Values are asked for while scores are made, and what is
// read later, the next keys, while values are summed.
template <class T>
static void attend_one(const T* q, int64_t group, int64_t d, const T* keys, const T* values, int64_t seen, float scale, float softcap,
                       Lines later, std::vector<float>& room, T* out) {
  const int64_t wide = (seen + 15) / 16 * 16;
  room.resize(group * wide);
  float* p = room.data();
  for (int64_t t = 0; t < wide; t += 16) {
    for (const char *v = (const char*)(values + t * d), *end = (const char*)(values + (t + 16) * d); v < end; v += 64) __builtin_prefetch(v, 0, 2);
    for (int64_t g = 0; g < group; g++) {
      Floats sums[16];
      EACH(i, 16) sums[i] = dot(keys + std::min(t + i, seen - 1) * d, q + g * d, d);
      put(sums_of_16(sums), p + g * wide + t);
    }
  }
  for (int64_t g = 0; g < group; g++) softmax(p + g * wide, seen, wide, scale, softcap);
  for (int64_t g = 0; g < group;) {
    switch (std::min<int64_t>(4, group - g)) {
      case 4: weigh<T, 4>(p + g * wide, wide, values, seen, d, later, out + g * d), g += 4; break;
      case 3: weigh<T, 3>(p + g * wide, wide, values, seen, d, later, out + g * d), g += 3; break;
      case 2: weigh<T, 2>(p + g * wide, wide, values, seen, d, later, out + g * d), g += 2; break;
      default: weigh<T, 1>(p + g * wide, wide, values, seen, d, later, out + g * d), g += 1;
    }
  }
}

// The first `few` rows one by one over what their slots hold; the others as the parts of prompts that they are, each with the rows of
// its slot laid out once for all of its own.
template <class T>
static void attention(const T* qkv, const Heads& heads, const T* keys, const T* values, const int32_t* slots, const int32_t* positions,
                      int64_t capacity, int64_t window, double scale, double softcap, T* out, int64_t rows, int64_t few) {
  const int64_t d = heads.d, group = heads.queries / heads.keys, width = (heads.queries + 2 * heads.keys) * d;
  const auto seen_by = [&](int64_t t) {
    const int64_t r = t / heads.keys, end = positions[r] + 1, first = window > 0 ? std::max<int64_t>(0, end - window) : 0;
    return Span{((int64_t(slots[r]) * heads.keys + t % heads.keys) * capacity + first) * d, end - first};
  };
#pragma omp parallel
  {
    std::vector<float> room;
#pragma omp for schedule(static)
    for (int64_t t = 0; t < few * heads.keys; t++) {
      const Span here = seen_by(t), next = seen_by(std::min(t + 1, few * heads.keys - 1));
      const int64_t r = t / heads.keys, h = t % heads.keys;
      attend_one(qkv + r * width + h * group * d, group, d, keys + here.start, values + here.start, here.length, float(scale), float(softcap),
                 {(const char*)(keys + next.start), (const char*)(keys + next.start + next.length * d)}, room,
                 out + (r * heads.queries + h * group) * d);
    }
  }
  std::vector<Span> spans;
  std::vector<int64_t> asking;
  for (int64_t r = few; r < rows; r++) {
    const int64_t start = int64_t(slots[r]) * heads.keys * capacity;
    if (spans.empty() || spans.back().start != start) spans.push_back({start, 0, 0, 0, r - few, 0});
    spans.back().queries++, spans.back().length = positions[r] + 1;
    asking.push_back(start + positions[r]);
  }
  const Attention<T> parts{qkv + few * width, keys, values, width, d, d, spans.data(), int64_t(spans.size()), asking.data(), rows - few, 0,
                           window, heads.queries, heads.keys, d, capacity * d, scale, softcap, nullptr};
  if (!spans.empty()) attention_forward(parts, out + few * heads.queries * d);
}

// f(gate) · up of rows that hold both side by side.
template <class T> static void gated(const T* both, int64_t gelu, int64_t rows, int64_t d, T* y) {
#pragma omp parallel for if (rows > 4)
  for (int64_t r = 0; r < rows; r++)
    for (int64_t i = 0; i < d; i += 16) put(activated(get(both + r * 2 * d + i), gelu) * get(both + r * 2 * d + d + i), y + r * d + i);
}

// ---- whole layers ---------------------------------------------------------------------------------------------------

struct NormWeight {
  const float* weight;  // null where the family has no such norm
  double eps;
};
struct Weight {
  const char* w;
  const float* scale;  // of each output where w is in eight bits, else null
  const void* bias;
  int64_t in, out, members, widths[MEMBERS];
};
struct Layer {
  NormWeight attention, q, k, attention_post, mlp, mlp_post;
  Weight qkv, o, gate_up, down;
  int64_t window;
  const float *cos, *sin;
};
struct Pass {
  Heads heads;
  int64_t rows, few, capacity, slots, gelu, segments;
  double scale, softcap;
  const int32_t *of_slots, *positions;
  const Segment* found;  // of each place, all segments
  const int32_t *starts, *of_rows;
  const float* weights;
  void *keys, *values;
};

template <class T> struct Run {
  const Pass& p;

  void product(const Weight& w, int64_t place, const T* x, T* y, bool onto) const {
    linear<T>(x, w.in, w.w, w.scale, (const T*)w.bias, y, w.out, p.rows, w.in, w.out, onto, w.members, w.widths, p.segments,
              p.found + place * p.segments, p.starts, p.of_rows, p.weights);
  }
  // A projection's output on top of the residual, normed before where the family does that.
  void add(const Weight& w, int64_t place, const T* from, const NormWeight& post, T* x, std::vector<T>& room) const {
    if (!post.weight) return product(w, place, from, x, true);
    room.resize(p.rows * w.out);
    product(w, place, from, room.data(), false);
    rms_norm(room.data(), post.weight, post.eps, p.rows, w.out, room.data());
    for (int64_t i = 0; i < p.rows * w.out; i++) narrow(widen(x[i]) + widen(room[i]), x + i);
  }

  void layers(const Layer* found, int64_t count, T* x) const {
    const Heads& h = p.heads;
    const int64_t inner = h.queries * h.d, stride = p.slots * h.keys * p.capacity * h.d;
    std::vector<T> n, qkv, attended(p.rows * inner), both, product_of(p.rows * found->down.in), room;
    for (int64_t i = 0; i < count; i++) {
      const Layer& l = found[i];
      T *keys = (T*)p.keys + i * stride, *values = (T*)p.values + i * stride;
      n.resize(p.rows * l.qkv.in), qkv.resize(p.rows * l.qkv.out), both.resize(p.rows * l.gate_up.out);
      rms_norm(x, l.attention.weight, l.attention.eps, p.rows, l.qkv.in, n.data());
      product(l.qkv, 4 * i, n.data(), qkv.data(), false);
      rotary(qkv.data(), h, l.cos, l.sin, l.q.weight, l.k.weight, l.q.eps, p.of_slots, p.positions, p.capacity, keys, values, p.rows);
      attention(qkv.data(), h, keys, values, p.of_slots, p.positions, p.capacity, l.window, p.scale, p.softcap, attended.data(), p.rows, p.few);
      add(l.o, 4 * i + 1, attended.data(), l.attention_post, x, room);
      rms_norm(x, l.mlp.weight, l.mlp.eps, p.rows, l.gate_up.in, n.data());
      product(l.gate_up, 4 * i + 2, n.data(), both.data(), false);
      gated(both.data(), p.gelu, p.rows, l.down.in, product_of.data());
      add(l.down, 4 * i + 3, product_of.data(), l.mlp_post, x, room);
    }
  }
};

// ---- the cuts of a distribution -------------------------------------------------------------------------------------

// The bits of a float that is not negative rise with its value: the first of them are its bin, 64 for each factor of two.
static const int BIN = 17, BINS = (0x3f800000 >> BIN) + 1;
INLINE int bin_of(float weight) {
  uint32_t bits;
  std::memcpy(&bits, &weight, 4);
  return std::min<int>(bits >> BIN, BINS - 1);
}

// The least of the fewest greatest weights whose amounts, 1 each or their values, reach what is wanted; and how many equal to it those have.
struct Least {
  float weight;
  int64_t equal;
};
static Least least_kept(const float* row, int64_t size, const std::vector<double>& amounts, double wanted, bool by_value,
                        std::vector<float>& inside) {
  int bin = BINS - 1;
  double before = 0;
  while (bin > 0 && before + amounts[bin] < wanted) before += amounts[bin--];
  inside.clear();
  for (int64_t i = 0; i < size; i++)
    if (bin_of(row[i]) == bin) inside.push_back(row[i]);
  std::sort(inside.begin(), inside.end(), std::greater<float>());
  Least found{inside.empty() ? 0 : inside[0], 0};
  for (float weight : inside) {
    if (before >= wanted) break;
    found = {weight, weight == found.weight ? found.equal + 1 : 1};
    before += by_value ? weight : 1;
  }
  return found;
}

static void cut_row(float* row, int64_t size, int64_t top_k, double top_p, std::vector<double>& amounts, std::vector<float>& inside) {
  if (top_k > 0 && top_k < size) {
    amounts.assign(BINS, 0);
    for (int64_t i = 0; i < size; i++) amounts[bin_of(row[i])] += 1;
    float least = least_kept(row, size, amounts, double(top_k) - 0.5, false, inside).weight;
    for (int64_t i = 0; i < size; i++) row[i] = row[i] < least ? 0 : row[i];
  }
  if (top_p < 1) {
    amounts.assign(BINS, 0);
    double total = 0;
    for (int64_t i = 0; i < size; i++) amounts[bin_of(row[i])] += row[i];
    for (int i = BINS - 1; i >= 0; i--) total += amounts[i];
    Least least = least_kept(row, size, amounts, total * top_p, true, inside);
    for (int64_t i = 0; i < size; i++) {
      if (row[i] == least.weight && least.equal-- <= 0) row[i] = 0;
      row[i] = row[i] < least.weight ? 0 : row[i];
    }
  }
}

extern "C" void cut(float* weights, int64_t rows, int64_t size, const int64_t* top_k, const double* top_p) {
#pragma omp parallel
  {
    std::vector<double> amounts;
    std::vector<float> inside;
#pragma omp for schedule(dynamic, 1)
    for (int64_t r = 0; r < rows; r++) cut_row(weights + r * size, size, top_k[r], top_p[r], amounts, inside);
  }
}

// ---- the doors ------------------------------------------------------------------------------------------------------

#define DOORS(T, name)                                                                                                             \
  extern "C" void pack_##name(const T* w, int64_t out, int64_t in, T* to) { pack<Dense<T>>(w, out, in, to); }                      \
  extern "C" void unpack_##name(const T* w, int64_t in, const int64_t* rows, int64_t count, T* to) {                               \
    unpack<Dense<T>>(w, in, rows, count, to);                                                                                      \
  }                                                                                                                                \
  extern "C" void pack_codes_##name(const int8_t* w, int64_t out, int64_t in, int8_t* to) { pack<Codes<T>>(w, out, in, to); }      \
  extern "C" void unpack_codes_##name(const int8_t* w, int64_t in, const int64_t* rows, int64_t count, int8_t* to) {               \
    unpack<Codes<T>>(w, in, rows, count, to);                                                                                      \
  }                                                                                                                                \
  extern "C" void linear_##name(const T* x, int64_t x_stride, const char* w, const float* scale, const T* bias, T* y,              \
                                int64_t y_stride, int64_t rows, int64_t in, int64_t out, int64_t onto, int64_t members,            \
                                const int64_t* widths, int64_t segments, const Segment* found, const int32_t* starts,              \
                                const int32_t* of_rows, const float* weights) {                                                    \
    linear(x, x_stride, w, scale, bias, y, y_stride, rows, in, out, onto, members, widths, segments, found, starts, of_rows, weights);\
  }                                                                                                                                \
  extern "C" void rms_norm_##name(const T* x, const float* weight, double eps, int64_t rows, int64_t d, T* y) {                    \
    rms_norm(x, weight, eps, rows, d, y);                                                                                          \
  }                                                                                                                                \
  extern "C" void rotary_##name(T* qkv, const Heads* heads, const float* cos, const float* sin, const float* q, const float* k,    \
                                double eps, const int32_t* slots, const int32_t* positions, int64_t capacity, T* keys, T* values,  \
                                int64_t rows) {                                                                                    \
    rotary(qkv, *heads, cos, sin, q, k, eps, slots, positions, capacity, keys, values, rows);                                      \
  }                                                                                                                                \
  extern "C" void attention_##name(const T* qkv, const Heads* heads, const T* keys, const T* values, const int32_t* slots,         \
                                   const int32_t* positions, int64_t capacity, int64_t window, double scale, double softcap,       \
                                   T* out, int64_t rows, int64_t few) {                                                            \
    attention(qkv, *heads, keys, values, slots, positions, capacity, window, scale, softcap, out, rows, few);                      \
  }                                                                                                                                \
  extern "C" void layers_##name(const Layer* found, int64_t count, const Pass* pass, T* x) { Run<T>{*pass}.layers(found, count, x); } \
  extern "C" void gated_##name(const T* both, int64_t gelu, int64_t rows, int64_t d, T* y) {                                       \
    gated(both, gelu, rows, d, y);                                                                                           \
  }

DOORS(float, float32)
DOORS(bf16, bfloat16)
