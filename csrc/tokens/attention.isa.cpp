#include "attention.h"
#include "tiles_cpu.h"

namespace dither::DITHER_ISA {
template <bool kWide>
struct WordOf {
  using type = uint32_t;
};
template <>
struct WordOf<true> {
  using type = uint64_t;
};
template <class T>
using Word = typename WordOf<sizeof(T) == 8>::type;
template <class T>
using Words = typename Lanes<Word<T>>::type;
template <class T>
constexpr int kFold = kFoldBytes / sizeof(T);
constexpr int R = DITHER_VECTOR_BYTES == 64 ? 12 : 6, C = 2;  // rows and vectors whose sums fit the registers
static_assert(kStrip % R == 0 && kPanelVectors % C == 0 && kPanel<char> == kPanelBytes);

template <class T>
static INLINE Vector<T> power(Vector<T> x) {  // power_of_2, to the bit
#if defined(__AVX512F__)
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  if constexpr (sizeof(T) == 8) {
    const auto normal = _mm512_cmp_pd_mask(__m512d(x), _mm512_set1_pd(kLeastPower<T>), _CMP_NLT_UQ);
    const __m512d y = _mm512_maskz_min_pd(normal, _mm512_set1_pd(kMostPower<T>), __m512d(x));  // NaN stays
    const __m512d n = _mm512_maskz_roundscale_pd(normal, y, kNearest);
    return Vector<T>(_mm512_maskz_scalef_pd(normal, __m512d(power_near_1<T>(Vector<T>(y - n))), n));
  } else {
    const auto normal = _mm512_cmp_ps_mask(__m512(x), _mm512_set1_ps(kLeastPower<T>), _CMP_NLT_UQ);
    const __m512 y = _mm512_maskz_min_ps(normal, _mm512_set1_ps(kMostPower<T>), __m512(x));
    const __m512 n = _mm512_maskz_roundscale_ps(normal, y, kNearest);
    return Vector<T>(_mm512_maskz_scalef_ps(normal, __m512(power_near_1<T>(Vector<T>(y - n))), n));
  }
#else
  return power_of_2<T, Words<T>>(x);
#endif
}

// `count` rows of `dim` numbers as [dim][pitch], a column each; zeros in the other ones of `width` columns, a multiple of 16.
template <class T, class S>
static void pack(const S* from, int64_t stride, int64_t count, int64_t dim, T* to, int64_t width, int64_t pitch) {
  constexpr int L = Lanes<T>::count;
  for (int64_t row = 0; row < width; row += L)
    for (int64_t c = 0; c < dim; c += L) {
      const int64_t part = smaller<int64_t>(L, dim - c);
      Vector<T> x[L];
#pragma GCC unroll 16
      for (int r = 0; r < L; ++r) {
        T wide[L] = {};
        if (row + r < count) {
          const S* line = from + (row + r) * stride + c;
          if (part == L)
            for (int k = 0; k < L; ++k) wide[k] = widen(line[k]);
          else
            for (int k = 0; k < part; ++k) wide[k] = widen(line[k]);
        }
        x[r] = load(wide);
      }
      transpose(x);
      for (int k = 0; k < part; ++k) store(to + (c + k) * pitch + row, x[k]);
    }
}

// Scores of a strip of queries, [dim][kStripPitch], and a panel of keys: to[query * pitch + key]. Inlined, it would not get the
// registers that it needs.
template <class T>
static __attribute__((noinline)) void scores(const T* q, const T* k, int64_t dim, T scale, T* to, int64_t pitch) {
  constexpr int L = Lanes<T>::count;
  for (int64_t row = 0; row < kStrip; row += R)
    for (int64_t column = 0; column < kPanel<T>; column += C * L) {
      Vector<T> sum[R][C];
      tile_products<T>(q + row, 1, kStripPitch, k + column, dim, sum, [](auto a, auto b, auto c) { return a * b + c; });
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int c = 0; c < C; ++c) store(to + (row + r) * pitch + column + c * L, sum[r][c] * scale);
    }
}

