#include "rows.h"
#include "../common/launch.cuh"
#include "../common/normal.h"
#include "../common/philox.h"

namespace dither {
constexpr int kThreads = 256;

template <class T>
struct Table {
  T weight[kMaxRows * kMaxColumns];
};

// The elements of a thread: neighbours, or those that one generator block draws.
template <bool kDrawn, int E>
struct Elements {
  int64_t at[E], sample[E], place[E];  // in the tensors, of which sample, in that
  bool there[E];

  DITHER_HD Elements(const Rows& p, int64_t unit, int64_t units_of_sample) {
    if constexpr (kDrawn) {
      const int64_t b = unit / units_of_sample, block = unit % units_of_sample;
      for (int i = 0; i < E; ++i) {
        place[i] = block / 16 * (16 * E) + 16 * i + block % 16;
        sample[i] = b;
        at[i] = b * p.sample + place[i];
        there[i] = place[i] < p.sample;
      }
    } else {
      int64_t b = p.samples ? unit * E / p.sample : 0, k = unit * E - b * p.sample;
      for (int i = 0; i < E; ++i, ++k) {
        if (p.samples && k == p.sample) ++b, k = 0;
        at[i] = unit * E + i;
        sample[i] = b;
        place[i] = k;
        there[i] = at[i] < p.numel;
      }
    }
  }
};

template <class S, int E>
struct alignas(E * sizeof(S)) Pack {
  S x[E];
};
template <class S, int E>
DITHER_HD bool is_aligned(const void* x) {
  return reinterpret_cast<uintptr_t>(x) % sizeof(Pack<S, E>) == 0;
}
template <class T, bool kDrawn, int E>
DITHER_HD void load(DType type, const void* x, const Elements<kDrawn, E>& e, T (&to)[E]) {
  with_type(type, [&](auto tag) {
    using S = decltype(tag);
    const S* from = static_cast<const S*>(x);
    if (!kDrawn && e.there[E - 1] && is_aligned<S, E>(x)) {
      const Pack<S, E> pack = *reinterpret_cast<const Pack<S, E>*>(from + e.at[0]);
      for (int i = 0; i < E; ++i) to[i] = T(widen(pack.x[i]));
    } else {
      for (int i = 0; i < E; ++i) to[i] = e.there[i] ? T(widen(from[e.at[i]])) : T(0);
    }
  });
}
template <class T, bool kDrawn, int E>
DITHER_HD void store(DType type, void* x, const Elements<kDrawn, E>& e, const T (&from)[E]) {
  with_type(type, [&](auto tag) {
    using S = decltype(tag);
    S* to = static_cast<S*>(x);
    if (!kDrawn && e.there[E - 1] && is_aligned<S, E>(x)) {
      Pack<S, E> pack;
      for (int i = 0; i < E; ++i) put(from[i], pack.x[i]);
      *reinterpret_cast<Pack<S, E>*>(to + e.at[0]) = pack;
    } else {
      for (int i = 0; i < E; ++i)
        if (e.there[i]) put(from[i], to[e.at[i]]);
    }
  });
}

template <class T, By kBy, bool kDrawn>
__global__ void __launch_bounds__(kThreads) rows_kernel(const __grid_constant__ Rows p, const __grid_constant__ Table<T> table,
                                                        int64_t units, int64_t units_of_sample) {
  constexpr int E = 16 / sizeof(T);
  const int R = p.inputs, rows = p.rows(), columns = p.columns();
  const int64_t stride = int64_t(gridDim.x) * kThreads;
  for (int64_t unit = int64_t(blockIdx.x) * kThreads + threadIdx.x; unit < units; unit += stride) {
    const Elements<kDrawn, E> e(p, unit, units_of_sample);
    int64_t begin[E] = {};  // of the coefficients of an element
    for (int i = 0; i < E && kBy != By::step; ++i)
      begin[i] = !e.there[i] ? 0 : kBy == By::run ? e.at[i] / p.run * (rows * columns) : e.place[i];
    const auto coefficient = [&](int64_t i) {
      return p.wide_table ? T(static_cast<const double*>(p.coefficients)[i]) : T(static_cast<const float*>(p.coefficients)[i]);
    };
    T sum[kMaxRows][E];
    for (int j = 0; j < kMaxRows; ++j)
      for (int i = 0; i < E; ++i) sum[j][i] = T(-0.0);
    const auto add_column = [&](int c, int first_row, const T(&x)[E]) {
#pragma unroll
      for (int j = 0; j < kMaxRows; ++j) {
        if (j < first_row || j >= rows) continue;
        const int64_t which = j * columns + c;
        if constexpr (kBy == By::step) {
          const T w = table.weight[which];
          if (w != T(0))
            for (int i = 0; i < E; ++i) sum[j][i] += w * x[i];
        } else if constexpr (kBy == By::run) {
          const T w = coefficient(begin[0] + which);
          for (int i = 0; i < E; ++i)
            sum[j][i] = with_term(sum[j][i], begin[i] == begin[0] ? w : coefficient(begin[i] + which), x[i]);
        } else {
          for (int i = 0; i < E; ++i) sum[j][i] = with_term(sum[j][i], coefficient(which * p.sample + begin[i]), x[i]);
        }
      }
    };
    for (int r = 0; r < R; ++r) {
      if constexpr (kBy == By::step) {
        bool used = false;
        for (int j = 0; j < rows; ++j) used = used || table.weight[j * columns + r] != T(0);
        if (!used) continue;
      }
      T x[E];
      load(p.in_type[r], p.in[r], e, x);
      add_column(r, 0, x);
    }
    T d[E];
    for (int i = 0; i < E; ++i)
      d[i] = p.limit && e.there[i] ? limited(sum[0][i], p.template limit_of<T>(e.sample[i]), p.divide) : sum[0][i];
    add_column(R, 1, d);
    if constexpr (kDrawn) {
      uint32_t w[Philox::words];
      Philox::block(p.address(e.sample[0], sizeof(T) == 8), uint64_t(unit % units_of_sample), w);
      T z[E];
      if constexpr (E == 2) {
        box_muller(w[0], w[1], w[2], w[3], z[0], z[1]);
      } else {
        box_muller(w[0], w[1], z[0], z[1]);
        box_muller(w[2], w[3], z[2], z[3]);
      }
      add_column(R + 1, 1, z);
    }
    if (p.mask) {
      T other[E];  // the last row, without indexing registers
      for (int i = 0; i < E; ++i) other[i] = rows == 3 ? sum[2][i] : rows == 4 ? sum[3][i] : sum[4][i];
      for (int i = 0; i < E; ++i)
        if (e.there[i]) sum[1][i] = blended(T(p.mask[p.mask_of_sample ? e.place[i] : e.at[i]]), sum[1][i], other[i]);
    }
#pragma unroll
    for (int j = 0; j < kMaxOutputs; ++j)
      if (j < p.outputs) store(p.out_type[j], p.out[j], e, sum[1 + j]);
  }
}

template <class T, By kBy, bool kDrawn>
static int launch_rows(const Rows& p, int multiprocessors, Stream stream) {
  constexpr int64_t E = 16 / sizeof(T), tile = 16 * E;
  Table<T> table{};
  if constexpr (kBy == By::step)
    for (int i = 0; i < p.rows() * p.columns(); ++i) table.weight[i] = T(p.table[i]);
  const int64_t units_of_sample = kDrawn ? 16 * ((p.sample + tile - 1) / tile) : 1;
  const int64_t units = kDrawn ? p.numel / p.sample * units_of_sample : (p.numel + E - 1) / E;
  const int64_t blocks = smaller<int64_t>((units + kThreads - 1) / kThreads, 16 * multiprocessors);
  return launch(rows_kernel<T, kBy, kDrawn>, unsigned(blocks), kThreads, 0, stream)(p, table, units, units_of_sample);
}
template <class T, bool kDrawn>
static int launch_by(const Rows& p, int multiprocessors, Stream stream) {
  return p.by == By::step  ? launch_rows<T, By::step, kDrawn>(p, multiprocessors, stream)
         : p.by == By::run ? launch_rows<T, By::run, kDrawn>(p, multiprocessors, stream)
                           : launch_rows<T, By::element, kDrawn>(p, multiprocessors, stream);
}

int rows_cuda(const Rows& p, bool wide, int multiprocessors, Stream stream) {
  if (p.seeds)
    return wide ? launch_by<double, true>(p, multiprocessors, stream) : launch_by<float, true>(p, multiprocessors, stream);
  return wide ? launch_by<double, false>(p, multiprocessors, stream) : launch_by<float, false>(p, multiprocessors, stream);
}
}  // namespace dither
