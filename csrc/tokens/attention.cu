#include "attention.h"
#include "../common/launch.cuh"
#include "../common/mma.cuh"
#include "multiply_add.h"

// A block of threads has a tile of rows of a head and goes through the columns. For the lse rows are queries and columns keys;
// for the sums rows are keys and columns queries, so that either reduces along columns and nothing is added atomically.
namespace dither {
constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr unsigned kAll = ~0u;
template <class T>
constexpr T kNone = T(-__builtin_inf());

__device__ inline float exp2_of(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return power_of_2<float, uint32_t>(x);
#endif
}
__device__ inline double exp2_of(double x) { return power_of_2<double, uint64_t>(x); }

// Doubles too are rounded once where that is one instruction.
template <class T>
__device__ inline T fused(T a, T b, T c) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) == 8) return __fma_rn(a, b, c);
#endif
  return multiply_add(a, b, c);
}

// What a column adds to a row: weight 2^(score - taken).
template <class T>
struct Term {
  T taken, weight;
};

template <bool kSums, class S>
struct Tile {
  using T = decltype(widen(S{}));
  const Attention& a;
  int64_t b, h, pair, row, rows, columns, begin, end;  // the tile's first row, of `rows`; its columns
  const S *of_rows, *of_columns;                       // the head
  int64_t row_stride, column_stride;

  __device__ Tile(const Attention& a, int size, int width) : a(a) {
    rows = kSums ? a.keys : a.queries;
    columns = kSums ? a.queries : a.keys;
    const int64_t tiles = parts_of(rows, size);
    pair = blockIdx.x / tiles;
    row = blockIdx.x % tiles * size;
    b = pair / a.heads;
    h = pair % a.heads;
    const S* q = static_cast<const S*>(a.q) + a.q_at.at(b, h, 0);
    const S* k = static_cast<const S*>(a.k) + a.k_at.at(b, h / a.group, 0);
    of_rows = kSums ? k : q;
    of_columns = kSums ? q : k;
    row_stride = kSums ? a.k_at.row : a.q_at.row;
    column_stride = kSums ? a.q_at.row : a.k_at.row;
    begin = kSums && a.causal ? smaller(row, columns) / width * width : 0;
    end = !kSums && a.causal ? smaller(columns, row + size) : columns;
  }
  __device__ bool sees(int64_t row, int64_t column) const {
    return row < rows && column < columns && a.takes_part(b, h, kSums ? column : row, kSums ? row : column);
  }
  // Whether some pair of `size` rows from `row` on and `width` columns from `column` on may take no part.
  __device__ bool edge(int64_t row, int size, int64_t column, int width) const {
    const bool later = a.causal && (kSums ? row + size - 1 > column : column + width - 1 > row);
    return a.mask || later || column + width > columns;
  }
  __device__ Term<T> term(int64_t column) const {
    if (!kSums || column >= columns) return {T(__builtin_inf()), T(0)};
    const T taken = subtrahend(static_cast<const T*>(a.lse)[pair * columns + column]);
    const T weight = a.weight ? static_cast<const T*>(a.weight)[a.weight_at.at(b, h, column)] : T(1);
    return {taken, taken == T(__builtin_inf()) ? T(0) : weight};
  }
};

// The sum of a row: the terms' total, or 2^most total of powers of 2.
template <bool kSums, class T>
struct Sum {
  T most = kNone<T>, total = 0;

  // n scores, of which hidden ones are -inf; terms of their columns.
  template <int n>
  __device__ void add(const T (&s)[n], const Term<T> (&terms)[n], unsigned hidden) {
    if constexpr (kSums) {
#pragma unroll
      for (int e = 0; e < n; ++e) {
        const T p = exp2_of(s[e] - terms[e].taken);
        if (!(hidden >> e & 1)) total = fused(p, terms[e].weight, total);
      }
    } else {
      T high = most;
#pragma unroll
      for (int e = 0; e < n; ++e) high = s[e] > high ? s[e] : high;
      const T base = high == kNone<T> ? T(0) : high;
      T sum = 0;
#pragma unroll
      for (int e = 0; e < n; ++e) sum += exp2_of(s[e] - base);
      total = fused(total, exp2_of(most - base), sum);
      most = high;
    }
  }
  // Over `lanes` neighbours, a power of 2.
  __device__ void join(int lanes) {
    for (int step = lanes / 2; step > 0; step /= 2) {
      const T other = __shfl_xor_sync(kAll, total, step);
      if constexpr (kSums) {
        total += other;
      } else {
        const T their = __shfl_xor_sync(kAll, most, step), high = their > most ? their : most;
        const T base = high == kNone<T> ? T(0) : high;
        total = total * exp2_of(most - base) + other * exp2_of(their - base);
        most = high;
      }
    }
  }
  __device__ void write(const Attention& a, int64_t index) const {
    if constexpr (kSums) static_cast<T*>(a.sums)[index] = total;
    else static_cast<T*>(a.lse_out)[index] = T(double(most) * kLn2 + logarithm(double(total)) + double(total - total));
  }
};