// A head, and its queries from `first` on.
struct Place {
  int64_t b, h, first;
};
// -inf as the scores of pairs that take no part, keys lo .. hi.
template <class T>
static void hide(const Attention& a, const Place& at, int64_t row, int64_t lo, int64_t hi, T* scores) {
  const int64_t i = at.first + row;
  constexpr T none = T(-__builtin_inf());
  int64_t end = a.causal ? smaller(a.keys, i + 1) : a.keys;
  end = larger(lo, smaller(hi, end));
  if (a.mask) {
    const uint8_t* mask = a.mask + a.mask_at.at(at.b, at.h, i);
    const auto pick = [&](int64_t j, bool part) {  // no branch, which a random mask would mislead
      const Word<T> keep = Word<T>(0) - Word<T>(part);
      scores[j - lo] = bit_as<T>((bit_as<Word<T>>(scores[j - lo]) & keep) | (bit_as<Word<T>>(none) & ~keep));
    };
    int64_t j = lo;
    if (a.mask_column == 1)
      for (; j + kFold<T> <= end; j += kFold<T>)
        for (int64_t l = j; l < j + kFold<T>; ++l) pick(l, mask[l]);
    for (; j < end; ++j) pick(j, mask[j * a.mask_column]);
  }
  for (int64_t j = end; j < hi; ++j) scores[j - lo] = none;
}

// Lane by lane, then the lanes of one vector by halves.
template <int kHalf, class V, class Fold>
static INLINE V fold_lanes(V v, const Fold& join) {
  if constexpr (kHalf == 0) return v;
  else return fold_lanes<kHalf / 2>(join(v, shuffle(v, v, [](int i) { return i + kHalf; })), join);
}
template <class T, int kParts, class Fold>
static INLINE T fold(Vector<T> (&parts)[kParts], const Fold& join) {
#pragma GCC unroll 3
  for (int half = kParts / 2; half > 0; half /= 2)
#pragma GCC unroll 4
    for (int p = 0; p < half; ++p) parts[p] = join(parts[p], parts[p + half]);
  return fold_lanes<Lanes<T>::count / 2>(parts[0], join)[0];
}

// n scores, whole panels, become powers of 2, the largest of them 1; their sum, and what was taken from each.
template <class T>
static void exponentials(T* x, int64_t n, T& sum, T& most) {
  constexpr int L = Lanes<T>::count, kParts = kFold<T> / L, kHighs = kPanel<T> / L;
  constexpr T none = T(-__builtin_inf());
  const auto larger_of = [](auto a, auto b) { return a > b ? a : b; };
  Vector<T> high[kHighs], total[kParts] = {};
  for (int p = 0; p < kHighs; ++p) high[p] = Vector<T>{} + none;
  for (int64_t j = 0; j < n; j += kPanel<T>)
#pragma GCC unroll 8
    for (int p = 0; p < kHighs; ++p) high[p] = larger_of(load(x + j + p * L), high[p]);
  most = fold<T>(high, larger_of);
  const T base = most == none ? T(0) : most;
  for (int64_t j = 0; j < n; j += kFold<T>)
#pragma GCC unroll 4
    for (int p = 0; p < kParts; ++p) {
      const Vector<T> e = power<T>(load(x + j + p * L) - base);
      store(x + j + p * L, e);
      total[p] += e;
    }
  sum = fold<T>(total, [](auto a, auto b) { return a + b; });
}

// The L1 norm of x - y, of n numbers, a multiple of kFold.
template <class T>
static T distance(const T* x, const T* y, int64_t n) {
  constexpr int L = Lanes<T>::count, kParts = kFold<T> / L;
  Vector<T> total[kParts] = {};
  for (int64_t j = 0; j < n; j += kFold<T>)
#pragma GCC unroll 4
    for (int p = 0; p < kParts; ++p) {
      const Vector<T> d = load(x + j + p * L) - load(y + j + p * L);
      total[p] += d < Vector<T>{} ? -d : d;
    }
  return fold<T>(total, [](auto a, auto b) { return a + b; });
}

template <class T>
static INLINE T weight_of(const Attention& a, const Place& at, int64_t row) {
  return a.weight ? static_cast<const T*>(a.weight)[a.weight_at.at(at.b, at.h, at.first + row)] : T(1);
}

