#include "norms.h"
#include "../common/shuffle_cpu.h"

namespace dither::DITHER_ISA {
using V __attribute__((vector_size(DITHER_VECTOR_BYTES))) = double;
constexpr int L = DITHER_VECTOR_BYTES / sizeof(double);

static INLINE V load(const double* x) {
  V v;
  __builtin_memcpy(&v, x, sizeof v);
  return v;
}
static INLINE V load(const float* x) {
#if defined(__AVX512F__)
  return V(_mm512_maskz_cvtps_pd(0xff, _mm256_loadu_ps(x)));
#elif defined(__AVX2__)
  return V(_mm256_cvtps_pd(_mm_loadu_ps(x)));
#else
  return V{double(x[0]), double(x[1])};
#endif
}
template <class S>
static INLINE V add_product(V a, V b, V c) {  // as the scalar one of norms.h
#if defined(__AVX512F__)
  if constexpr (sizeof(S) < 8) return V(_mm512_fmadd_pd(__m512d(a), __m512d(b), __m512d(c)));
#elif defined(__FMA__)
  if constexpr (sizeof(S) < 8) return V(_mm256_fmadd_pd(__m256d(a), __m256d(b), __m256d(c)));
#endif
  return a * b + c;
}

// count numbers as those that are summed: float or double
template <class S>
using Wide = decltype(widen(S{}));
template <int kCount, class S>
static INLINE const Wide<S>* widened(const S* x, Wide<S>* to) {
  if constexpr (sizeof(S) > 2) {
    return x;
  } else {
    for (int k = 0; k < kCount; ++k) to[k] = widen(x[k]);
    return to;
  }
}
static INLINE double fold(double* lanes, int count) {
  for (int half = count / 2; half > 0; half /= 2)
    for (int k = 0; k < half; ++k) lanes[k] += lanes[k + half];
  return lanes[0];
}

// body(32 numbers, lanes) for all of x, the last ones followed by zeros; the fold of the lanes.
template <class S, class Body>
static INLINE double by_lanes(const S* x, int64_t n, const Body& body) {
  constexpr int kParts = kNormLanes / L;
  V sum[kParts] = {};
  Wide<S> wide[kNormLanes];
  int64_t k = 0;
  for (; k + kNormLanes <= n; k += kNormLanes) body(widened<kNormLanes>(x + k, wide), sum);
  if (k < n) {
    S last[kNormLanes] = {};
    for (int64_t j = 0; j < n - k; ++j) last[j] = x[k + j];
    body(widened<kNormLanes>(last, wide), sum);
  }
  alignas(64) double lanes[kNormLanes];
  __builtin_memcpy(lanes, sum, sizeof lanes);
  return fold(lanes, kNormLanes);
}

double square_chunk(const void* x, int64_t n, DType type) {
  double total = 0.0;
  with_type(type, [&]<class S>(S) {
    total = by_lanes(static_cast<const S*>(x), n, [](const Wide<S>* v, V* sum) {
#pragma GCC unroll 16
      for (int p = 0; p < kNormLanes / L; ++p) sum[p] = add_product<S>(load(v + p * L), load(v + p * L), sum[p]);
    });
  });
  return total;
}

double sum_lanes(const double* x, int64_t n) {
  return by_lanes(x, n, [](const double* v, V* sum) {
#pragma GCC unroll 16
    for (int p = 0; p < kNormLanes / L; ++p) sum[p] += load(v + p * L);
  });
}

// ---- Gram matrices

constexpr int kRegisters = DITHER_VECTOR_BYTES == 64 ? 32 : 16;
constexpr int kParts = kGhostLanes / L;                                       // vectors of a number's lanes
constexpr int R = kParts == 1 ? 4 : kParts == 2 ? 2 : 1, C = R == 1 ? 2 : R;  // numbers whose lanes fit the registers
static_assert(R * C * kParts < kRegisters && R * C % L == 0);

// The folds of the lanes of each vector, which come in pieces of 2 half lanes.
template <int half, int M>
static INLINE V fold_each(V (&x)[M]) {
  if constexpr (half == 0) {
    return x[0];
  } else {
    V y[M / 2];
#pragma GCC unroll 4
    for (int m = 0; m < M / 2; ++m)
      y[m] = shuffle(x[2 * m], x[2 * m + 1], [](int i) { return i / half * 2 * half + i % half; }) +
             shuffle(x[2 * m], x[2 * m + 1], [](int i) { return i / half * 2 * half + i % half + half; });
    return fold_each<half / 2>(y);
  }
}

// Of rows x and y, R and C, the products of each with each over n columns, a multiple of 8.
template <class S>
static INLINE void products(const S* const* x, const S* const* y, int64_t n, double* to) {
  V sum[R][C][kParts] = {};
  for (int64_t k = 0; k < n; k += kGhostLanes)
#pragma GCC unroll 4
    for (int p = 0; p < kParts; ++p) {
      V u[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) u[r] = load(x[r] + k + p * L);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
        const V v = load(y[c] + k + p * L);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) sum[r][c][p] = add_product<S>(u[r], v, sum[r][c][p]);
      }
    }
  double numbers[R][C];
