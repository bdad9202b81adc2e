// Rows of a plan, vector by vector. Per-instruction-set files only.
#pragma once
#include "../common/shuffle_cpu.h"
#include "sinkhorn.h"

namespace dither::DITHER_ISA {
#define FLAT __attribute__((always_inline))  // of a lambda
template <bool kWide>
struct WordOf {
  using type = uint32_t;
};
template <>
struct WordOf<true> {
  using type = uint64_t;
};
template <class T>
using Words = typename Lanes<typename WordOf<sizeof(T) == 8>::type>::type;

// Floats as doubles.
template <class T, class S>
static INLINE Vector<T> load_as(const S* x) {
  if constexpr (sizeof(S) == sizeof(T)) {
    return load(x);
  } else {
    typedef S Half __attribute__((vector_size(DITHER_VECTOR_BYTES / 2)));
    Half v;
    __builtin_memcpy(&v, x, sizeof v);
    return __builtin_convertvector(v, Vector<T>);
  }
}
// The first `count`, then zeros.
template <class T, class S>
static INLINE Vector<T> load_part(const S* x, int64_t count) {
  Vector<T> v = {};
  for (int l = 0; l < Lanes<T>::count; ++l)
    if (l < count) v[l] = T(x[l]);
  return v;
}

template <class T>
static INLINE Vector<T> fused(Vector<T> a, Vector<T> b, Vector<T> c) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 8) return Vector<T>(_mm512_fmadd_pd(__m512d(a), __m512d(b), __m512d(c)));
  else return Vector<T>(_mm512_fmadd_ps(__m512(a), __m512(b), __m512(c)));
#elif defined(__FMA__)
  if constexpr (sizeof(T) == 8) return Vector<T>(_mm256_fmadd_pd(__m256d(a), __m256d(b), __m256d(c)));
  else return Vector<T>(_mm256_fmadd_ps(__m256(a), __m256(b), __m256(c)));
#else
  return a * b + c;
#endif
}

// 2^x; 0 of what is less than kLeastPower, and of NaN, which a forbidden pair may give.
template <class T>
static INLINE Vector<T> power(Vector<T> x) {
  const auto fma = [](Vector<T> a, Vector<T> b, Vector<T> c) { return fused<T>(a, b, c); };
#if defined(__AVX512F__)
  constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  if constexpr (sizeof(T) == 8) {
    const auto normal = _mm512_cmp_pd_mask(__m512d(x), _mm512_set1_pd(kLeastPower<T>), _CMP_GE_OQ);
    const __m512d n = _mm512_maskz_roundscale_pd(normal, __m512d(x), kNearest);
    return Vector<T>(_mm512_maskz_scalef_pd(normal, __m512d(power_near_1<T>(Vector<T>(__m512d(x) - n), fma)), n));
  } else {
    const auto normal = _mm512_cmp_ps_mask(__m512(x), _mm512_set1_ps(kLeastPower<T>), _CMP_GE_OQ);
    const __m512 n = _mm512_maskz_roundscale_ps(normal, __m512(x), kNearest);
    return Vector<T>(_mm512_maskz_scalef_ps(normal, __m512(power_near_1<T>(Vector<T>(__m512(x) - n), fma)), n));
  }
#else
  constexpr bool kDouble = sizeof(T) == 8;
  constexpr T kRound = kDouble ? T(0x1.8p52) : T(0x1.8p23);
  constexpr int kHalf = kDouble ? 1022 : 126, kDigits = kDouble ? 52 : 23;
  const Vector<T> least = Vector<T>{} + kLeastPower<T>, most = Vector<T>{} + kMostPower<T>;
  Vector<T> y = x >= least ? x : least;
  y = y > most ? most : y;
  const Vector<T> shifted = y + kRound, p = power_near_1<T>(y - (shifted - kRound), fma);
  const Vector<T> result = (p + p) * Vector<T>((Words<T>(shifted) + kHalf) << kDigits);
  return x >= least ? result : Vector<T>{};
#endif
}

// The lanes of a vector by halves.
template <int kHalf, class V>
static INLINE V fold_lanes(V v) {
  if constexpr (kHalf == 0) return v;
  else return fold_lanes<kHalf / 2>(v + shuffle(v, v, [](int i) { return i + kHalf; }));
}
template <class T>
static INLINE T sum_of(Vector<T> v) {
  return fold_lanes<Lanes<T>::count / 2>(v)[0];
}