// The keys of a head, panel by panel.
template <class T, class S>
static void pack_keys(const Attention& a, const Place& at, int64_t begin, int64_t end, T* to) {
  const S* k = static_cast<const S*>(a.k) + a.k_at.at(at.b, at.h / a.group, 0);
  for (int64_t j = begin; j < end; j += kPanel<T>)
    pack(k + j * a.k_at.row, a.k_at.row, smaller<int64_t>(kPanel<T>, end - j), a.dim, to + (j - begin) * a.dim, kPanel<T>,
         kPanel<T>);
}

// The strip of `count` queries from at.first on, and the keys that it sees, in whole panels. Causal: nobody sees a later key.
struct Strip {
  Place at;
  int64_t count, seen, width;
};
template <class T>
static INLINE Strip strip_of(const Attention& a, const Place& at, int64_t last) {
  const int64_t count = smaller(kStrip, last - at.first), seen = a.causal ? smaller(a.keys, at.first + count) : a.keys;
  return {at, count, seen, whole_panels(seen, sizeof(T))};
}

// Probabilities times total[query]: the largest of a query is 1. A query with a bad score has NaN for its keys, and total 1.
template <class T, class S>
static void probabilities(const Attention& a, const Strip& strip, const T* packed, T* q, T* held, int64_t pitch, T* total) {
  const Place& at = strip.at;
  const int64_t n = strip.width;
  pack(static_cast<const S*>(a.q) + a.q_at.at(at.b, at.h, at.first), a.q_at.row, strip.count, a.dim, q, kStripPitch,
       kStripPitch);
  for (int64_t j = 0; j < n; j += kPanel<T>) scores(q, packed + j * a.dim, a.dim, T(a.scale), held + j, pitch);
  for (int64_t r = 0; r < strip.count; ++r) {
    T* row = held + r * pitch;
    const int64_t hidden = a.mask ? 0 : a.causal ? smaller(strip.seen, at.first + r + 1) : a.keys;
    if (hidden < n) hide(a, at, r, hidden, n, row + hidden);
    T most;
    exponentials(row, n, total[r], most);
    const T bad = total[r] - total[r];
    if (a.lse_out)
      static_cast<T*>(a.lse_out)[(at.b * a.heads + at.h) * a.queries + at.first + r] =
          T(double(most) * kLn2 + logarithm(double(total[r])) + double(bad));
    if (bad == T(0)) continue;
    for (int64_t j = 0; j < n; ++j) row[j] = j < a.keys && a.takes_part(at.b, at.h, at.first + r, j) ? bad : T(0);
    total[r] = 1;
  }
  for (int64_t r = strip.count; r < kStrip; ++r) {
    for (int64_t j = 0; j < n; ++j) held[r * pitch + j] = 0;
    total[r] = 0;
  }
}

// sums_j += sum_r weight_r P_rj, of probabilities times total.
template <class T>
static void add_columns(const Attention& a, const Strip& strip, const T* held, int64_t pitch, const T* total, const T* weight,
                        T* sums) {
  constexpr int L = Lanes<T>::count;
  const Place& at = strip.at;
  T factor[kStrip];
  for (int64_t r = 0; r < kStrip; ++r) {
    factor[r] = total[r] == T(0) ? T(0) : weight[r] / total[r];
    if (factor[r] - factor[r] == T(0)) continue;
    for (int64_t j = 0; j < smaller(a.keys, strip.width); ++j)  // not finite: for those alone that take part
      if (a.takes_part(at.b, at.h, at.first + r, j)) sums[j] += factor[r] * held[r * pitch + j];
    factor[r] = 0;
  }
  for (int64_t j = 0; j < strip.width; j += L) {
    Vector<T> sum = load(held + j) * factor[0];
#pragma GCC unroll 12
    for (int r = 1; r < kStrip; ++r) sum += load(held + r * pitch + j) * factor[r];
    store(sums + j, load(sums + j) + sum);
  }
}