#pragma GCC unroll 8
  for (int k = 0; k < R * C; k += L) {
    V some[L];
#pragma GCC unroll 8
    for (int l = 0; l < L; ++l) {
      V* parts = sum[(k + l) / C][(k + l) % C];
#pragma GCC unroll 4
      for (int half = kParts / 2; half > 0; half /= 2)
#pragma GCC unroll 4
        for (int p = 0; p < half; ++p) parts[p] += parts[p + half];
      some[l] = parts[0];
    }
    const V folded = fold_each<L / 2>(some);
    __builtin_memcpy(numbers[0] + k, &folded, sizeof folded);
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) to[r * kGhostTile + c] = numbers[r][c];
}

// 16 rows of a sample, fewer at its end: where they are, or widened and filled with zeros to a multiple of 8 columns.
struct Block {
  const void* rows;
  int64_t stride, count;
};
static Block block_of(const SampleRows& s, int64_t row, int64_t count, double* scratch) {
  const int64_t whole = (s.columns + kGhostLanes - 1) / kGhostLanes * kGhostLanes;
  Block block{scratch, whole, count};
  with_type(s.type, [&]<class S>(S) {
    const S* from = static_cast<const S*>(s.x) + row * s.columns;
    if (sizeof(S) > 2 && whole == s.columns) {
      block.rows = from;
      return;
    }
    auto* to = reinterpret_cast<Wide<S>*>(scratch);
    for (int64_t r = 0; r < count; ++r, from += s.columns, to += whole) {
      for (int64_t k = 0; k < s.columns; ++k) to[k] = widen(from[k]);
      for (int64_t k = s.columns; k < whole; ++k) to[k] = 0;
    }
  });
  return block;
}

// A tile of 4 x 4 of a Gram matrix. Rows beyond the last are the last again.
template <class S>
static void gram_tile(const Block& rows, const Block& columns, int64_t i, int64_t j, double* to) {
  const auto row_of = [](const Block& b, int64_t r) {
    return static_cast<const S*>(b.rows) + smaller(r, b.count - 1) * b.stride;
  };
  for (int r = 0; r < kGhostTile; r += R)
    for (int c = 0; c < kGhostTile; c += C) {
      const S *x[R], *y[C];
      for (int k = 0; k < R; ++k) x[k] = row_of(rows, i + r + k);
      for (int k = 0; k < C; ++k) y[k] = row_of(columns, j + c + k);
      products<S>(x, y, rows.stride, to + r * kGhostTile + c);
    }
}
static void gram_tile(DType type, const Block& rows, const Block& columns, int64_t i, int64_t j, double* to) {
  if (type == DType::f64) gram_tile<double>(rows, columns, i, j, to);
  else gram_tile<float>(rows, columns, i, j, to);
}