// The scale in two parts, so that in float its rounding does not act as another reg.
template <class T>
struct Scale {
  Vector<T> high, low;
  explicit INLINE Scale(double scale) : high(T(-scale) - Vector<T>{}), low(T(-scale - double(T(-scale))) - Vector<T>{}) {}
  INLINE Vector<T> operator()(Vector<T> cost, Vector<T> g) const {
    if constexpr (sizeof(T) == 8) return fused<T>(high, cost, g);
    else return fused<T>(low, cost, fused<T>(high, cost, g));
  }
};

// Calls body(j, load) for vectors of columns from j = 0 on; load(row) is that part of a row of costs, padded with zeros.
template <class T, class S, class Body>
static INLINE void for_columns(int64_t m, const Body& body) {
  constexpr int L = Lanes<T>::count;
  int64_t j = 0;
  for (; j + L <= m; j += L) body(j, [j](const S* row) FLAT { return load_as<T>(row + j); });
  if (j < m) body(j, [j, m](const S* row) FLAT { return load_part<T>(row + j, m - j); });
}

// The distances of kRows points from all of y, into rows `pitch` apart.
template <bool kL1, int kRows, class S>
static INLINE void distances(const Costs& c, const S* x, const S* y, S* to, int64_t pitch) {
  for_columns<S, S>(c.m, [&](int64_t j, auto&& at) FLAT {
    Vector<S> sum[kRows] = {};
    for (int64_t k = 0; k < c.dim; ++k) {
      const Vector<S> other = at(y + k * c.m);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const Vector<S> d = x[r * c.dim + k] - other;
        if constexpr (kL1) sum[r] += d < Vector<S>{} ? -d : d;
        else sum[r] = fused<S>(d, d, sum[r]);
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      if (c.ground == Ground::euclidean)
        for (int l = 0; l < Lanes<S>::count; ++l) sum[r][l] = square_root(sum[r][l]);
      store(to + r * pitch + j, sum[r]);
    }
  });
}

// Rows i .. i + count of the costs of a problem, where they lie or computed into room; beyond them, the last one again.
template <class T, class S>
static INLINE void cost_rows(const Costs& c, int64_t problem, int64_t i, int64_t count, S* room, const S* (&rows)[kRowBlock]) {
  const S* x = static_cast<const S*>(c.x) + problem * c.x_batch + i * c.dim;  // dim is m where costs are given
  const bool given = c.ground == Ground::given;
  const int64_t pitch = given ? c.m : whole_lines(c.m, sizeof(S));
  for (int r = 0; r < kRowBlock; ++r) rows[r] = (given ? x : room) + smaller<int64_t>(r, count - 1) * pitch;
  if (given) return;
  const S* y = static_cast<const S*>(c.y) + problem * c.y_batch;
  const bool l1 = c.ground == Ground::l1;
  if (count == kRowBlock) {
    if (l1) distances<true, kRowBlock>(c, x, y, room, pitch);
    else distances<false, kRowBlock>(c, x, y, room, pitch);
    return;
  }
  for (int64_t r = 0; r < count; ++r)
    if (l1) distances<true, 1>(c, x + r * c.dim, y, room + r * pitch, pitch);
    else distances<false, 1>(c, x + r * c.dim, y, room + r * pitch, pitch);
}

// Terms 2^(shift + g - C) of rows, kept `pitch` apart in whole lines, and their sums times `factor`, a vector of columns.
template <class T, class S, int kRows>
static INLINE void row_terms(const Costs& c, const S* const (&row)[kRows], const Vector<T> (&shift)[kRows], const T* g,
                             const T* factor, T* terms, int64_t pitch, Vector<T> (&sum)[kRows]) {
  const Scale<T> scale(c.scale);
  for_columns<T, S>(c.m, [&](int64_t j, auto&& at) FLAT {
    const Vector<T> column = load(g + j), times = load(factor + j);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const Vector<T> e = power<T>(scale(at(row[r]), column) + shift[r]);
      store(terms + r * pitch + j, e);
      sum[r] = fused<T>(e, times, sum[r]);
    }
  });
}

// body(T{}, S{}): the types of the plan and of the costs.
template <class Body>
static INLINE void with_types(const Costs& c, const Body& body) {
  if (c.narrow) body(float{}, float{});
  else if (c.type == DType::f32) body(double{}, float{});
  else body(double{}, double{});
}
}  // namespace dither::DITHER_ISA