template <class T, class S>
static void rows(const Attention& a, int64_t lo, int64_t hi, T* scratch, T* partial) {
  const Chunks chunks = query_chunks(a);
  const int64_t keys = whole_panels(a.keys, sizeof(T));
  T *packed = scratch, *held = packed + keys * a.dim, *q = held + keys * kStrip, *levels = q + kStripPitch * a.dim;
  int64_t packed_head = -1;
  for (int64_t unit = lo; unit < hi; ++unit) {
    const int64_t pair = unit / chunks.runs(), begin = unit % chunks.runs() * chunks.run;
    const int64_t end = smaller(chunks.count, begin + chunks.run);
    Place at{pair / a.heads, pair % a.heads, begin * chunks.size};
    if (const int64_t head = pair / a.group; head != packed_head) {
      pack_keys<T, S>(a, at, 0, a.keys, packed);
      packed_head = head;
    }
    int depth = 0;  // sums that wait for their neighbours
    const auto sums = [&](int level) { return level ? levels + (level - 1) * keys : partial + unit * keys; };
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t last = smaller(a.queries, (chunk + 1) * chunks.size);
      for (int64_t j = 0; partial && j < keys; ++j) sums(depth)[j] = 0;
      for (; at.first < last; at.first += kStrip) {
        const Strip strip = strip_of<T>(a, at, last);
        T total[kStrip], weight[kStrip];
        probabilities<T, S>(a, strip, packed, q, held, keys, total);
        if (!partial) continue;
        for (int64_t r = 0; r < strip.count; ++r) weight[r] = weight_of<T>(a, at, r);
        add_columns(a, strip, held, keys, total, weight, sums(depth));
      }
      int64_t sums_so_far = chunk + 1 - begin;
      for (++depth; depth > 1 && (sums_so_far % 2 == 0 || chunk + 1 == end); sums_so_far /= 2, --depth)
        for (int64_t j = 0; partial && j < keys; ++j) sums(depth - 2)[j] += sums(depth - 1)[j];
    }
  }
}

// s <- P^T s of a whole head, whose probabilities are kept: weight is s at first, and sums the last s.
template <class T, class S>
static void pagerank(const Attention& a, int64_t lo, int64_t hi, T* scratch, int64_t iterations, T tol) {
  const Kept kept = kept_of(a, sizeof(T));
  T *packed = scratch, *held = packed + kept.length * a.dim, *q = held + kept.length * kept.pitch;
  T *total = q + kStripPitch * a.dim, *s = total + kept.length, *next = s + kept.length;
  int64_t packed_head = -1;
  for (int64_t pair = lo; pair < hi; ++pair) {
    Place at{pair / a.heads, pair % a.heads, 0};
    if (const int64_t head = pair / a.group; head != packed_head) {
      pack_keys<T, S>(a, at, 0, a.keys, packed);
      packed_head = head;
    }
    for (int64_t i = 0; i < kept.length; ++i) s[i] = i < a.queries ? weight_of<T>(a, at, i) : T(0);
    for (int64_t t = 0; t < iterations; ++t) {
      for (int64_t j = 0; j < kept.length; ++j) next[j] = 0;
      for (at.first = 0; at.first < a.queries; at.first += kStrip) {
        const Strip strip = strip_of<T>(a, at, a.queries);
        T* rows = held + at.first * kept.pitch;
        if (t == 0) probabilities<T, S>(a, strip, packed, q, rows, kept.pitch, total + at.first);
        add_columns(a, strip, rows, kept.pitch, total + at.first, s + at.first, next);
      }
      const T change = distance(s, next, kept.length);
      T* before = s;
      s = next;
      next = before;
      if (change < tol) break;
    }
    T* out = static_cast<T*>(a.sums) + pair * a.keys;
    for (int64_t j = 0; j < a.keys; ++j) out[j] = s[j];
  }
}

