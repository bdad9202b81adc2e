#include "vector.h"

namespace dither::DITHER_ISA {
template <class T>
static INLINE T* terms_of(void* scratch) {
  return static_cast<T*>(scratch);
}
template <class S>
static INLINE S* room_of(const Costs& c, void* scratch) {
  return reinterpret_cast<S*>(static_cast<char*>(scratch) + kRowBlock * whole_lines(c.m, 8) * 8);
}

// A block of rows: terms 2^(shift + g - C), and their products with y, of whole lines; 0 in what is left of the block.
template <class T, class S>
static INLINE void block(const Costs& c, int64_t problem, int64_t i, int64_t count, const T* g, const T* y, const double* f,
                         void* scratch, const S* (&row)[kRowBlock], double (&shift)[kRowBlock], T (&product)[kRowBlock]) {
  const int64_t pitch = whole_lines(c.m, sizeof(T));
  T* terms = terms_of<T>(scratch);
  cost_rows<T, S>(c, problem, i, count, room_of<S>(c, scratch), row);
  Vector<T> shifts[kRowBlock], sum[kRowBlock] = {};
  for (int r = 0; r < kRowBlock; ++r) {
    shift[r] = r < count ? double(T(f[i + r])) : -__builtin_inf();
    shifts[r] = T(shift[r]) - Vector<T>{};
  }
  row_terms<T, S>(c, row, shifts, g, y, terms, pitch, sum);
  for (int r = 0; r < kRowBlock; ++r) product[r] = sum_of<T>(sum[r]);
}

template <class T, class S>
static void sums(const Costs& c, int64_t problem, int64_t lo, int64_t hi, const Columns& of, const double* f, const PlanSums& p,
                 void* scratch, T* columns) {
  constexpr double none = -__builtin_inf();
  constexpr int L = Lanes<T>::count;
  const int64_t pitch = whole_lines(c.m, sizeof(T));
  const T *g = static_cast<const T*>(of.g), *terms = terms_of<T>(scratch), *y = static_cast<const T*>(p.y);
  for (int64_t j = 0; j < pitch; ++j) columns[j] = 0;
  for (int64_t i = lo; i < hi; i += kRowBlock) {
    const int64_t count = smaller<int64_t>(kRowBlock, hi - i);
    const S* row[kRowBlock];
    double shift[kRowBlock];
    T product[kRowBlock], factor[kRowBlock];
    block<T, S>(c, problem, i, count, g, y, f, scratch, row, shift, product);
    for (int r = 0; r < kRowBlock; ++r) {
      const bool alive = r < count && f[i + smaller<int64_t>(r, count - 1)] > none;
      const double times = alive ? exp2_of_double(f[i + r] - shift[r]) : 0.0;
      factor[r] = T(p.a && alive ? times * times * double(product[r]) / p.a[i + r] : times);
      if (!p.rows || r >= count) continue;
      p.rows[i + r] = times * double(product[r]);
      Vector<T> linear = {};
      for_columns<T, S>(c.m, [&](int64_t j, auto&& at) FLAT {
        const Vector<T> e = load(terms + r * pitch + j) * load(y + j), cost = at(row[r]);
        linear += e > Vector<T>{} ? e * cost : Vector<T>{};  // nothing of a forbidden pair
      });
      p.linear[i + r] = times * double(sum_of<T>(linear));
    }
    for (int64_t j = 0; j < c.m; j += L) {
      Vector<T> column = load(columns + j);
#pragma GCC unroll 4
      for (int r = 0; r < kRowBlock; ++r) column = fused<T>(load(terms + r * pitch + j), factor[r] - Vector<T>{}, column);
      store(columns + j, column);
    }
  }
  if constexpr (sizeof(T) == 4) {
    const T* rest = static_cast<const T*>(of.rest);
    for (int64_t j = 0; j < pitch; ++j) columns[j] *= rest[j];
  }
}

void plan_rows(const Costs& c, int64_t problem, int64_t lo, int64_t hi, const Columns& of, const double* f, const PlanSums& p,
               void* scratch, void* columns) {
  with_types(c, [&]<class T, class S>(T, S) { sums<T, S>(c, problem, lo, hi, of, f, p, scratch, static_cast<T*>(columns)); });
}

void plan_terms(const Costs& c, int64_t problem, int64_t lo, int64_t hi, const Columns& of, const double* f, const void* ones,
                void* scratch, double* out) {
  with_types(c, [&]<class T, class S>(T, S) {
    const T *g = static_cast<const T*>(of.g), *one = static_cast<const T*>(ones), *terms = terms_of<T>(scratch);
    const int64_t pitch = whole_lines(c.m, sizeof(T));
    for (int64_t i = lo; i < hi; i += kRowBlock) {
      const int64_t count = smaller<int64_t>(kRowBlock, hi - i);
      const S* row[kRowBlock];
      double shift[kRowBlock];
      T product[kRowBlock];
      block<T, S>(c, problem, i, count, g, one, f, scratch, row, shift, product);
      for (int64_t r = 0; r < count; ++r) {
        const double rest = exp2_of_double(f[i + r] > -__builtin_inf() ? f[i + r] - shift[r] : 0.0);
        for (int64_t j = 0; j < c.m; ++j) out[(i + r) * c.m + j] = double(terms[r * pitch + j]) * double(one[j]) * rest;
      }
    }
  });
}

// y, or 1, as rows multiply it: in whole lines, times what was rounded off the columns' potentials.
void plan_vector(const Costs& c, const Columns& of, const double* y, void* to) {
  with_types(c, [&]<class T, class S>(T, S) {
    T* out = static_cast<T*>(to);
    for (int64_t j = 0; j < whole_lines(c.m, sizeof(T)); ++j) {
      out[j] = j < c.m ? T(y ? y[j] : 1.0) : T(0);
      if constexpr (sizeof(T) == 4) out[j] *= static_cast<const T*>(of.rest)[j];
    }
  });
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
                       const double* inverse_b, double least, void* scratch, const KeptEntries& to, double* mass) {
  constexpr int L = Lanes<double>::count;
  T* terms = terms_of<T>(scratch);
  const S* row[kRowBlock];
  cost_rows<T, S>(c, problem, i, 1, room_of<S>(c, scratch), row);
  const T* g = static_cast<const T*>(of.g);
  const Scale<T> scale(c.scale);
  for_columns<T, S>(
      c.m, [&](int64_t j, auto&& load_at) FLAT { store(terms + j, power<T>(scale(load_at(row[0]), load(g + j)) + T(f))); });
  int64_t count = 0;
  Vector<double> small = {};
  least = larger(least, 0x1p-1022);  // nothing is no entry
  for (int64_t j = 0; j < c.m; j += L) {
    double score[L];
    if (j + L <= c.m)
      for (int l = 0; l < L; ++l) score[l] = double(terms[j + l]) * larger(inverse_a, inverse_b[j + l]);
    else
      for (int l = 0; l < L; ++l) score[l] = j + l < c.m ? double(terms[j + l]) * larger(inverse_a, inverse_b[j + l]) : 0.0;
    if (any_above(score, least))
      for (int l = 0; l < L; ++l)
        if (score[l] >= least) {
          const int exponent = int(bit_as<uint64_t>(score[l]) >> 52);
          mass[exponent] += score[l];
          to.at[count] = int32_t(j + l);
          to.exponents[count] = int16_t(exponent);
          to.values[count++] = double(terms[j + l]);
          score[l] = 0;
        }
    small += load(score);
  }
  mass[0] += sum_of<double>(small);
  return count;
}

int64_t plan_entries(const Costs& c, int64_t problem, int64_t i, const Columns& of, double f, double inverse_a,
                     const double* inverse_b, double least, void* scratch, const KeptEntries& to, double* mass) {
  int64_t count = 0;
  with_types(c, [&]<class T, class S>(T, S) {
    count = entries<T, S>(c, problem, i, of, f, inverse_a, inverse_b, least, scratch, to, mass);
  });
  return count;
}
}  // namespace dither::DITHER_ISA
