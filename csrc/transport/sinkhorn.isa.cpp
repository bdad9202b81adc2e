#include "vector.h"

namespace dither::DITHER_ISA {
void round_columns(const Costs& c, const double* g, const Columns& to) {
  constexpr double none = -__builtin_inf();
  if (!c.narrow) {
    double* out = static_cast<double*>(to.g);
    for (int64_t j = 0; j < whole_lines(c.m, 8); ++j) out[j] = j < c.m ? g[j] : none;
    return;
  }
  float *out = static_cast<float*>(to.g), *rest = static_cast<float*>(to.rest);
  for (int64_t j = 0; j < whole_lines(c.m, 4); ++j) {
    out[j] = float(j < c.m ? g[j] : none);
    const double off = j < c.m && g[j] > none ? g[j] - double(out[j]) : 0.0;
    rest[j] = float(1.0 + off * (kLn2 + off * (0.5 * kLn2 * kLn2)));
  }
}

// Terms 2^(shift + g - C) of a row, and their sum.
template <class T, class S>
static INLINE double row_terms(const Costs& c, const S* row, double shift, const Columns& columns, T* terms) {
  const T *g = static_cast<const T*>(columns.g), *rest = static_cast<const T*>(columns.rest);
  const Scale<T> scale(c.scale);
  const Vector<T> shifts = T(shift) - Vector<T>{};
  Vector<T> sum = {};
  for_columns<T, S>(c.m, [&](int64_t j, auto&& at) FLAT {
    const Vector<T> e = power<T>(scale(at(row), load(g + j)) + shifts);
    store(terms + j, e);
    if constexpr (sizeof(T) == 8) sum += e;
    else sum = fused<T>(e, load(rest + j), sum);
  });
  return double(sum_of<T>(sum));
}

// The largest g - C of a row.
template <class T, class S>
static double row_maximum(const Costs& c, const S* row, const T* g) {
  const Scale<T> scale(c.scale);
  Vector<T> most = Vector<T>{} - T(__builtin_inf());
  for_columns<T, S>(c.m, [&](int64_t j, auto&& at) FLAT {
    const Vector<T> x = scale(at(row), load(g + j));
    most = x > most ? x : most;
  });
  T lanes[Lanes<T>::count], high = -T(__builtin_inf());
  store(lanes, most);
  for (T x : lanes) high = larger(high, x);
  return double(high);
}

template <class T, class S>
static double rows(const Sinkhorn& s, int64_t problem, int64_t lo, int64_t hi, const Columns& columns, double* f, void* scratch,
                   T* sums) {
  const Costs& c = s.c;
  const int64_t pitch = whole_lines(c.m, sizeof(T));
  const T *g = static_cast<const T*>(columns.g), *rest = static_cast<const T*>(columns.rest);
  T* terms = static_cast<T*>(scratch);
  S* room = reinterpret_cast<S*>(static_cast<char*>(scratch) + kRowBlock * whole_lines(c.m, 8) * 8);
  const double* a = s.a + problem * c.n;
  const Scale<T> scale(c.scale);
  constexpr double none = -__builtin_inf();
  double error = 0;
  for (int64_t j = 0; j < pitch; ++j) sums[j] = 0;
  for (int64_t i = lo; i < hi; i += kRowBlock) {
    const int64_t count = smaller<int64_t>(kRowBlock, hi - i);
    const S* row[kRowBlock];
    cost_rows<T, S>(c, problem, i, count, room, row);
    Vector<T> shift[kRowBlock], sum[kRowBlock] = {};
    double base[kRowBlock], total[kRowBlock];
    for (int r = 0; r < kRowBlock; ++r) {
      const bool alive = r < count && a[i + r] > 0.0;
      base[r] = !alive ? none : f[i + r] > none ? double(T(f[i + r])) : 0.0;
      shift[r] = T(base[r]) - Vector<T>{};
    }
    for_columns<T, S>(c.m, [&](int64_t j, auto&& at) FLAT {
      const Vector<T> column = load(g + j);
      Vector<T> remainder = {};
      if constexpr (sizeof(T) == 4) remainder = load(rest + j);
#pragma GCC unroll 4
      for (int r = 0; r < kRowBlock; ++r) {
        const Vector<T> e = power<T>(scale(at(row[r]), column) + shift[r]);
        store(terms + r * pitch + j, e);
        if constexpr (sizeof(T) == 8) sum[r] += e;
        else sum[r] = fused<T>(e, remainder, sum[r]);
      }
    });
    T factor[kRowBlock];
    bool usual = count == kRowBlock && s.exact();
    for (int r = 0; r < kRowBlock; ++r) {
      total[r] = double(sum_of<T>(sum[r]));
      usual &= total[r] > kLeastRow<T> && total[r] < kMostRow<T>;  // so that a is not 0
    }
    if (usual) {
      double ratio[kRowBlock];
      for (int r = 0; r < kRowBlock; ++r) ratio[r] = a[i + r] / total[r];
      for (int r = 0; r < kRowBlock; ++r) factor[r] = T(ratio[r]);
      for (int r = 0; r < kRowBlock; ++r) f[i + r] = base[r] + logarithm(ratio[r]) * kLog2e;
    }
    for (int r = 0; r < kRowBlock && !usual; ++r) {
      factor[r] = 0;
      if (r >= count) continue;
      if (!(a[i + r] > 0.0)) {
        f[i + r] = none;
        continue;
      }
      if (!(total[r] > kLeastRow<T> && total[r] < kMostRow<T>)) {
        const double most = row_maximum<T, S>(c, row[r], g);
        if (!(most > none)) {  // nowhere to go
          error += a[i + r];
          continue;
        }
        base[r] = -most;
        total[r] = row_terms<T, S>(c, row[r], base[r], columns, terms + r * pitch);
      }
      const double ratio = a[i + r] / total[r], full = base[r] + log2_of_double(ratio);
      if (s.exact()) {
        f[i + r] = full;
        factor[r] = T(ratio);
      } else {
        f[i + r] = relaxed(f[i + r], full, s.damp_a, s.omega);
        const double times = exp2_of_double(f[i + r] - base[r]);
        factor[r] = T(times);
        error += absolute(total[r] * times - wanted_marginal(a[i + r], f[i + r], s.damp_a));
      }
    }
    constexpr int L = Lanes<T>::count;
    for (int64_t j = 0; j < c.m; j += L) {
      Vector<T> column = load(sums + j);
#pragma GCC unroll 4
      for (int r = 0; r < kRowBlock; ++r) column = fused<T>(load(terms + r * pitch + j), factor[r] - Vector<T>{}, column);
      store(sums + j, column);
    }
  }
  if constexpr (sizeof(T) == 4)
    for (int64_t j = 0; j < pitch; ++j) sums[j] *= rest[j];
  return error;
}

double sinkhorn_rows(const Sinkhorn& s, int64_t problem, int64_t lo, int64_t hi, const Columns& columns, double* f,
                     void* scratch, void* sums) {
  double error = 0;
  with_types(
      s.c, [&]<class T, class S>(T, S) { error = rows<T, S>(s, problem, lo, hi, columns, f, scratch, static_cast<T*>(sums)); });
  return error;
}

void join_columns(const Costs& c, int64_t chunks, const void* sums, double* columns) {
  with_types(c, [&]<class T, class S>(T, S) {
    const int64_t pitch = whole_lines(c.m, sizeof(T));
    const T* from = static_cast<const T*>(sums);
    for (int64_t j = 0; j < c.m; ++j) columns[j] = double(from[j]);
    for (int64_t k = 1; k < chunks; ++k)
      for (int64_t j = 0; j < c.m; ++j) columns[j] += double(from[k * pitch + j]);
  });
}

double sinkhorn_columns(const Sinkhorn& s, int64_t problem, const double* columns, double* g, bool move) {
  const double* b = s.b + problem * s.c.m;
  constexpr double none = -__builtin_inf();
  double error = 0;
  for (int64_t j = 0; j < s.c.m; ++j) error += absolute(columns[j] - wanted_marginal(b[j], g[j], s.damp_b));
  if (!move) return error;
  if (s.damp_b == 1.0 && s.omega == 1.0) {
    for (int64_t j = 0; j < s.c.m; ++j) {
      const bool moves = b[j] > 0.0 && columns[j] > 0.0;
      const double more = logarithm(moves ? b[j] / columns[j] : 1.0) * kLog2e;
      g[j] = b[j] > 0.0 ? g[j] + more : none;
    }
  } else {
    for (int64_t j = 0; j < s.c.m; ++j)
      if (!(b[j] > 0.0)) g[j] = none;
      else if (columns[j] > 0.0) g[j] = relaxed(g[j], g[j] + log2_of_double(b[j] / columns[j]), s.damp_b, s.omega);
  }
  return error;
}

template <class S>
static double cost_at(const Costs& c, int64_t problem, int64_t i, int64_t j) {
  const S* x = static_cast<const S*>(c.x) + problem * c.x_batch;
  if (c.ground == Ground::given) return double(x[i * c.m + j]);
  const S* y = static_cast<const S*>(c.y) + problem * c.y_batch + j;
  S sum = 0;
  for (int64_t k = 0; k < c.dim; ++k) sum = distance_part(c.ground, x[i * c.dim + k], y[k * c.m], sum);
  return double(c.ground == Ground::euclidean ? square_root(sum) : sum);
}

double column_log(const Costs& c, int64_t problem, int64_t j, const double* f) {
  constexpr double none = -__builtin_inf();
  double most = none, sum = 0;
  with_types(c, [&]<class T, class S>(T, S) {
    for (int64_t i = 0; i < c.n; ++i)
      if (f[i] > none) most = larger(most, f[i] - c.scale * cost_at<S>(c, problem, i, j));
    if (!(most > none)) return;
    for (int64_t i = 0; i < c.n; ++i)
      if (f[i] > none) sum += exp2_of_double(f[i] - c.scale * cost_at<S>(c, problem, i, j) - most);
  });
  return most > none ? most + log2_of_double(sum) : none;
}
}  // namespace dither::DITHER_ISA
