#include "match.h"
#include "tiles_cpu.h"

namespace dither::DITHER_ISA {
constexpr int kGroups = kTileRows == 1 ? 48 : 48 / kTileRows;  // of rows, which share a panel while it is near
constexpr int kUnitRows = kGroups * kTileRows;

int64_t row_width() { return kTileRows; }
int64_t panel_width(DType type) { return type == DType::f64 ? kPanel<double> : kPanel<float>; }
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

void pack_tokens(const Tokens& t, int64_t width, int64_t lo, int64_t hi, void* scratch, void* packed) {
  const int64_t groups = (t.count + width - 1) / width, C = t.channels;
  with_type(t.type, [&]<class S>(S) {
    using T = decltype(widen(S{}));
    T* rows = static_cast<T*>(scratch);
    for (int64_t group = lo; group < hi; ++group) {
      const int64_t sample = group / groups, first = group % groups * width, count = smaller(width, t.count - first);
      for (int64_t r = 0; r < width; ++r) {
        T* to = rows + r * C;
        const S* x = static_cast<const S*>(t.x) + t.at(sample, first + smaller(r, count - 1));
        if (r >= count)
          for (int64_t k = 0; k < C; ++k) to[k] = 0;
        else if (t.normalize) {
          const double factor = norm_factor(x, C);
          for (int64_t k = 0; k < C; ++k) to[k] = T(double(widen(x[k])) * factor);
        } else
          for (int64_t k = 0; k < C; ++k) to[k] = widen(x[k]);
      }
      T* to = static_cast<T*>(packed) + group * width * C;
      for (int64_t k = 0; k < C; ++k)
        for (int64_t r = 0; r < width; ++r) to[k * width + r] = rows[r * C + k];
    }
  });
}

template <class T>
static INLINE void match_unit(const Match& m, const T* rows, const T* panels, int64_t sample, int64_t first) {
  using I = decltype(Vec<T>{} > Vec<T>{});
  constexpr int W = kPanel<T>, R = kTileRows, P = kPanelVectors;
  constexpr T kLeast = -T(__builtin_inf());
  const int64_t C = m.a.channels, count = smaller<int64_t>(kUnitRows, m.a.count - first), groups = (count + R - 1) / R;
  const int64_t all = (m.b.count + W - 1) / W;
  Vec<T> best[kGroups][R][P];
  I place[kGroups][R][P];  // the panel of the best
  for (int64_t g = 0; g < groups; ++g)
    for (int r = 0; r < R; ++r)
      for (int p = 0; p < P; ++p) {
        best[g][r][p] = kLeast - Vec<T>{};
        place[g][r][p] = I{};
      }
  rows += (sample * ((m.a.count + R - 1) / R) + first / R) * R * C;
  panels += sample * all * W * C;
  for (int64_t panel = 0; panel < all; ++panel) {
    const int64_t column = panel * W;
    const bool last = column + W > m.b.count;
    const I number = decltype(I{}[0] + 0)(panel) - I{};
    for (int64_t g = 0; g < groups; ++g) {
      TileSums<T> sum;
      tile_products<T>(rows + g * R * C, panels + column * C, C, sum);
      const int64_t row = first + g * R;
      if (last || m.mask || (m.skip_diagonal && row < column + W && column < row + R)) {
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
          const I more = sum[r][p] > best[g][r][p];
          best[g][r][p] = more ? sum[r][p] : best[g][r][p];
          place[g][r][p] = more ? number : place[g][r][p];
        }
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    T score = kLeast;
    int64_t index = 0;
    for (int j = 0; j < W; ++j) {
      const int p = j / Lanes<T>::count, l = j % Lanes<T>::count;
      const T value = best[i / R][i % R][p][l];
      const int64_t at = int64_t(place[i / R][i % R][p][l]) * W + j;
      if (value > score || (value == score && value > kLeast && at < index)) {
        score = value;
        index = at;
      }
    }
    static_cast<T*>(m.score)[sample * m.a.count + first + i] = score;
    m.index[sample * m.a.count + first + i] = index;
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