// The scores of a row, still to be scaled; column(e): where the e-th one is; terms: of the columns from `first` on.
template <bool kSums, class S, class T, int n, class Column>
__device__ inline void add_row(const Tile<kSums, S>& tile, int64_t row, int64_t first, bool edge, T (&s)[n],
                               const Term<T>* terms, const Column& column, Sum<kSums, T>& sum) {
  unsigned hidden = 0;
  Term<T> own[n];
#pragma unroll
  for (int e = 0; e < n; ++e) {
    if (kSums) own[e] = terms[column(e)];
    s[e] *= T(tile.a.scale);
    if (edge && !tile.sees(row, first + column(e))) {
      s[e] = kNone<T>;
      hidden |= 1u << e;
    }
  }
  sum.add(s, own, hidden);
}

// ---- float32, float64: a thread has n x n scores, rows 8 apart and columns 16 apart

template <class T, bool kSums>
__global__ void __launch_bounds__(kThreads) plain_kernel(const __grid_constant__ Attention a) {
  constexpr int n = sizeof(T) == 8 ? 4 : 8, kDown = 8, kAcross = kThreads / kDown, kDepth = 16;
  constexpr int kRows = kDown * n, kColumns = kAcross * n;
  __shared__ T x[kDepth * (kRows + 1)], y[kDepth * (kColumns + 1)];
  __shared__ Term<T> terms[kColumns];
  const Tile<kSums, T> tile(a, kRows, kColumns);
  const int down = threadIdx.x / kAcross, across = threadIdx.x % kAcross;
  Sum<kSums, T> sum[n];
  for (int64_t first = tile.begin; first < tile.end; first += kColumns) {
    T s[n][n] = {};
    for (int64_t depth = 0; depth < a.dim || depth == 0; depth += kDepth) {
      __syncthreads();
      const auto load = [&](const T* from, int64_t stride, int64_t begin, int64_t count, int size, T* to) {
        for (int at = threadIdx.x; at < size * kDepth; at += kThreads) {
          const int64_t line = begin + at / kDepth, d = depth + at % kDepth;
          to[at % kDepth * (size + 1) + at / kDepth] = line < count && d < a.dim ? from[line * stride + d] : T(0);
        }
      };
      load(tile.of_rows, tile.row_stride, tile.row, tile.rows, kRows, x);
      load(tile.of_columns, tile.column_stride, first, tile.columns, kColumns, y);
      if (kSums && depth == 0)
        for (int c = threadIdx.x; c < kColumns; c += kThreads) terms[c] = tile.term(first + c);
      __syncthreads();
#pragma unroll 4
      for (int d = 0; d < kDepth; ++d) {
        T u[n], v[n];
#pragma unroll
        for (int e = 0; e < n; ++e) {
          u[e] = x[d * (kRows + 1) + down + kDown * e];
          v[e] = y[d * (kColumns + 1) + across + kAcross * e];
        }
#pragma unroll
        for (int r = 0; r < n; ++r)
#pragma unroll
          for (int c = 0; c < n; ++c) s[r][c] = fused(u[r], v[c], s[r][c]);
      }
    }
    const bool edge = tile.edge(tile.row, kRows, first, kColumns);
#pragma unroll
    for (int r = 0; r < n; ++r)
      add_row(tile, tile.row + down + kDown * r, first, edge, s[r], terms, [&](int e) { return across + kAcross * e; }, sum[r]);
  }
#pragma unroll
  for (int r = 0; r < n; ++r) {
    const int64_t row = tile.row + down + kDown * r;
    sum[r].join(kAcross);
    if (across == 0 && row < tile.rows) sum[r].write(a, tile.pair * tile.rows + row);
  }
}

// ---- bfloat16, float16: tensor cores. A warp keeps its rows in registers; columns come through shared memory, two tiles of
// them in turns.

