#include "select.h"
#include "../common/mask_cpu.h"
#include "../common/shuffle_cpu.h"

namespace dither::DITHER_ISA {
// In a block of keys, lane l of vector j is element j of group l.

template <class V>
static INLINE V low(V a, V b) {
  return shuffle(a, b, [](int i) { return i / 2 + i % 2 * kLanes<V>; });
}
template <class V>
static INLINE V high(V a, V b) {
  return shuffle(a, b, [](int i) { return i / 2 + i % 2 * kLanes<V> + kLanes<V> / 2; });
}

// The way back.
template <int M, class V>
static INLINE void transpose_back(V (&x)[M]) {
#pragma GCC unroll 5
  for (int step = 1; step < M; step *= 2) {
    V y[M];
#pragma GCC unroll 16
    for (int p = 0; p < M / 2; ++p) {
      y[2 * p] = low(x[p], x[M / 2 + p]);
      y[2 * p + 1] = high(x[p], x[M / 2 + p]);
    }
#pragma GCC unroll 32
    for (int p = 0; p < M; ++p) x[p] = y[p];
  }
}

// Batcher's odd-even merge sort (1968), descending.
template <class V>
static INLINE void order(V& a, V& b) {
  const V most = a > b ? a : b;
  b = a > b ? b : a;
  a = most;
}
template <int kFirst, int kCount, int kApart, class V>
static INLINE void merge(V* x) {
  if constexpr (2 * kApart < kCount) {
    merge<kFirst, kCount, 2 * kApart>(x);
    merge<kFirst + kApart, kCount, 2 * kApart>(x);
#pragma GCC unroll 16
    for (int i = kFirst + kApart; i + kApart < kFirst + kCount; i += 2 * kApart) order(x[i], x[i + kApart]);
  } else {
    order(x[kFirst], x[kFirst + kApart]);
  }
}
template <int kFirst, int kCount, class V>
static INLINE void sort(V* x) {
  if constexpr (kCount > 1) {
    sort<kFirst, kCount / 2>(x);
    sort<kFirst + kCount / 2, kCount / 2>(x);
    merge<kFirst, kCount, 1>(x);
  }
}

// The order of magnitudes, of elements in their stored bits.
template <class S, class V>
static INLINE V magnitudes(V bits) {
  using Key = decltype(magnitude(S{}));
  constexpr Key rest = Key(~(uint64_t(1) << (8 * sizeof(Key) - 1))), nan = Key(kNan<S>);
  const V key = bits & rest;
  return key <= nan ? key : V{} + nan;  // gcc makes a minimum of <=, not of <
}

// Keys become -1 where kept, else 0.
template <class Key, int M>
static INLINE void choose(Vector<Key> (&key)[M], int n) {
  using V = Vector<Key>;
  if constexpr (M == 4) {  // all with all
    V behind[M];           // how many, as a negative number
#pragma GCC unroll 4
    for (int j = 0; j < M; ++j) behind[j] = V{} - Key(j);
#pragma GCC unroll 4
    for (int j = 0; j < M; ++j)
#pragma GCC unroll 4
      for (int k = j + 1; k < M; ++k) {
        const V first = key[j] >= key[k];
        behind[j] += first;
        behind[k] -= first;
      }
#pragma GCC unroll 4
    for (int j = 0; j < M; ++j) key[j] = behind[j] <= Key(n - M);
    return;
  }
  V sorted[M];
#pragma GCC unroll 32
  for (int j = 0; j < M; ++j) sorted[j] = key[j];
  sort<0, M>(sorted);
  V memory[M];  // read at an index known at run time only
#pragma GCC unroll 32
  for (int j = 0; j < M; ++j) memory[j] = sorted[j];
  const V least = memory[n - 1];  // of those kept
  if (n == M || !any_bit(V(memory[n] == least))) {
#pragma GCC unroll 32
    for (int j = 0; j < M; ++j) key[j] = key[j] >= least;
  } else {  // of those equal to the least, only the first few
    V left = V{} + Key(n);
    V above[M];
#pragma GCC unroll 32
    for (int j = 0; j < M; ++j) {
      above[j] = key[j] > least;
      left += above[j];
    }
#pragma GCC unroll 32
    for (int j = 0; j < M; ++j) {
      const V take = (key[j] == least) & (left > 0);
      left += take;
      key[j] = above[j] | take;
    }
  }
}
template <class Key, int M>
__attribute__((noinline)) static void choose_in_memory(Key* key, int64_t pitch, int n, int) {
  Vector<Key> v[M];
#pragma GCC unroll 32
  for (int j = 0; j < M; ++j) __builtin_memcpy(&v[j], key + j * pitch, sizeof v[j]);
  choose<Key, M>(v, n);
#pragma GCC unroll 32
  for (int j = 0; j < M; ++j) __builtin_memcpy(key + j * pitch, &v[j], sizeof v[j]);
}
// Any m: how many come before, of all.
template <class Key>
static void choose_of_any(Key* key, int64_t pitch, int n, int m) {
  using V = Vector<Key>;
  V x[kMostGroup];
  for (int j = 0; j < m; ++j) __builtin_memcpy(&x[j], key + j * pitch, sizeof x[j]);
  for (int j = 0; j < m; ++j) {
    V rank{};
    for (int k = 0; k < j; ++k) rank -= x[k] >= x[j];
    for (int k = j + 1; k < m; ++k) rank -= x[k] > x[j];
    const V kept = rank < Key(n);
    __builtin_memcpy(key + j * pitch, &kept, sizeof kept);
  }
}
template <class Key>
using Choose = void (*)(Key*, int64_t, int, int);
template <class Key>
static Choose<Key> chooser(int m) {
  return m == 4    ? choose_in_memory<Key, 4>
         : m == 8  ? choose_in_memory<Key, 8>
         : m == 16 ? choose_in_memory<Key, 16>
         : m == 32 ? choose_in_memory<Key, 32>
                   : choose_of_any<Key>;
}

// Keys of scores: w, or |w| times its factor.
template <class Key, class S, class T>
static INLINE Key key_of(S x, const T* factor) {
  if constexpr (sizeof(Key) == 2) return magnitude(x);
  else return magnitude(factor ? T(widen(x) * *factor) : T(widen(x)));
}

template <class S>
static INLINE S other(S x, decltype(widen(S{}) + 0) beta) {
  S y;
  narrow(beta * widen(x), y);
  return y;
}
// The same, of a vector of elements in their stored bits.
template <class S, class V, class T>
static INLINE V others(V bits, T beta) {
  if constexpr (sizeof(S) == sizeof(T)) {
    using Numbers __attribute__((vector_size(sizeof(V)))) = T;
    return V(Numbers(bits) * beta);
  } else if constexpr (__is_same(S, bfloat16)) {  // as halves of words; a NaN has no low bits that could round it up
    using Words __attribute__((vector_size(sizeof(V)))) = uint32_t;
    using Numbers __attribute__((vector_size(sizeof(V)))) = float;
    const auto round = [&](Words x) __attribute__((always_inline)) {
      const Words y = Words(Numbers(x) * beta);
      return y + (y >> 16 & 1) + 0x7fff;
    };
    const Words x = Words(bits);
    return V(round(x << 16) >> 16 | (round(x & 0xffff0000u) & 0xffff0000u));
  } else {
    V y;
#if defined(__AVX512DQ__)  // with masks of ones: the plain intrinsics of gcc 12 warn
    const auto half = [&](__m256i x) __attribute__((always_inline)) {
      return _mm512_maskz_cvtps_ph(-1, _mm512_maskz_cvtph_ps(-1, x) * beta, _MM_FROUND_TO_NEAREST_INT);
    };
    const __m512i x = (__m512i)bits;
    const __m256i low = half(_mm512_maskz_extracti64x4_epi64(-1, x, 0)), high = half(_mm512_maskz_extracti64x4_epi64(-1, x, 1));
    y = (V)_mm512_maskz_inserti64x4(-1, _mm512_castsi256_si512(low), high, 1);
#elif defined(__F16C__)
    const auto half = [&](__m128i x) __attribute__((always_inline)) {
      return _mm256_cvtps_ph(_mm256_cvtph_ps(x) * beta, _MM_FROUND_TO_NEAREST_INT);
    };
    const __m256i x = (__m256i)bits;
    y = (V)_mm256_set_m128i(half(_mm256_extracti128_si256(x, 1)), half(_mm256_castsi256_si128(x)));
#else
    S x[kLanes<V>], rounded[kLanes<V>];
    __builtin_memcpy(x, &bits, sizeof x);
#pragma GCC unroll 1
    for (int l = 0; l < kLanes<V>; ++l) rounded[l] = other(x[l], beta);
    __builtin_memcpy(&y, rounded, sizeof y);
#endif
    return (y & 0x7fff) > 0x7c00 ? (y & ~V{} << 15) | 0x7e00 : y;  // the processor keeps payloads, narrow() does not
  }
}

// A vector of out, at element i.
template <class S, class V, class T>
static INLINE void store_chosen(const Select& s, int64_t i, V kept, T beta, bool streams) {
  V from, pruned{};
  __builtin_memcpy(&from, static_cast<const S*>(s.w) + i, sizeof from);
  if (beta != T(0)) pruned = others<S>(from, beta);
  const V y = kept ? from : pruned;
  if (streams) stream(static_cast<S*>(s.out) + i, y);
  else __builtin_memcpy(static_cast<S*>(s.out) + i, &y, sizeof y);
}

// A run of memory; kept: bytes 0 and 1.
template <class S>
static void emit_out(const Select& s, int64_t start, int64_t count, const uint8_t* __restrict kept) {
  using T = decltype(widen(S{}) + 0);
  using Key = decltype(magnitude(S{}));
  constexpr int L = Lanes<Key>::count, kBlock = 64;
  const T beta = T(s.beta);
  const S* const w = static_cast<const S*>(s.w) + start;
  S* const out = static_cast<S*>(s.out) + start;
  const auto some = [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) out[i] = kept[i] ? w[i] : beta == T(0) ? S{} : other(w[i], beta);
  };
  int64_t i = s.stream_out ? smaller<int64_t>(count, -start & (64 / sizeof(S) - 1)) : 0;
  some(0, i);
  for (; i + kBlock <= count; i += kBlock) {
    alignas(64) Key lane[kBlock];
    for (int l = 0; l < kBlock; ++l) lane[l] = Key(-kept[i + l]);
#pragma GCC unroll 2
    for (int l = 0; l < kBlock; l += L) {
      Vector<Key> v;
      __builtin_memcpy(&v, lane + l, sizeof v);
      store_chosen<S>(s, start + i + l, v, beta, s.stream_out);
    }
  }
  some(i, count);
}
// kept has margins of 8 zeros on both sides.
static void emit_mask(const Select& s, int64_t start, int64_t count, const uint8_t* kept) {
  if (s.keep) __builtin_memcpy(s.keep + start, kept, uint64_t(count));
  if (s.bits) store_bits(s.bits, start, count, kept);
}