void ghost_blocks(const GhostNorm& s, int64_t lo, int64_t hi, double* scratch, double* partial) {
  const int64_t blocks = s.blocks(), room = ghost_scratch(s) / 2, room_of_a = kGhostBlock * (s.a.columns + kGhostLanes);
  for (int64_t unit = lo; unit < hi; ++unit) {
    const int64_t sample = unit / blocks * s.steps, i0 = unit % blocks * kGhostBlock;
    const int64_t rows = smaller<int64_t>(kGhostBlock, s.steps - i0);
    const Block a = block_of(s.a, sample + i0, rows, scratch), g = block_of(s.g, sample + i0, rows, scratch + room_of_a);
    alignas(64) double total[kGhostBlock * kGhostBlock] = {};
    for (int64_t j0 = 0; j0 <= i0; j0 += kGhostBlock) {
      const int64_t columns = smaller<int64_t>(kGhostBlock, s.steps - j0);
      const bool diagonal = j0 == i0;
      const Block b = diagonal ? a : block_of(s.a, sample + j0, columns, scratch + room);
      const Block h = diagonal ? g : block_of(s.g, sample + j0, columns, scratch + room + room_of_a);
      for (int64_t i = 0; i < rows; i += kGhostTile)
        for (int64_t j = 0; j < (diagonal ? i + 1 : columns); j += kGhostTile) {
          double inputs[kGhostTile * kGhostTile], grads[kGhostTile * kGhostTile];
          gram_tile(s.a.type, a, b, i, j, inputs);
          gram_tile(s.g.type, g, h, i, j, grads);
          const double weight = diagonal && i == j ? 1.0 : 2.0;
          for (int64_t r = 0; r < smaller<int64_t>(kGhostTile, rows - i); ++r)
            for (int64_t c = 0; c < smaller<int64_t>(kGhostTile, columns - j); ++c) {
              const int64_t k = r * kGhostTile + c;
              total[(i + r) * kGhostBlock + j + c] += weight * ((inputs[k] + s.bias) * grads[k]);
            }
          for (int64_t r = 0; weight == 1.0 && r < smaller<int64_t>(kGhostTile, rows - i); ++r) {
            const int64_t k = r * kGhostTile + r;
            total[(i + r) * kGhostBlock + i + r] += s.rounding * ((inputs[k] + s.bias) * grads[k]);
          }
        }
    }
    partial[unit] = fold(total, kGhostBlock * kGhostBlock);
  }
}

// ---- norms' weights and biases

template <class S>
static void affine_sample(const AffineGrads& s, int64_t sample) {
  constexpr int kVectors = kRegisters / 4, kColumns = kVectors * L;  // whose two sums take half of the registers
  using T = Wide<S>;
  for (int64_t column = 0; column < s.columns; column += kColumns) {
    const int64_t n = smaller<int64_t>(kColumns, s.columns - column);
    V weights[kVectors] = {}, biases[kVectors] = {};
    S last_x[kColumns] = {}, last_g[kColumns] = {};
    T wide_x[kColumns], wide_g[kColumns];
    for (int64_t row = sample * s.steps; row < (sample + 1) * s.steps; ++row) {
      const S* x = static_cast<const S*>(s.x) + row * s.columns + column;
      const S* g = static_cast<const S*>(s.g) + row * s.columns + column;
      if (n < kColumns) {
        for (int64_t k = 0; k < n; ++k) last_x[k] = x[k], last_g[k] = g[k];
        x = last_x, g = last_g;
      }
      const T *u = widened<kColumns>(x, wide_x), *v = widened<kColumns>(g, wide_g);
      const V mean = V{} + s.mean_of(row), scale = V{} + s.scale[row];
#pragma GCC unroll 8
      for (int p = 0; p < kVectors; ++p) {
        const V grad = load(v + p * L);
        weights[p] += affine_product(grad, load(u + p * L), mean, scale);
        biases[p] += grad;
      }
    }
    T* const to = static_cast<T*>(s.out) + sample * s.columns + column;
    const auto store = [&](const V* sums, T* to) {
      double numbers[kColumns];
      __builtin_memcpy(numbers, sums, sizeof numbers);
      for (int64_t k = 0; k < n; ++k) narrow(numbers[k], to[k]);
    };
    store(weights, to);
    if (s.bias) store(biases, to + s.batch * s.columns);
  }
}

