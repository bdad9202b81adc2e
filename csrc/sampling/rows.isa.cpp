#include "rows.h"
#include "../common/generator_cpu.h"

namespace dither::DITHER_ISA {
constexpr int64_t kBlock = 1024, kTile = 64;  // elements at a time, in L1; a tile of the generator

// The terms of each row that are not 0.
template <class T>
struct Terms {
  int count;
  T weight[kMaxColumns];
  int column[kMaxColumns];
};
template <class T>
struct Program {
  Terms<T> row[kMaxRows];
  uint32_t used;  // columns
};
template <class T, class C>
static Program<T> program(const Rows& p, const C* table) {
  Program<T> g;
  const int rows = p.rows(), columns = p.columns();
  g.used = 0;
  for (int j = rows - 1; j >= 0; --j) {
    Terms<T>& t = g.row[j];
    t.count = 0;
    if (j == 0 && !(g.used >> p.inputs & 1)) break;  // nobody asks for d
    const int end = j == 0 ? p.inputs : p.seeds ? columns : columns - 1;
    for (int c = 0; c < end; ++c) {
      const T w = T(table[j * columns + c]);
      if (w == T(0)) continue;
      t.weight[t.count] = w;
      t.column[t.count++] = c;
      g.used |= 1u << c;
    }
  }
  return g;
}

// out may be one of the x.
template <class T, int... i>
static void combine(const Terms<T>& terms, const T* const* sources, int64_t n, T* out, Indices<0, i...>) {
  const T* const x[] = {sources[terms.column[0]], sources[terms.column[i]]...};
  const T w[] = {terms.weight[0], terms.weight[i]...};
#pragma GCC ivdep
  for (int64_t k = 0; k < n; ++k) {
    T sum = w[0] * x[0][k];
    ((sum += w[i] * x[i][k]), ...);
    out[k] = sum;
  }
}
template <int kTerms, class T>
static void combine(const Terms<T>& terms, const T* const* sources, int64_t n, T* out) {
  if constexpr (kTerms > kMaxColumns) return;
  else if (terms.count == kTerms) combine(terms, sources, n, out, typename CountTo<kTerms>::type{});
  else combine<kTerms + 1>(terms, sources, n, out);
}
template <class T>
static void combine(const Terms<T>& terms, const T* const* sources, int64_t n, T* out) {
  if (terms.count > 0) return combine<1>(terms, sources, n, out);
  for (int64_t k = 0; k < n; ++k) out[k] = T(-0.0);
}
// With coefficients for each element: those of column c at table + c stride. Several columns at a time: memory likes to be
// asked for many things.
template <class T, class C, int... i>
static void add_terms(const C* table, int64_t stride, const T* const* sources, int64_t n, T* out, Indices<i...>) {
  const C* const w[] = {table + i * stride...};
  const T* const x[] = {sources[i]...};
#pragma GCC ivdep
  for (int64_t k = 0; k < n; ++k) {
    T sum = out[k];
    ((sum = with_term(sum, T(w[i][k]), x[i][k])), ...);
    out[k] = sum;
  }
}
template <class T, class C>
static void combine(const C* table, int64_t stride, int columns, const T* const* sources, int64_t n, T* out) {
  for (int64_t k = 0; k < n; ++k) out[k] = T(-0.0);
  for (int c = 0; c < columns; c += 4) {
    const C* w = table + c * stride;
    const T* const* x = sources + c;
    const int left = columns - c;
    if (left >= 4) add_terms(w, stride, x, n, out, Indices<0, 1, 2, 3>{});
    else if (left == 3) add_terms(w, stride, x, n, out, Indices<0, 1, 2>{});
    else if (left == 2) add_terms(w, stride, x, n, out, Indices<0, 1>{});
    else add_terms(w, stride, x, n, out, Indices<0>{});
  }
}

template <class T>
static const T* widened(DType type, const void* x, int64_t at, int64_t n, T* __restrict buffer) {
  if (type == (sizeof(T) == 8 ? DType::f64 : DType::f32)) return static_cast<const T*>(x) + at;
  with_type(type, [&]<class S>(S) {
    const S* __restrict from = static_cast<const S*>(x) + at;
    for (int64_t k = 0; k < n; ++k) buffer[k] = T(widen(from[k]));
  });
  return buffer;
}
template <class T>
static void narrowed(const T* x, DType type, void* out, int64_t at, int64_t n) {
  with_type(type, [&]<class S>(S) {
    S* __restrict to = static_cast<S*>(out) + at;
    for (int64_t k = 0; k < n; ++k) put(x[k], to[k]);
  });
}

template <class T>
static void range(const Rows& p, int64_t lo, int64_t hi) {
  constexpr bool kWide = sizeof(T) == 8;
  constexpr DType kType = kWide ? DType::f64 : DType::f32;
  constexpr int64_t kWords = kWide ? 2 : 1;  // of an element
  alignas(64) T buffer[kMaxColumns][kBlock + kTile], result[kMaxRows][kBlock];
  alignas(64) uint32_t word[(kBlock + kTile) * kWords];
  const int R = p.inputs, rows = p.rows(), columns = p.columns();
  const auto program_of = [&](int64_t run) {
    const int64_t first = run * rows * columns;
    return p.by == By::step ? program<T>(p, p.table)
           : p.wide_table   ? program<T>(p, static_cast<const double*>(p.coefficients) + first)
                            : program<T>(p, static_cast<const float*>(p.coefficients) + first);
  };
  Program<T> g;
  int64_t known = -1;  // the run that g belongs to
  for (int64_t at = lo, end; at < hi; at = end) {
    const int64_t b = p.samples ? at / p.sample : 0, sample = b * p.sample, k = at - sample;
    end = smaller(hi, sample + (k / kBlock + 1) * kBlock);
    if (p.samples) end = smaller(end, sample + p.sample);
    const int64_t run = p.by == By::run ? at / p.run : 0;
    if (p.by == By::run) end = smaller(end, (run + 1) * p.run);
    if (p.by == By::element) g.used = ~0u;
    else if (run != known) g = program_of(known = run);

    const int64_t n = end - at;
    const T* x[kMaxColumns] = {};
    for (int r = 0; r < R; ++r)
      if (g.used >> r & 1) x[r] = widened(p.in_type[r], p.in[r], at, n, buffer[r]);
    if (p.seeds && g.used >> (R + 1) & 1) {
      const int64_t first = k / kTile * kTile, tiles = (k + n - first + kTile - 1) / kTile;
      words(Philox{}, p.address(b, kWide), uint64_t(first / kTile * kWords), tiles * kWords, word);
      normals(word, tiles * kTile, buffer[R + 1]);
      x[R + 1] = buffer[R + 1] + (k - first);
    }
    const auto row = [&](int j, T* to) {
      if (p.by != By::element) return combine(g.row[j], x, n, to);
      const int until = j == 0 ? R : p.seeds ? R + 2 : R + 1;
      const int64_t first = int64_t(j) * columns * p.sample + k;
      if (p.wide_table) combine(static_cast<const double*>(p.coefficients) + first, p.sample, until, x, n, to);
      else combine(static_cast<const float*>(p.coefficients) + first, p.sample, until, x, n, to);
    };
    if (g.used >> R & 1) {
      T* __restrict d = buffer[R];
      row(0, d);
      if (p.limit) {
        const T limit = p.limit_of<T>(b);
        if (p.divide)
          for (int64_t i = 0; i < n; ++i) d[i] = limited(d[i], limit, true);
        else
          for (int64_t i = 0; i < n; ++i) d[i] = limited(d[i], limit, false);
      }
      x[R] = d;
    }
    if (p.mask) row(rows - 1, result[rows - 1]);
    T* to[kMaxOutputs];
    for (int j = 0; j < p.outputs; ++j) {
      const bool direct = p.out_type[j] == kType && !p.staged && p.by != By::element;
      to[j] = direct ? static_cast<T*>(p.out[j]) + at : result[j];
      row(1 + j, to[j]);
    }
    if (p.mask) {
      const float* __restrict m = p.mask + (p.mask_of_sample ? k : at);
      const T* __restrict other = result[rows - 1];
      T* __restrict mixed = to[0];
      for (int64_t i = 0; i < n; ++i) mixed[i] = blended(T(m[i]), mixed[i], other[i]);
    }
    for (int j = 0; j < p.outputs; ++j)
      if (to[j] == result[j]) narrowed(to[j], p.out_type[j], p.out[j], at, n);
  }
}

void rows_range(const Rows& p, bool wide, int64_t lo, int64_t hi) { wide ? range<double>(p, lo, hi) : range<float>(p, lo, hi); }
}  // namespace dither::DITHER_ISA