template <class S, int kSteps, bool kSums>
__global__ void __launch_bounds__(kThreads) tensor_kernel(const __grid_constant__ Attention a, bool aligned) {
  constexpr int kPieces = kSteps > 8 ? 1 : 2, kColumns = kSteps > 8 ? 32 : 64;  // 16 rows a piece, 16 of dim a step
  constexpr int kRows = 16 * kPieces, kPitch = 16 * kSteps + 8, kAtOnce = 4;    // a pitch without conflicts of banks
  __shared__ __align__(16) S y[2][kColumns * kPitch];
  __shared__ Term<float> terms[2][kColumns];
  const Tile<kSums, S> tile(a, kWarps * kRows, kColumns);
  const int lane = threadIdx.x % 32, steps = int(parts_of(a.dim, 16));
  const int64_t row = tile.row + threadIdx.x / 32 * kRows;  // the warp's first

  const auto load = [&](int64_t first, int buffer) {
    if (first < tile.end) {
      for (int at = threadIdx.x; at < kColumns * 2 * steps; at += kThreads) {
        const int64_t column = first + at / (2 * steps), d = at % (2 * steps) * 8;
        S* to = &y[buffer][at / (2 * steps) * kPitch + d];
        const S* from = tile.of_columns + column * tile.column_stride + d;
        if (aligned) {
          const bool inside = column < tile.columns && d < a.dim;
          copy_async(to, inside ? from : tile.of_columns, inside);
        } else {
          for (int e = 0; e < 8; ++e) to[e] = column < tile.columns && d + e < a.dim ? from[e] : S{};
        }
      }
      if (kSums)
        for (int c = threadIdx.x; c < kColumns; c += kThreads) terms[buffer][c] = tile.term(first + c);
    }
    commit_copies();
  };
  load(tile.begin, 0);

  uint32_t x[kPieces][kSteps][4] = {};
#pragma unroll
  for (int p = 0; p < kPieces; ++p)
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const int64_t line = row + 16 * p + lane / 4 + w % 2 * 8, d = 16 * step + lane % 4 * 2 + w / 2 * 8;
        const S* from = tile.of_rows + line * tile.row_stride + d;
        if (line < tile.rows && d < a.dim) x[p][step][w] = from->bits | (d + 1 < a.dim ? uint32_t(from[1].bits) << 16 : 0);
      }

  Sum<kSums, float> sum[kPieces][2];
  int buffer = 0;
  for (int64_t first = tile.begin; first < tile.end; first += kColumns, buffer ^= 1) {
    load(first + kColumns, buffer ^ 1);
    wait_for_copies<1>();
    __syncthreads();
    if (row < tile.rows) {  // a whole warp
      const bool edge = tile.edge(row, kRows, first, kColumns);
#pragma unroll
      for (int begin = 0; begin < kColumns; begin += 8 * kAtOnce) {
        float s[kPieces][kAtOnce][4] = {};
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          if (step >= steps) break;
          uint32_t b[kAtOnce / 2][4];
#pragma unroll
          for (int f = 0; f < kAtOnce / 2; ++f)
            load_matrices(b[f],
                          &y[buffer][(begin + 16 * f + lane / 16 * 8 + lane % 8) * kPitch + 16 * step + lane / 8 % 2 * 8]);
#pragma unroll
          for (int f = 0; f < kAtOnce; ++f)
#pragma unroll
            for (int p = 0; p < kPieces; ++p) {
              const uint32_t words[2] = {b[f / 2][f % 2 * 2], b[f / 2][f % 2 * 2 + 1]};
              multiply_add_tile<S>(s[p][f], x[p][step], words);
            }
        }
#pragma unroll
        for (int p = 0; p < kPieces; ++p)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            float own[2 * kAtOnce];
#pragma unroll
            for (int e = 0; e < 2 * kAtOnce; ++e) own[e] = s[p][e / 2][2 * half + e % 2];
            add_row(
                tile, row + 16 * p + lane / 4 + 8 * half, first + begin, edge, own, &terms[buffer][begin],
                [&](int e) { return 8 * (e / 2) + lane % 4 * 2 + e % 2; }, sum[p][half]);
          }
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int p = 0; p < kPieces; ++p)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t line = row + 16 * p + lane / 4 + 8 * half;
      sum[p][half].join(4);
      if (lane % 4 == 0 && line < tile.rows) sum[p][half].write(a, tile.pair * tile.rows + line);
    }
}

template <class S, int kSteps, bool kSums>
static int run_tensor(const Attention& a, int64_t rows, Stream stream) {
  const HeadRows& at = kSums ? a.q_at : a.k_at;
  const auto address = reinterpret_cast<uintptr_t>(kSums ? a.q : a.k);
  const bool aligned = (address | uintptr_t(at.batch | at.head | at.row | a.dim) * 2) % 16 == 0;
  const int64_t tiles = parts_of(rows, kWarps * (kSteps > 8 ? 16 : 32));
  return launch(tensor_kernel<S, kSteps, kSums>, unsigned(a.pairs() * tiles), kThreads, 0, stream)(a, aligned);
}

template <bool kSums>
static int run(const Attention& a, Stream stream) {
  const int64_t rows = kSums ? a.keys : a.queries;
  int error = 0;
  with_type(a.type, [&](auto tag) {
    using S = decltype(tag);
    if constexpr (sizeof(S) == 2)
      error = a.dim <= 64    ? run_tensor<S, 4, kSums>(a, rows, stream)
              : a.dim <= 128 ? run_tensor<S, 8, kSums>(a, rows, stream)
                             : run_tensor<S, 16, kSums>(a, rows, stream);
    else
      error = launch(plain_kernel<S, kSums>, unsigned(a.pairs() * parts_of(rows, sizeof(S) == 8 ? 32 : 64)), kThreads, 0,
                     stream)(a);
  });
  return error;
}
int attention_lse_cuda(const Attention& a, Stream stream) { return run<false>(a, stream); }
int attention_colsum_cuda(const Attention& a, Stream stream) { return run<true>(a, stream); }
}  // namespace dither