constexpr int64_t kMargin = 64;

// Groups of consecutive elements, in registers from the load to the store. Whole blocks of L groups; the rest is for `panels`.
template <int M, class S>
static int64_t blocks_of_rows(const Select& s, int64_t first, int64_t panels) {
  using Key = decltype(magnitude(S{}));
  using V = Vector<Key>;
  using T = decltype(widen(S{}) + 0);
  constexpr int L = Lanes<Key>::count;
  const T beta = T(s.beta);
  int64_t at = 0;
  for (; at + L <= panels; at += L) {
    const int64_t start = (first + at) * M;
    const S* const x = static_cast<const S*>(s.w) + start;
    V v[M];
    if constexpr (M > 8)  // so many instructions that the processor does not look ahead to the next block
#pragma GCC unroll 32
      for (int p = 0; p < M; ++p) __builtin_prefetch(x + (M + p) * L);
#pragma GCC unroll 32
    for (int p = 0; p < M; ++p) {
      V bits;
      __builtin_memcpy(&bits, x + p * L, sizeof bits);
      v[p] = magnitudes<S>(bits);
    }
    transpose<M>(v);
    choose<Key, M>(v, s.n);
    transpose_back<M>(v);
    if (s.bits || s.keep) {
      uint8_t bits[M * L / 8];
      store_lanes(bits, v);
      if (s.bits) __builtin_memcpy(s.bits + start / 8, bits, sizeof bits);
      if (s.keep) load_bits(bits, M * L, s.keep + start);
    }
    if (s.out)
#pragma GCC unroll 32
      for (int p = 0; p < M; ++p) store_chosen<S>(s, start + p * L, v[p], beta, s.stream_out);
  }
  return at;
}

