#include "vector.h"

namespace dither::DITHER_ISA {
template <class T, class S>
static void sums(const Costs& c, int64_t problem, int64_t lo, int64_t hi, const Columns& of, const double* f, const PlanSums& p,
                 void* scratch, double* columns) {
  const T* g = static_cast<const T*>(of.g);
  [[maybe_unused]] const T* rest = static_cast<const T*>(of.rest);
  T* terms = static_cast<T*>(scratch);
  S* room = reinterpret_cast<S*>(static_cast<char*>(scratch) + kRowBlock * whole_lines(c.m, 8) * 8);
  const Scale<T> scale(c.scale);
  constexpr double none = -__builtin_inf();
  for (int64_t j = 0; j < c.m; ++j) columns[j] = 0;
  for (int64_t i = lo; i < hi; i += kRowBlock) {
    const int64_t count = smaller<int64_t>(kRowBlock, hi - i);
    const S* row[kRowBlock];
    cost_rows<T, S>(c, problem, i, count, room, row);
    for (int r = 0; r < count; ++r) {
      const double shift = double(T(f[i + r]));
      Vector<T> total = {}, linear = {};
      for_columns<T, S>(c.m, [&](int64_t j, auto&& at) FLAT {
        const Vector<T> cost = at(row[r]);
        Vector<T> e = power<T>(scale(cost, load(g + j)) + T(shift));
        if constexpr (sizeof(T) == 4) e *= load(rest + j);
        store(terms + j, e);
        total += e;
        linear += e > Vector<T>{} ? e * cost : e;  // nothing of a forbidden pair
      });
      double times = f[i + r] > none ? exp2_of_double(f[i + r] - shift) : 0.0;
      if (p.rows) p.rows[i + r] = f[i + r] > none ? times * double(sum_of<T>(total)) : 0.0;
      if (p.linear) p.linear[i + r] = f[i + r] > none ? times * double(sum_of<T>(linear)) : 0.0;
      if (!(f[i + r] > none)) continue;
      if (p.y) {
        double lanes[8] = {};
        int64_t j = 0;
        for (; j + 8 <= c.m; j += 8)
          for (int l = 0; l < 8; ++l) lanes[l] += double(terms[j + l]) * p.y[j + l];
        for (; j < c.m; ++j) lanes[0] += double(terms[j]) * p.y[j];
        times *= times / p.a[i + r] *
                 (((lanes[0] + lanes[4]) + (lanes[1] + lanes[5])) + ((lanes[2] + lanes[6]) + (lanes[3] + lanes[7])));
      }
      for (int64_t j = 0; j < c.m; ++j) columns[j] += times * double(terms[j]);
    }
  }
}

void plan_rows(const Costs& c, int64_t problem, int64_t lo, int64_t hi, const Columns& of, const double* f, const PlanSums& p,
               void* scratch, double* columns) {
  with_types(c, [&]<class T, class S>(T, S) { sums<T, S>(c, problem, lo, hi, of, f, p, scratch, columns); });
}

// Whether a number of n is at least `least`; n a multiple of the lanes.
static INLINE bool any_above(const double* x, double least) {
  const Vector<double> v = load(x);
#if defined(__AVX512F__)
  return _mm512_cmp_pd_mask(__m512d(v), _mm512_set1_pd(least), _CMP_GE_OQ) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_pd(_mm256_cmp_pd(__m256d(v), _mm256_set1_pd(least), _CMP_GE_OQ)) != 0;
#else
  bool any = false;
  for (int l = 0; l < Lanes<double>::count; ++l) any |= v[l] >= least;
  return any;
#endif
}

template <class T, class S>
static int64_t entries(const Costs& c, int64_t problem, int64_t i, const Columns& of, double f, double inverse_a,
                       const double* inverse_b, double least, void* scratch, int32_t* at, double* values, double* left) {
  constexpr int L = Lanes<double>::count;
  T* terms = static_cast<T*>(scratch);
  const S* row[kRowBlock];
  cost_rows<T, S>(c, problem, i, 1, reinterpret_cast<S*>(static_cast<char*>(scratch) + kRowBlock * whole_lines(c.m, 8) * 8),
                  row);
  const T* g = static_cast<const T*>(of.g);
  const Scale<T> scale(c.scale);
  for_columns<T, S>(
      c.m, [&](int64_t j, auto&& load_at) FLAT { store(terms + j, power<T>(scale(load_at(row[0]), load(g + j)) + T(f))); });
  int64_t count = 0;
  Vector<double> small = {};
  least = larger(least, 0x1p-1022);  // nothing is no entry
  for (int64_t j = 0; j < c.m; j += L) {
    double score[L];
    for (int l = 0; l < L; ++l) {
      const double inverse = j + l < c.m ? inverse_b[j + l] : 0.0;
      score[l] = j + l < c.m ? double(terms[j + l]) * larger(inverse_a, inverse) : 0.0;
    }
    if (any_above(score, least))
      for (int l = 0; l < L; ++l)
        if (score[l] >= least) {
          at[count] = int32_t(j + l);
          values[count++] = double(terms[j + l]);
          score[l] = 0;
        }
    small += load(score);
  }
  *left += sum_of<double>(small);
  return count;
}

int64_t plan_entries(const Costs& c, int64_t problem, int64_t i, const Columns& of, double f, double inverse_a,
                     const double* inverse_b, double least, void* scratch, int32_t* at, double* values, double* left) {
  int64_t count = 0;
  with_types(c, [&]<class T, class S>(T, S) {
    count = entries<T, S>(c, problem, i, of, f, inverse_a, inverse_b, least, scratch, at, values, left);
  });
  return count;
}
}  // namespace dither::DITHER_ISA
