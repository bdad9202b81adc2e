#include "match.h"
#include "tiles_cpu.h"

namespace dither::DITHER_ISA {
constexpr int kTileRows = DITHER_VECTOR_BYTES == 64 ? 8 : DITHER_VECTOR_BYTES == 32 ? 3 : 1;  // whose sums fit the registers
constexpr int kGroups = kTileRows == 1 ? 48 : 48 / kTileRows;  // of rows, which share a panel while it is near
constexpr int kUnitRows = kGroups * kTileRows;

int64_t row_group() { return kTileRows; }
int64_t panel_group(DType type) { return type == DType::f64 ? kPanel<double> : kPanel<float>; }
int64_t rows_of_unit() { return kUnitRows; }

template <class S>
static INLINE double norm_factor(const S* x, int64_t n) {
  double lanes[kNormLanes] = {};
  int64_t k = 0;
  for (; k + kNormLanes <= n; k += kNormLanes)
    for (int l = 0; l < kNormLanes; ++l) lanes[l] += double(widen(x[k + l])) * double(widen(x[k + l]));
  for (int l = 0; l < n - k; ++l) lanes[l] += double(widen(x[k + l])) * double(widen(x[k + l]));
  for (int half = kNormLanes / 2; half > 0; half /= 2)
    for (int l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  return inverse_norm(lanes[0]);
}

// Tokens first .. first + width of a sample, zeros beyond its last.
template <class S, class T>
static INLINE void widened_rows(const Tokens& t, int64_t sample, int64_t first, int64_t width, T* to) {
  const int64_t C = t.channels, stride = packed_stride(C);
  for (int64_t token = first; token < first + width; ++token, to += stride) {
    const bool inside = token < t.count;
    const S* x = static_cast<const S*>(t.x) + (inside ? t.at(sample, token) : 0);
    const double factor = inside && t.normalize ? norm_factor(x, C) : 1.0;
    if (!inside)
      for (int64_t k = 0; k < C; ++k) to[k] = 0;
    else if (t.normalize)
      for (int64_t k = 0; k < C; ++k) to[k] = T(double(widen(x[k])) * factor);
    else
      for (int64_t k = 0; k < C; ++k) to[k] = widen(x[k]);
    for (int64_t k = C; k < stride; ++k) to[k] = 0;
  }
}

void pack_rows(const Tokens& t, int64_t lo, int64_t hi, void* rows) {
  const int64_t groups = (t.count + kTileRows - 1) / kTileRows;
  with_type(t.type, [&]<class S>(S) {
    auto* to = static_cast<decltype(widen(S{}))*>(rows);
    for (int64_t group = lo; group < hi; ++group)
      widened_rows<S>(t, group / groups, group % groups * kTileRows, kTileRows,
                      to + group * kTileRows * packed_stride(t.channels));
  });
}

void pack_panels(const Tokens& t, int64_t lo, int64_t hi, void* scratch, void* panels) {
  with_type(t.type, [&]<class S>(S) {
    using T = decltype(widen(S{}));
    constexpr int W = kPanel<T>;
    const int64_t groups = (t.count + W - 1) / W;
    T *rows = static_cast<T*>(scratch), *to = static_cast<T*>(panels);
    for (int64_t group = lo; group < hi; ++group) {
      widened_rows<S>(t, group / groups, group % groups * W, W, rows);
      pack_panel(rows, packed_stride(t.channels), t.channels, to + group * W * t.channels);
    }
  });
}

template <class T>
static INLINE void match_unit(const Match& m, const T* rows, const T* panels, int64_t sample, int64_t first) {
  using I = decltype(Vector<T>{} > Vector<T>{});
  using Place = decltype(I{}[0] + 0);
  constexpr int W = kPanel<T>, R = kTileRows, P = kPanelVectors;
  constexpr T kLeast = -T(__builtin_inf());
  const int64_t C = m.a.channels, count = smaller<int64_t>(kUnitRows, m.a.count - first), groups = (count + R - 1) / R;
  const int64_t all = (m.b.count + W - 1) / W;
  Vector<T> best[kGroups][R][P];
  I place[kGroups][R][P];  // the panel of the best
  for (int64_t g = 0; g < groups; ++g)
    for (int r = 0; r < R; ++r)
      for (int p = 0; p < P; ++p) {
        best[g][r][p] = kLeast - Vector<T>{};
        place[g][r][p] = I{};
      }
  const int64_t stride = packed_stride(C);
  rows += (sample * ((m.a.count + R - 1) / R) + first / R) * R * stride;
  panels += sample * all * W * C;
  for (int64_t panel = 0; panel < all; ++panel) {
    const int64_t column = panel * W;
    const bool last = column + W > m.b.count;
    Place flags[W];
    for (int j = 0; j < W; ++j) flags[j] = column + j < m.b.count ? -1 : 0;
    I within[P];  // the panel's tokens, not the zeros behind the last
    __builtin_memcpy(within, flags, sizeof within);
    const I number = Place(panel) - I{};
    for (int64_t g = 0; g < groups; ++g) {
      Vector<T> sum[R][P];
      tile_products<T>(rows + g * R * stride, stride, 1, panels + column * C, C, sum,
                       [](auto a, auto b, auto c) { return multiply_add<T>(a, b, c); });
      const int64_t row = first + g * R;
      if (m.mask || (m.skip_diagonal && row < column + W && column < row + R)) {
        T tile[R][W];
        __builtin_memcpy(tile, sum, sizeof tile);
        for (int r = 0; r < R && row + r < m.a.count; ++r)
          for (int j = 0; j < W; ++j)
            if (!m.allows(sample, row + r, column + j)) tile[r][j] = kLeast;
        __builtin_memcpy(sum, tile, sizeof tile);
      }
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int p = 0; p < P; ++p) {
          I more = sum[r][p] > best[g][r][p];
          if (last) more &= within[p];
          best[g][r][p] = more ? sum[r][p] : best[g][r][p];
          place[g][r][p] = more ? number : place[g][r][p];
        }
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    T value[W];
    Place at[W];
    __builtin_memcpy(value, best[i / R][i % R], sizeof value);
    __builtin_memcpy(at, place[i / R][i % R], sizeof at);
    for (int j = 0; j < W; ++j) at[j] = at[j] * W + j;
#pragma GCC unroll 8
    for (int half = W / 2; half > 0; half /= 2)
      for (int j = 0; j < half; ++j) {
        const T other = value[j + half];
        const bool more = (other > value[j]) | ((other == value[j]) & (at[j + half] < at[j]));
        value[j] = more ? other : value[j];
        at[j] = more ? at[j + half] : at[j];
      }
    static_cast<T*>(m.score)[sample * m.a.count + first + i] = value[0];
    m.index[sample * m.a.count + first + i] = at[0];
  }
}

void match_units(const Match& m, const void* rows, const void* panels, int64_t lo, int64_t hi) {
  const int64_t units = (m.a.count + kUnitRows - 1) / kUnitRows;
  for (int64_t unit = lo; unit < hi; ++unit) {
    const int64_t sample = unit / units, first = unit % units * kUnitRows;
    if (m.a.type == DType::f64)
      match_unit(m, static_cast<const double*>(rows), static_cast<const double*>(panels), sample, first);
    else match_unit(m, static_cast<const float*>(rows), static_cast<const float*>(panels), sample, first);
  }
}
}  // namespace dither::DITHER_ISA
