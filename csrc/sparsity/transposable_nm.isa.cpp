#include "transposable_nm.h"
#include "../common/order.h"
#include "../common/shuffle_cpu.h"

namespace dither::DITHER_ISA {
constexpr int L = Lanes<float>::count;
constexpr int kArea = kMostSide * kMostSide;

struct Team {
  static constexpr bool kMirrored = true;
  using V = Vector<float>;
  using I = Vector<int32_t>;
  using U = Vector<uint32_t>;
  template <class Body>
  INLINE void lanes(int m, const Body& body) const {
    for (int k = 0; k < m; k += L) body(k);
  }
  template <class Body>
  INLINE void each(int m, const Body& body) const {
    for (int k = 0; k < m; ++k) body(k);
  }
  template <class Body>
  INLINE void each_of(uint32_t word, const Body& body) const {
    DITHER_EACH_BIT(k, word) body(int(k));
  }
  template <class Test>
  INLINE uint32_t which(uint32_t word, const Test& test) const {
    uint32_t found = 0;
    DITHER_EACH_BIT(k, word) found |= uint32_t(test(int(k))) << k;
    return found;
  }
  template <class Test>
  INLINE uint32_t where(int m, const Test& test) const {
    uint32_t word = 0;
    for (int k = 0; k < m; k += L) word |= word_of(test(k)) << k;
    return word & ~0u >> (32 - m);
  }
  INLINE int first_largest(int m, const float* x) const {
    V most = load(x);
    for (int k = L; k < m; k += L) {
      const V next = load(x + k);
      most = next > most ? next : most;
    }
    most = over_lanes<L / 2>(most);
    return lowest_bit(where(m, [&](int k) { return load(x + k) == most; }));
  }

 private:
  static INLINE uint32_t word_of(I mask) {
#if defined(__AVX512DQ__)
    return _mm512_movepi32_mask(__m512i(mask));
#elif defined(__AVX2__)
    return uint32_t(_mm256_movemask_ps(__m256(mask)));
#else
    uint32_t word = 0;
    for (int l = 0; l < L; ++l) word |= uint32_t(mask[l] & 1) << l;
    return word;
#endif
  }
  template <int kHalf>
  static INLINE V over_lanes(V v) {  // the largest, in every lane
    if constexpr (kHalf == 0) {
      return v;
    } else {
      const V other = shuffle(v, v, [](int i) { return i ^ kHalf; });
      return over_lanes<kHalf / 2>(v > other ? v : other);
    }
  }
};

// Relative magnitudes of a tile, rows `pitch` apart.
template <class S>
static void read_tile(const TransposableNM& t, int64_t tile, float* to, int pitch) {
  using T = decltype(widen(S{}) + 0);
  using Bits = OrderKey<S>;
  const S* w = static_cast<const S*>(t.w) + t.start(tile);
  T size[kArea];
  Bits largest = 0;
  for (int i = 0; i < t.m; ++i)
    for (int j = 0; j < t.m; ++j) {
      const T x = absolute(T(widen(w[i * t.columns + j]))) + T(0);  // -0 is 0
      size[i * t.m + j] = x;
      const Bits bits = is_finite(x) ? bit_as<Bits>(x) : 0;  // in the order of the numbers
      largest = bits > largest ? bits : largest;
    }
  for (int i = 0; i < t.m; ++i)
    for (int j = 0; j < t.m; ++j) to[i * pitch + j] = relative(size[i * t.m + j], bit_as<T>(largest));
}

// Plans of L tiles side by side. A plan cut at 1 and what was cut, Dykstra's correction (Benamou et al. 2015), are one number:
// their product, scaled by rows and by columns; one of them is 1. kM: m, where it is known.
template <int kM>
static void transport(Vector<float>* y, int side, float n, int iterations) {
  using V = Vector<float>;
  const int m = kM ? kM : side;
  constexpr int kRoom = kM ? kM : kMostSide;
  const V one = V{} + 1.0f;
  V factor[kRoom], sums[kRoom], x[kRoom];
  for (int j = 0; j < m; ++j) factor[j] = one;
  for (int t = 0; t < iterations; ++t) {
    for (int j = 0; j < m; ++j) sums[j] = V{};
    for (int i = 0; i < m; ++i) {
      V* row = y + i * m;
      V sum = {};
#pragma GCC unroll 16
      for (int j = 0; j < m; ++j) {
        x[j] = row[j] * factor[j];
        sum += at_most(x[j], one);
      }
      const V r = n / sum;
#pragma GCC unroll 16
      for (int j = 0; j < m; ++j) {
        row[j] = x[j] * r;
        sums[j] += at_most(row[j], r);
      }
    }
    for (int j = 0; j < m; ++j) factor[j] = n / sums[j];
  }
  for (int i = 0; i < m; ++i)
    for (int j = 0; j < m; ++j) y[i * m + j] = at_most(y[i * m + j] * factor[j], one);
}

template <class S>
static void tiles(const TransposableNM& t, int64_t lo, int64_t hi) {
  const int m = t.m, pitch = (m + L - 1) / L * L;
  alignas(64) float plan[kArea][L], squares[4][kArea] = {}, margins[Margins::kArrays * kMostSide] = {};
  const Square<true> weight{squares[0], pitch, squares[1]}, score{squares[2], pitch, squares[3]};
  const Team team;
  const Rounding<Team> rounding{team, t.n, m, weight, score, Margins(margins, kMostSide)};
  for (int64_t group = lo; group < hi; group += L) {
    const int count = int(smaller<int64_t>(L, hi - group));
    if (t.iterations) {
      for (int l = 0; l < L; ++l) {
        read_tile<S>(t, group + smaller(l, count - 1), squares[0], m);
        for (int p = 0; p < m * m; ++p) plan[p][l] = squares[0][p];
      }
      for (int p = 0; p < m * m; ++p) store(plan[p], first_plan<Vector<uint32_t>>(load(plan[p])));
      auto* y = reinterpret_cast<Vector<float>*>(plan);
      if (m == 8) transport<8>(y, m, float(t.n), t.iterations);
      else if (m == 16) transport<16>(y, m, float(t.n), t.iterations);
      else if (m == 32) transport<32>(y, m, float(t.n), t.iterations);
      else transport<0>(y, m, float(t.n), t.iterations);
    }
    for (int l = 0; l < count; ++l) {
      read_tile<S>(t, group + l, weight.at, pitch);
      for (int i = 0; i < m; ++i)
        for (int j = 0; j < m; ++j) {
          weight.set(i, j, weight(i, j));
          score.set(i, j, t.iterations ? plan[i * m + j][l] : weight(i, j));
        }
      rounding.choose();
      rounding.complete();
      rounding.exchange();
      uint8_t* keep = t.keep + t.start(group + l);
      for (int i = 0; i < m; ++i)
        for (int j = 0; j < m; ++j) keep[i * t.columns + j] = rounding.at.held[i] >> j & 1;
    }
  }
}

void transposable_nm_range(const TransposableNM& t, int64_t lo, int64_t hi) {
  with_type(t.type, [&]<class S>(S) { tiles<S>(t, lo, hi); });
}
}  // namespace dither::DITHER_ISA