template <class S>
static int64_t rows_done(const Select& s, int64_t first, int64_t panels) {
  return s.m == 4    ? blocks_of_rows<4, S>(s, first, panels)
         : s.m == 8  ? blocks_of_rows<8, S>(s, first, panels)
         : s.m == 16 ? blocks_of_rows<16, S>(s, first, panels)
                     : blocks_of_rows<32, S>(s, first, panels);
}
// Groups of consecutive elements by their scores, which are weights of another tensor.
template <class S>
static void tile_of_scores(const Select& s, int64_t first, int64_t panels) {
  using T = decltype(widen(S{}) + 0);
  constexpr int64_t spare = 32 * 64;  // for whole blocks of groups
  alignas(64) T score[2 * kTile + spare];
  uint8_t bits[(2 * kTile + spare) / 8];
  alignas(64) uint8_t kept[2 * kTile + 8];
  constexpr int L = Lanes<decltype(magnitude(T{}))>::count;
  const int64_t start = first * s.m, count = panels * s.m, row = s.groups * s.m, padded = (panels + L - 1) / L * L;
  const S* const w = static_cast<const S*>(s.w) + start;
  for (int64_t i = 0; i < count;) {
    const int64_t column = (start + i) % row, run = smaller(row - column, count - i);
    const T* __restrict factor = static_cast<const T*>(s.factor) + column;
    const S* __restrict x = w + i;
    for (int64_t k = 0; k < run; ++k) score[i + k] = absolute(T(widen(x[k]))) * factor[k];
    i += run;
  }
  for (int64_t i = count; i < padded * s.m; ++i) score[i] = T(0);
  Select of_scores = s;
  of_scores.w = score;
  of_scores.bits = bits;
  of_scores.out = nullptr;
  of_scores.keep = nullptr;
  rows_done<T>(of_scores, 0, padded);
  if (s.out || s.keep) load_bits(bits, count, kept);
  if (s.out) emit_out<S>(s, start, count, kept);
  if (s.keep) __builtin_memcpy(s.keep + start, kept, uint64_t(count));
  if (s.bits) {
    __builtin_memcpy(s.bits + start / 8, bits, uint64_t(count / 8));
    if (count % 8) s.bits[(start + count) / 8] = bits[count / 8] & 0xf;  // four at the end of all
  }
}

