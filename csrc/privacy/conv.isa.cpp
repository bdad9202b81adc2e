#include "conv.h"
#include "../common/mask_cpu.h"
#include "../common/shuffle_cpu.h"

namespace dither::DITHER_ISA {
constexpr int kSums = DITHER_VECTOR_BYTES == 64 ? 24 : 12;  // vectors of sums in registers
constexpr int64_t kOutputs = kConvOutputs;

// ---- L x L numbers transposed

// from[r * stride + c] to to[c * to_stride + r]; past the caches: whole vectors, aligned.
template <bool kStream = false, class T>
static INLINE void transpose(const T* from, int64_t stride, T* to, int64_t to_stride) {
  using V = typename Lanes<T>::type;
  constexpr int L = Lanes<T>::count;
  V x[L];
#pragma GCC unroll 16
  for (int r = 0; r < L; ++r) __builtin_memcpy(&x[r], from + r * stride, sizeof(V));
  transpose(x);
#pragma GCC unroll 16
  for (int r = 0; r < L; ++r)
    if constexpr (kStream) stream(to + r * to_stride, x[r]);
    else __builtin_memcpy(to + r * to_stride, &x[r], sizeof(V));
}

// ---- what a unit reads and writes

// n numbers in pieces of kBytes, the last of which may overlap the one before, or smaller ones where n is too small.
template <int kBytes, class T>
static INLINE void copy(const T* from, int64_t n, T* to) {
  constexpr int64_t L = kBytes / int64_t(sizeof(T));
  if constexpr (L <= 1) {
    if (n) *to = *from;
  } else if (n < L) {
    copy<kBytes / 2>(from, n, to);
  } else {
    for (int64_t k = 0; k < n - L; k += L) __builtin_memcpy(to + k, from + k, kBytes);
    __builtin_memcpy(to + n - L, from + n - L, kBytes);
  }
}

// Rows row .. row + count of a channel of padded x, `to` holds zeros where columns are padded.
template <class T, class S>
static INLINE void pad_rows(const S* x, const ConvAxis& rows, const ConvAxis& columns, int64_t row, int64_t count, T* to) {
  to += columns.padding;
  for (int64_t r = row - rows.padding; r < row - rows.padding + count; ++r, to += columns.padded()) {
    const S* line = x + r * columns.size;
    if (r < 0 || r >= rows.size)
      for (int64_t k = 0; k < columns.size; ++k) to[k] = 0;
    else if constexpr (sizeof(S) == sizeof(T)) copy<64>(line, columns.size, to);
    else
      for (int64_t k = 0; k < columns.size; ++k) to[k] = widen(line[k]);
  }
}

// Numbers of `outputs` channels, `stride` apart, at n places, as [place][kOutputs]; the other lanes keep what they hold.
template <class T, class S>
static void load_lanes(const S* from, int64_t stride, int64_t outputs, int64_t n, T* to) {
  constexpr int L = Lanes<T>::count;
  for (int64_t o = 0; o < outputs; o += L) {
    if constexpr (sizeof(S) == sizeof(T))
      if (o + L <= outputs && n >= L) {
        for (int64_t k = 0; k < n; k += L) {  // the last block may overlap the one before
          const int64_t place = smaller<int64_t>(k, n - L);
          transpose(from + o * stride + place, stride, to + place * kOutputs + o, kOutputs);
        }
        continue;
      }
    for (int64_t r = o; r < smaller<int64_t>(o + L, outputs); ++r)
      for (int64_t k = 0; k < n; ++k) to[k * kOutputs + r] = widen(from[r * stride + k]);
  }
}

// The sums [weights, a multiple of 16][kOutputs] as rows of the result.
template <class T, class S>
static void store_sums(const T* sums, int64_t outputs, int64_t weights, bool streamed, S* out) {
  constexpr int L = Lanes<T>::count;
  for (int64_t o = 0; o < outputs; o += L)
    for (int64_t n = 0; n < weights; n += L) {
      alignas(64) T tile[L * L];
      const bool direct = sizeof(S) == sizeof(T) && o + L <= outputs && n + L <= weights;
      if constexpr (sizeof(S) == sizeof(T)) {
        if (direct && streamed) transpose<true>(sums + n * kOutputs + o, kOutputs, out + o * weights + n, weights);
        else if (direct) transpose(sums + n * kOutputs + o, kOutputs, out + o * weights + n, weights);
      }
      if (direct) continue;
      transpose(sums + n * kOutputs + o, kOutputs, tile, L);
      for (int64_t r = o; r < smaller<int64_t>(o + L, outputs); ++r)
        for (int64_t k = n; k < smaller<int64_t>(n + L, weights); ++k) narrow(tile[(r - o) * L + k - n], out[r * weights + k]);
    }
}

// ---- sums over the places of a chunk

struct Walk {
  int64_t rows, columns;     // of the chunk
  int64_t row_step, stride;  // in x, from row to row and from place to place
};

// For R rows of x, each with K taps side by side, and M vectors of output channels: sums[R * K][kOutputs] += (or =, at first).
// P: kOutputs where every lane has an x of its own, [place][kOutputs], or 1.
template <class T, int M, int K, int R, int P>
static void add_products(const T* g, const T* x, const int64_t* offset, const Walk& walk, bool first, T* sums) {
  using V = typename Lanes<T>::type;
  constexpr int L = Lanes<T>::count;
  V sum[R][K][M] = {};
  const T* from[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) from[r] = x + offset[r];
  for (int64_t row = 0; row < walk.rows; ++row) {
    int64_t at = row * walk.row_step;
    for (int64_t column = 0; column < walk.columns; ++column, at += walk.stride, g += kOutputs) {
      V grads[M];
#pragma GCC unroll 2
      for (int m = 0; m < M; ++m) __builtin_memcpy(&grads[m], g + m * L, sizeof(V));
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int k = 0; k < K; ++k) {
          const T* value = from[r] + at + k * P;
#pragma GCC unroll 2
          for (int m = 0; m < M; ++m) {
            if constexpr (P == 1) {
              sum[r][k][m] += grads[m] * *value;
            } else {
              V values;
              __builtin_memcpy(&values, value + m * L, sizeof(V));
              sum[r][k][m] += grads[m] * values;
            }
          }
        }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int k = 0; k < K; ++k)
#pragma GCC unroll 2
      for (int m = 0; m < M; ++m) {
        T* to = sums + (r * K + k) * kOutputs + m * L;
        V total;
        __builtin_memcpy(&total, to, sizeof(V));
        total = first ? sum[r][k][m] : total + sum[r][k][m];
        __builtin_memcpy(to, &total, sizeof(V));
      }
}

// All rows, as many at a time as the registers hold.
template <class T, int M, int K, int R, int P>
static void add_rows(const T* g, const T* x, const int64_t* offset, int64_t count, const Walk& walk, bool first, T* sums) {
  if constexpr (R * K * M > kSums && R > 1) {
    add_rows<T, M, K, (R + 1) / 2, P>(g, x, offset, count, walk, first, sums);
  } else {
    int64_t r = 0;
    for (; r + R <= count; r += R) add_products<T, M, K, R, P>(g, x, offset + r, walk, first, sums + r * K * kOutputs);
    if constexpr (R > 1)
      if (r < count)
        add_rows<T, M, K, R == 4 ? 3 : R / 2, P>(g, x, offset + r, count - r, walk, first, sums + r * K * kOutputs);
  }
}
template <class T, int K, int P>
static void add_chunk(const T* g, const T* x, const int64_t* offset, int64_t count, int64_t outputs, const Walk& walk,
                      bool first, T* sums) {
  constexpr int L = Lanes<T>::count;
  for (int64_t o = 0; o < outputs; o += 2 * L) {
    const T* from = P == 1 ? x : x + o;
    if (outputs - o > L) add_rows<T, 2, K, 8, P>(g + o, from, offset, count, walk, first, sums + o);
    else add_rows<T, 1, K, 8, P>(g + o, from, offset, count, walk, first, sums + o);
  }
}

template <class T, class S, int P>
static void units(const ConvGrads& c, int64_t lo, int64_t hi, T* scratch) {
  constexpr bool kMixed = P > 1;
  const ConvAxis &y = c.rows, &x = c.columns;
  const int64_t weights = c.weights(), pitch = x.padded(), together = c.together(), all = together * c.outputs;
  const int64_t part_rows = chunk_rows(c), part_columns = chunk_columns(c);
  const bool copied = kMixed || sizeof(S) != sizeof(T) || y.padding || x.padding;
  // Rows of x side by side: K taps each where they are neighbours, or a single one.
  const bool neighbours = x.dilation == 1 && (x.kernel == 3 || x.kernel == 5 || x.kernel == 7);
  const int64_t taps = neighbours ? 1 : x.kernel, channels = kMixed ? 1 : c.channels, rows = channels * y.kernel * taps;
  // Of the padded copy, all the rows of a channel, or those of a chunk for a lane.
  const int64_t plane = (kMixed ? rows_read(y, part_rows) : y.padded()) * pitch;
  int64_t* const offset = reinterpret_cast<int64_t*>(scratch);
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t row = r / taps;
    offset[r] = (row / y.kernel * plane + row % y.kernel * y.dilation * pitch + r % taps * x.dilation) * P;
  }
  const auto aligned = [](int64_t n) { return (n + 15) / 16 * 16; };
  T* const padded = scratch + aligned(rows * int64_t(sizeof(int64_t) / sizeof(T)));
  T* const lanes = padded + (copied ? aligned((kMixed ? kOutputs : channels) * plane) : 0);
  T* const grads = lanes + (kMixed ? span(c, part_rows, part_columns) * kOutputs : 0);
  T* const sums = grads + kConvPlaces * kOutputs;
  const auto add = taps > 1 || x.kernel == 1 ? add_chunk<T, 1, P>
                   : x.kernel == 3           ? add_chunk<T, 3, P>
                   : x.kernel == 5           ? add_chunk<T, 5, P>
                                             : add_chunk<T, 7, P>;
  int64_t held = -1;  // the group of a sample that `padded` holds
  for (int64_t unit = lo; unit < hi; ++unit) {
    const int64_t group = unit / c.tiles(), o = unit % c.tiles() * kOutputs, outputs = smaller(kOutputs, all - o);
    const int64_t size = y.size * x.size;
    const S* from = static_cast<const S*>(c.x) + group * together * c.channels * size;
    if (!kMixed && copied && group != held)
      for (int64_t channel = 0; channel < channels; ++channel)
        pad_rows(from + channel * size, y, x, y.padding, y.size, padded + channel * plane + y.padding * pitch);
    held = group;
    const T* image = padded;
    if constexpr (sizeof(S) == sizeof(T))
      if (!copied) image = from;
    const S* g = static_cast<const S*>(c.g) + (group * all + o) * c.places();
    bool first = true;
    for (int64_t row = 0; row < y.places; row += part_rows)
      for (int64_t column = 0; column < x.places; column += part_columns) {
        const Walk walk{smaller(part_rows, y.places - row), smaller(part_columns, x.places - column), y.stride * pitch * P,
                        x.stride * P};
        load_lanes<T>(g + row * x.places + column, c.places(), outputs, walk.rows * walk.columns, grads);
        if constexpr (kMixed) {
          for (int64_t channel = 0; channel < c.channels; ++channel) {
            for (int64_t l = 0; l < outputs; ++l)
              pad_rows(from + ((o + l) / c.outputs * c.channels + channel) * size, y, x, row * y.stride,
                       rows_read(y, walk.rows), padded + l * plane);
            load_lanes<T>(padded + column * x.stride, plane, aligned(outputs), span(c, walk.rows, walk.columns), lanes);
            add(grads, lanes, offset, rows, outputs, walk, first, sums + channel * y.kernel * x.kernel * kOutputs);
          }
        } else {
          add(grads, image + row * y.stride * pitch + column * x.stride, offset, rows, outputs, walk, first, sums);
        }
        first = false;
      }
    with_type(c.out_type, [&]<class Out>(Out) {
      if constexpr (sizeof(Out) < 8 || sizeof(T) == 8)
        store_sums(sums, outputs, weights, c.stream_out && DITHER_VECTOR_BYTES == 64,
                   static_cast<Out*>(c.out) + (group * all + o) * weights);
    });
  }
}

void conv_units(const ConvGrads& c, int64_t lo, int64_t hi, void* scratch) {
  with_type(c.type, [&]<class S>(S) {
    using T = decltype(widen(S{}));
    if (c.mixed) units<T, S, kOutputs>(c, lo, hi, static_cast<T*>(scratch));
    else units<T, S, 1>(c, lo, hi, static_cast<T*>(scratch));
  });
}
}  // namespace dither::DITHER_ISA