void affine_samples(const AffineGrads& s, int64_t lo, int64_t hi) {
  with_type(s.type, [&]<class S>(S) {
    for (int64_t sample = lo; sample < hi; ++sample) affine_sample<S>(s, sample);
  });
}

// ---- embeddings and scaling

double norm_of_rows(const EmbeddingNorm& s, int64_t sample, const int32_t* steps, int64_t count, int64_t ahead) {
  constexpr int kParts = kNormLanes / L, kAtOnce = 32 * kNormLanes, kRows = 4;
  alignas(64) double row[kAtOnce], squares[kAtOnce], lanes[kNormLanes];
  const bool several = count > 1 && s.rounding > 0.0;
  V sum[kParts] = {};
  with_type(s.type, [&]<class S>(S) {
    const S* g = static_cast<const S*>(s.g) + sample * s.steps * s.columns;
    for (int64_t k = 0; k < s.columns; k += kAtOnce) {
      const int64_t n = smaller<int64_t>(kAtOnce, s.columns - k), whole = (n + kNormLanes - 1) / kNormLanes * kNormLanes;
      const auto at = [&](int64_t i) { return g + steps[i] * s.columns + k; };
      const S* x = at(0);
      for (int64_t j = 0; j < n; ++j) row[j] = double(widen(x[j]));
      for (int64_t j = n; j < whole; ++j) row[j] = 0.0;
      for (int64_t j = 0; several && j < whole; ++j) squares[j] = row[j] * row[j];
      for (int64_t r = 0; r < count; r += kRows) {
        const int64_t rows = smaller<int64_t>(kRows, count - r);
        for (int64_t i = r + kRows; i < smaller(r + kRows + rows, count + ahead); ++i) {  // of this sum or the next
          const char* line = reinterpret_cast<const char*>(at(i));
          for (int64_t j = 0; steps[i] != steps[i - 1] + 1 && j < n * int64_t(sizeof(S)); j += 64) __builtin_prefetch(line + j);
        }
        for (int64_t i = larger<int64_t>(r, 1); several && i < r + rows; ++i) {
          x = at(i);
          for (int64_t j = 0; j < n; ++j) squares[j] += double(widen(x[j])) * double(widen(x[j]));
        }
        if (r > 0 && rows == kRows) {
          const S *x0 = at(r), *x1 = at(r + 1), *x2 = at(r + 2), *x3 = at(r + 3);
          for (int64_t j = 0; j < n; ++j)
            row[j] = (((row[j] + double(widen(x0[j]))) + double(widen(x1[j]))) + double(widen(x2[j]))) + double(widen(x3[j]));
        } else {
          for (int64_t i = larger<int64_t>(r, 1); i < r + rows; ++i) {
            x = at(i);
            for (int64_t j = 0; j < n; ++j) row[j] += double(widen(x[j]));
          }
        }
      }
      for (int64_t j = 0; j < whole; j += kNormLanes)
#pragma GCC unroll 16
        for (int p = 0; p < kParts; ++p) {
          const V v = load(row + j + p * L);
          sum[p] += v * v;
          if (several) sum[p] += s.rounding * load(squares + j + p * L);
        }
    }
  });
  __builtin_memcpy(lanes, sum, sizeof lanes);
  return fold(lanes, kNormLanes);
}

void scale_range(void* data, int64_t n, double factor, DType type) {
  with_type(type, [&]<class S>(S) {
    S* __restrict x = static_cast<S*>(data);
    constexpr int64_t kScaled = 256;  // at a time
    const auto f = Wide<S>(factor);
    if (f == 0)
      for (int64_t k = 0; k < n; ++k) x[k] = S{};
    else
      for (int64_t k = 0; k < n; k += kScaled) {
        Wide<S> y[kScaled];
        const int64_t m = smaller<int64_t>(kScaled, n - k);
        for (int64_t j = 0; j < m; ++j) y[j] = scaled_within<S>(f, widen(x[k + j]));
        for (int64_t j = 0; j < m; ++j) narrow(y[j], x[k + j]);
      }
  });
}
}  // namespace dither::DITHER_ISA