// body(start, lane, q, j) for each chunk of each row of [panels][m][inner]: first the last chunk of every row, which reaches
// into the rows that follow, and of one position the first row first.
template <int kChunk, class Body>
static INLINE void for_each_chunk(int64_t panels, int64_t m, int64_t inner, const Body& body) {
  for (int64_t i = (inner - 1) / kChunk * kChunk; i >= 0; i -= kChunk)
    for (int64_t q = 0, row = 0; q < panels; ++q)
      for (int64_t j = 0; j < m; ++j, ++row) body(row * inner + i, q * inner + i, q, j);
}

// Whole panels, small enough for a tile: groups across rows of `inner` elements. Rows are moved in chunks that reach beyond
// them, into what the next row overwrites.
template <class Key, class S>
static void tile_of_panels(const Select& s, int64_t first, int64_t panels) {
  using T = decltype(widen(S{}) + 0);
  constexpr int L = Lanes<Key>::count, kBytes = 16;
  constexpr int64_t size = 2 * kTile + kMostGroup * 2 * L + kBytes;
  alignas(64) Key key[size];  // [m][panels][inner], rows padded to whole chunks and one more
  alignas(64) uint8_t lane[size], buffer[2 * kTile + 2 * kMargin];
  uint8_t* const kept = buffer + kMargin;
  const int64_t inner = s.inner, m = s.m, lanes = panels * inner, pitch = (lanes + 2 * L - 1) / L * L, count = lanes * m;
  const int64_t start = first * m * inner;
  const S* const w = static_cast<const S*>(s.w) + start;
  const T* const factor = static_cast<const T*>(s.factor);
  for (int64_t j = 0; j < m; ++j) __builtin_memset(key + j * pitch + pitch - 2 * L, 0, 2 * L * sizeof(Key));
  const auto fill = [&](const auto& keys) __attribute__((always_inline)) {
    for_each_chunk<L>(panels, m, inner, [&](int64_t from, int64_t to, int64_t q, int64_t j) __attribute__((always_inline)) {
      const S* x = w + from;
      S last[L];
      if (from + L > count) {
        for (int64_t l = 0; l < L; ++l) last[l] = from + l < count ? x[l] : S{};
        x = last;
      }
      keys(key + j * pitch + to, x, q, j);
    });
  };
  if (factor)
    fill([&](Key* to, const S* x, int64_t q, int64_t j) __attribute__((always_inline)) {
      const T f = factor[(first + q) % s.groups * m + j];
      for (int l = 0; l < L; ++l) to[l] = key_of<Key>(x[l], &f);
    });
  else if constexpr (sizeof(Key) == sizeof(S))
    fill([&](Key* to, const S* x, int64_t, int64_t) __attribute__((always_inline)) {
      Vector<Key> v;
      __builtin_memcpy(&v, x, sizeof v);
      v = magnitudes<S>(v);
      __builtin_memcpy(to, &v, sizeof v);
    });
  const auto choose = chooser<Key>(s.m);
  for (int64_t at = 0; at < lanes; at += L) {
    for (int64_t j = 0; j < m; ++j) {  // the next tile, and where this one goes
      const int64_t line = at * m + j * L;
      __builtin_prefetch(w + count + line);
      if (s.out) __builtin_prefetch(static_cast<S*>(s.out) + start + line, 1);
    }
    choose(key + at, pitch, s.n, s.m);
  }
  for (int64_t i = 0; i < m * pitch; ++i) lane[i] = uint8_t(key[i] & 1);
  for_each_chunk<kBytes>(panels, m, inner, [&](int64_t to, int64_t from, int64_t, int64_t j) __attribute__((always_inline)) {
    __builtin_memcpy(kept + to, lane + j * pitch + from, kBytes);
  });
  __builtin_memset(kept - 8, 0, 8);
  __builtin_memset(kept + count, 0, 8);
  if (s.out) emit_out<S>(s, start, count, kept);
  emit_mask(s, start, count, kept);
}

