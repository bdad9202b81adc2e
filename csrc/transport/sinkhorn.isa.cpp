#include "vector.h"

namespace dither::DITHER_ISA {
template <class T>
static bool change(const Costs& c, const double* g, const Columns& to) {
  constexpr double none = -__builtin_inf();
  const T* from = static_cast<const T*>(to.g);
  T* rest = static_cast<T*>(to.rest);
  double most = 0;
  for (int64_t j = 0; j < c.m; ++j) {
    const double off = g[j] > none ? g[j] - double(from[j]) : 0.0;
    most = larger(most, absolute(off));
    rest[j] = T(exp2_of_double(off));
  }
  for (int64_t j = c.m; j < whole_lines(c.m, sizeof(T)); ++j) rest[j] = 1;
  return most <= kMostChange<T>;
}

bool change_columns(const Costs& c, const double* g, const Columns& to) {
  return c.narrow ? change<float>(c, g, to) : change<double>(c, g, to);
}

void round_columns(const Costs& c, const double* g, const Columns& to) {
  const auto round = [&]<class T>(T* out) {
    for (int64_t j = 0; j < whole_lines(c.m, sizeof(T)); ++j) out[j] = T(j < c.m ? g[j] : -__builtin_inf());
  };
  if (c.narrow) round(static_cast<float*>(to.g));
  else round(static_cast<double*>(to.g));
  change_columns(c, g, to);
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
static double rows(const Sinkhorn& s, int64_t problem, int64_t lo, int64_t hi, const Columns& columns, const Terms& kept,
                   double* f, void* scratch, T* sums) {
  const Costs& c = s.c;
  const int64_t pitch = whole_lines(c.m, sizeof(T));
  const T *g = static_cast<const T*>(columns.g), *rest = static_cast<const T*>(columns.rest);
  S* room = reinterpret_cast<S*>(static_cast<char*>(scratch) + kRowBlock * whole_lines(c.m, 8) * 8);
  const double* a = s.a + problem * c.n;
  const Scale<T> scale(c.scale);
  constexpr double none = -__builtin_inf();
  constexpr int L = Lanes<T>::count;
  const bool exact = s.exact(problem);
  const double least = kept.made ? kLeastKeptRow<T> : kLeastRow<T>;
  double error = 0;
  for (int64_t j = 0; j < pitch; ++j) sums[j] = 0;
  for (int64_t i = lo; i < hi; i += kRowBlock) {
    const int64_t count = smaller<int64_t>(kRowBlock, hi - i);
    T* terms = kept.rows ? static_cast<T*>(kept.rows) + i * pitch : static_cast<T*>(scratch);
    const S* row[kRowBlock];
    Vector<T> sum[kRowBlock] = {};
    double base[kRowBlock], total[kRowBlock];
    if (kept.made) {
      for (int r = 0; r < kRowBlock; ++r) base[r] = r < count ? kept.base[i + r] : none;
      for (int64_t j = 0; j < c.m; j += L) {
        const Vector<T> column = load(rest + j);
#pragma GCC unroll 4
        for (int r = 0; r < kRowBlock; ++r) sum[r] = fused<T>(load(terms + r * pitch + j), column, sum[r]);
      }
    } else {
      cost_rows<T, S>(c, problem, i, count, room, row);
      Vector<T> shift[kRowBlock];
      for (int r = 0; r < kRowBlock; ++r) {
        const bool alive = r < count && a[i + r] > 0.0;
        base[r] = !alive ? none : f[i + r] > none ? double(T(f[i + r])) : 0.0;
        shift[r] = T(base[r]) - Vector<T>{};
      }
      row_terms<T, S>(c, row, shift, g, rest, terms, pitch, sum);
    }
    T factor[kRowBlock];
    bool usual = exact;
    for (int r = 0; r < kRowBlock; ++r) {
      total[r] = double(sum_of<T>(sum[r]));
      usual &= r < count && trusted<T>(total[r], a[i + r], least);  // so that a is not 0
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
      if (!trusted<T>(total[r], a[i + r], least)) {
        if (kept.made) cost_rows<T, S>(c, problem, i, count, room, row);
        const double most = row_maximum<T, S>(c, row[r], g);
        if (!(most > none)) {  // nowhere to go
          error += a[i + r];
          continue;
        }
        base[r] = -most;
        const S* const one[] = {row[r]};
        const Vector<T> shift[] = {T(base[r]) - Vector<T>{}};
        Vector<T> again[1] = {};
        row_terms<T, S>(c, one, shift, g, rest, terms + r * pitch, pitch, again);
        total[r] = double(sum_of<T>(again[0]));
      }
      const double ratio = a[i + r] / total[r], full = base[r] + log2_of_double(ratio);
      if (exact) {
        f[i + r] = full;
        factor[r] = T(ratio);
      } else {
        f[i + r] = relaxed(f[i + r], full, s.damp_a, s.omega[problem]);
        const double times = exp2_of_double(f[i + r] - base[r]);
        factor[r] = T(times);
        error += absolute(total[r] * times - wanted_marginal(a[i + r], f[i + r], s.damp_a));
      }
    }
    if (kept.rows)
      for (int r = 0; r < count; ++r) kept.base[i + r] = base[r];
    for (int64_t j = 0; j < c.m; j += L) {
      Vector<T> column = load(sums + j);
#pragma GCC unroll 4
      for (int r = 0; r < kRowBlock; ++r) column = fused<T>(load(terms + r * pitch + j), factor[r] - Vector<T>{}, column);
      store(sums + j, column);
    }
  }
  for (int64_t j = 0; j < pitch; ++j) sums[j] *= rest[j];
  return error;
}

double sinkhorn_rows(const Sinkhorn& s, int64_t problem, int64_t lo, int64_t hi, const Columns& columns, const Terms& kept,
                     double* f, void* scratch, void* sums) {
  double error = 0;
  with_types(s.c, [&]<class T, class S>(T, S) {
    error = rows<T, S>(s, problem, lo, hi, columns, kept, f, scratch, static_cast<T*>(sums));
  });
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

double column_error(const Sinkhorn& s, int64_t problem, const double* columns, const double* g) {
  const double* b = s.b + problem * s.c.m;
  double error = 0;
  for (int64_t j = 0; j < s.c.m; ++j) error += absolute(columns[j] - wanted_marginal(b[j], g[j], s.damp_b));
  return error;
}

void move_columns(const Sinkhorn& s, int64_t problem, const double* columns, double* g) {
  const double* b = s.b + problem * s.c.m;
  const double omega = s.omega[problem];
  constexpr double none = -__builtin_inf();
  if (s.damp_b == 1.0 && omega == 1.0) {
    for (int64_t j = 0; j < s.c.m; ++j) {
      const bool moves = b[j] > 0.0 && columns[j] > 0.0;
      const double more = logarithm(moves ? b[j] / columns[j] : 1.0) * kLog2e;
      g[j] = b[j] > 0.0 ? g[j] + more : none;
    }
  } else {
    for (int64_t j = 0; j < s.c.m; ++j)
      if (!(b[j] > 0.0)) g[j] = none;
      else if (columns[j] > 0.0) g[j] = relaxed(g[j], g[j] + log2_of_double(b[j] / columns[j]), s.damp_b, omega);
  }
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