template <class T, class S>
static void columns(const Attention& a, int64_t lo, int64_t hi, T* scratch) {
  constexpr int L = Lanes<T>::count;
  const Blocks blocks = key_blocks(a);
  T *packed = scratch, *sums = packed + blocks.size * a.dim, *tile = sums + blocks.size, *q = tile + kPanel<T> * kStrip;
  const T scale = T(a.scale);
  for (int64_t unit = lo; unit < hi; ++unit) {
    const int64_t pair = unit / blocks.count, begin = unit % blocks.count * blocks.size;
    const int64_t end = smaller(a.keys, begin + blocks.size);
    Place at{pair / a.heads, pair % a.heads, a.causal ? begin / kStrip * kStrip : 0};
    pack_keys<T, S>(a, at, begin, end, packed);
    for (int64_t j = 0; j < blocks.size; ++j) sums[j] = 0;
    for (; at.first < a.queries; at.first += kStrip) {
      const int64_t count = smaller(kStrip, a.queries - at.first);
      pack(static_cast<const S*>(a.q) + a.q_at.at(at.b, at.h, at.first), a.q_at.row, count, a.dim, q, kStripPitch, kStripPitch);
      // Rows whose terms are not finite even where a pair takes no part go number by number.
      T taken[kStrip], factor[kStrip], taken_alone[kStrip], factor_alone[kStrip];
      bool alone[kStrip];
      for (int64_t r = 0; r < kStrip; ++r) {
        taken[r] = r < count ? subtrahend(static_cast<const T*>(a.lse)[pair * a.queries + at.first + r]) : T(__builtin_inf());
        factor[r] = taken[r] == T(__builtin_inf()) ? T(0) : weight_of<T>(a, at, r);
        taken_alone[r] = taken[r];
        factor_alone[r] = factor[r];
        alone[r] = taken[r] != taken[r] || factor[r] - factor[r] != T(0);
        if (alone[r]) taken[r] = factor[r] = 0;
      }
      const int64_t seen = a.causal ? smaller(end, at.first + count) : end;
      for (int64_t j = begin; j < seen; j += kPanel<T>) {
        scores(q, packed + (j - begin) * a.dim, a.dim, scale, tile, kPanel<T>);
        const bool edge = a.mask || j + kPanel<T> > (a.causal ? smaller(a.keys, at.first + 1) : a.keys);
        for (int64_t r = 0; edge && r < count; ++r) hide(a, at, r, j, j + kPanel<T>, tile + r * kPanel<T>);
        for (int64_t c = count * kPanel<T>; c < kStrip * kPanel<T>; ++c) tile[c] = T(-__builtin_inf());
        T* to = sums + j - begin;
        for (int64_t r = 0; r < count; ++r) {
          T* row = tile + r * kPanel<T>;
          for (int64_t c = 0; alone[r] && c < kPanel<T>; ++c) {
            if (j + c < end && a.takes_part(at.b, at.h, at.first + r, j + c))
              to[c] += power_of_2<T, Word<T>>(row[c] - taken_alone[r]) * factor_alone[r];
            row[c] = T(-__builtin_inf());
          }
        }
        for (int v = 0; v < kPanel<T>; v += L) {
          Vector<T> sum = {};
#pragma GCC unroll 4
          for (int r = 0; r < kStrip; ++r) sum += power<T>(load(tile + r * kPanel<T> + v) - taken[r]) * factor[r];
          store(to + v, load(to + v) + sum);
        }
      }
    }
    T* out = static_cast<T*>(a.sums) + pair * a.keys;
    for (int64_t j = begin; j < end; ++j) out[j] = sums[j - begin];
  }
}

void attention_rows(const Attention& a, int64_t lo, int64_t hi, void* scratch, void* partial) {
  with_type(a.type, [&]<class S>(S) {
    using T = decltype(widen(S{}));
    rows<T, S>(a, lo, hi, static_cast<T*>(scratch), static_cast<T*>(partial));
  });
}
void attention_columns(const Attention& a, int64_t lo, int64_t hi, void* scratch) {
  with_type(a.type,
            [&]<class S>(S) { columns<decltype(widen(S{})), S>(a, lo, hi, static_cast<decltype(widen(S{}))*>(scratch)); });
}
void attention_pagerank(const Attention& a, int64_t lo, int64_t hi, void* scratch, int64_t iterations, double tol) {
  with_type(a.type, [&]<class S>(S) {
    using T = decltype(widen(S{}));
    pagerank<T, S>(a, lo, hi, static_cast<T*>(scratch), iterations, T(tol));
  });
}
}  // namespace dither::DITHER_ISA