// Some lanes of one panel.
template <class Key, class S>
static void tile_of_lanes(const Select& s, int64_t panel, int64_t lane, int64_t lanes) {
  using T = decltype(widen(S{}) + 0);
  constexpr int L = Lanes<Key>::count;
  alignas(64) Key key[kMostGroup * L];
  alignas(64) uint8_t buffer[2 * kTile + kMostGroup * 2 * kMargin];
  const int64_t start = panel * s.m * s.inner + lane, pitch = tile_lanes(s.m) + 2 * kMargin;
  const S* const w = static_cast<const S*>(s.w) + start;
  const T* const factor = s.factor ? static_cast<const T*>(s.factor) + panel % s.groups * s.m : nullptr;
  const T beta = T(s.beta);
  const auto choose = chooser<Key>(s.m);
  constexpr bool direct = sizeof(Key) == sizeof(S);  // whole vectors of out are written here
  const bool streams = s.stream_out && s.inner * sizeof(S) % 64 == 0;
  for (int64_t at = 0; at < lanes; at += L) {
    const int64_t here = smaller<int64_t>(L, lanes - at);
    for (int64_t j = 0; j < s.m; ++j) {
      const S* x = w + j * s.inner + at;
      S last[L] = {};
      if (here < L) {
        for (int64_t l = 0; l < here; ++l) last[l] = x[l];
        x = last;
      }
      if (factor)
        for (int64_t l = 0; l < L; ++l) key[j * L + l] = key_of<Key>(x[l], factor + j);
      else
        for (int64_t l = 0; l < L; ++l) key[j * L + l] = key_of<Key, S, T>(x[l], nullptr);
    }
    choose(key, L, s.n, s.m);
    if constexpr (direct)
      if (s.out && here == L)
        for (int64_t j = 0; j < s.m; ++j) {
          Vector<Key> kept;
          __builtin_memcpy(&kept, key + j * L, sizeof kept);
          store_chosen<S>(s, start + j * s.inner + at, kept, beta, streams);
        }
    if (s.bits || s.keep || here < L || !direct)
      for (int64_t j = 0; j < s.m; ++j)
        for (int64_t l = 0; l < L; ++l) buffer[j * pitch + kMargin + at + l] = uint8_t(key[j * L + l] & 1);
  }
  const int64_t done = direct ? lanes / L * L : 0;
  for (int64_t j = 0; j < s.m; ++j) {
    uint8_t* const kept = buffer + j * pitch + kMargin;
    __builtin_memset(kept - 8, 0, 8);
    __builtin_memset(kept + lanes, 0, 8);
    const int64_t row = start + j * s.inner;
    if (s.out) emit_out<S>(s, row + done, lanes - done, kept + done);
    emit_mask(s, row, lanes, kept);
  }
}

template <class Key, class S>
static void run_units(const Select& s, int64_t lo, int64_t hi) {
  if (in_parts(s.inner, s.m)) {
    const int64_t each = tile_lanes(s.m), parts = (s.inner + each - 1) / each;
    for (int64_t u = lo; u < hi; ++u) {
      const int64_t lane = u % parts * each;
      tile_of_lanes<Key, S>(s, u / parts, lane, smaller(each, s.inner - lane));
    }
    return;
  }
  const int64_t each = panels_of_a_tile(s.inner, s.m);
  for (int64_t u = lo; u < hi; ++u) {
    int64_t first = u * each, panels = smaller(each, s.panels - first);
    if (s.inner == 1 && s.factor && has_own_kernel(s.m)) {
      tile_of_scores<S>(s, first, panels);
      continue;
    }
    if constexpr (sizeof(Key) == sizeof(S))
      if (s.inner == 1 && !s.factor && has_own_kernel(s.m)) {
        const int64_t done = rows_done<S>(s, first, panels);
        first += done;
        panels -= done;
      }
    if (panels) tile_of_panels<Key, S>(s, first, panels);
  }
}

void select_units(const Select& s, int64_t lo, int64_t hi) {
  with_type(s.type, [&]<class S>(S) {
    if constexpr (sizeof(S) > 2) run_units<decltype(magnitude(S{})), S>(s, lo, hi);
    else s.factor ? run_units<int32_t, S>(s, lo, hi) : run_units<int16_t, S>(s, lo, hi);
  });
}

void blend_range(const Blend& x, int64_t lo, int64_t hi) {
  with_type(x.type, [&]<class S>(S) {
    using T = decltype(widen(S{}) + 0);
    const T scale = T(x.scale), lamb = T(x.lamb);
    constexpr int64_t block = 256;
    alignas(64) uint8_t kept[block];
    alignas(64) S line[block];
    for (int64_t at = lo; at < hi; at += block) {
      const int64_t n = smaller(block, hi - at);
      const bool streams = x.stream_out && n == block;
      load_bits(x.bits + at / 8, n, kept);
      const S *a = static_cast<const S*>(x.a) + at, *b = x.b ? static_cast<const S*>(x.b) + at : nullptr;
      S* out = streams ? line : static_cast<S*>(x.out) + at;
      const auto run = [&]<bool kScale, bool kAdd>() __attribute__((always_inline)) {
#pragma GCC ivdep
        for (int64_t i = 0; i < n; ++i) {
          T y = kScale ? scale * widen(a[i]) : T(0);
          if constexpr (kAdd) y = y + lamb * widen(b[i]);
          S rounded;
          narrow(y, rounded);
          out[i] = pick(kept[i], a[i], rounded);
        }
      };
      if (scale == T(0)) b ? run.template operator()<false, true>() : run.template operator()<false, false>();
      else b ? run.template operator()<true, true>() : run.template operator()<true, false>();
      if (streams) stream_lines(static_cast<S*>(x.out) + at, line, int64_t(block * sizeof(S)));
    }
  });
}
}  // namespace dither::DITHER_ISA
