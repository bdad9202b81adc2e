#include "norms.h"
#include "../common/launch.cuh"

namespace dither {
constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr unsigned kAll = ~0u;

static unsigned blocks_for(int64_t units, int64_t in_a_block) { return unsigned((units + in_a_block - 1) / in_a_block); }

// The fold of the 32 lanes of a warp, in lane 0.
__device__ inline double fold_warp(double x) {
  for (int half = 16; half > 0; half /= 2) x += __shfl_down_sync(kAll, x, half);
  return x;
}

// A warp a chunk of a row.
template <class S>
__global__ void __launch_bounds__(kThreads)
    squares_kernel(const __grid_constant__ SampleRows s, int64_t chunks, double* partial) {
  const int64_t unit = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  const bool inside = unit < s.rows * chunks;
  const int64_t begin = unit % chunks * kNormChunk, n = inside ? smaller(kNormChunk, s.columns - begin) : 0;
  const S* x = static_cast<const S*>(s.x) + unit / chunks * s.columns + begin;
  double sum = 0.0;
#pragma unroll 4
  for (int64_t k = threadIdx.x % 32; k < n; k += 32) {
    const double v = double(widen(x[k]));
    sum = add_product<S>(v, v, sum);
  }
  sum = fold_warp(sum);
  if (inside && threadIdx.x % 32 == 0) partial[unit] = sum;
}

// The sum of the chunks of a row: numbers in lane 0.
__device__ inline double sum_chunks(const double* partial, int64_t row, int64_t chunks) {
  if (chunks == 1) return partial[row];
  double sum = 0.0;
  for (int64_t k = threadIdx.x % 32; k < chunks; k += 32) sum += partial[row * chunks + k];
  return fold_warp(sum);
}
// A warp a row.
__global__ void __launch_bounds__(kThreads) finish_kernel(const double* g, int64_t g_chunks, const double* a, int64_t a_chunks,
                                                          double bias, double* out, int64_t rows) {
  const int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= rows) return;  // a whole warp
  double norm = sum_chunks(g, row, g_chunks);
  if (a) norm *= sum_chunks(a, row, a_chunks) + bias;
  if (threadIdx.x % 32 == 0) out[row] += norm;
}

static int squares(const SampleRows& s, double* partial, Stream stream) {
  const int64_t chunks = norm_chunks(s.columns);
  int error = 0;
  with_type(s.type, [&](auto tag) {
    error = launch(squares_kernel<decltype(tag)>, blocks_for(s.rows * chunks, kWarps), kThreads, 0, stream)(s, chunks, partial);
  });
  return error;
}

int row_squares_cuda(const SampleRows& g, double* g_partial, const SampleRows& a, double* a_partial, double bias, double* out,
                     Stream stream) {
  int error = squares(g, g_partial, stream);
  if (error == 0 && a_partial) error = squares(a, a_partial, stream);
  if (error) return error;
  return launch(finish_kernel, blocks_for(g.rows, kWarps), kThreads, 0, stream)(g_partial, norm_chunks(g.columns), a_partial,
                                                                                norm_chunks(a.columns), bias, out, g.rows);
}

// ---- Gram matrices. A block of threads has 16 rows of a sample and goes through the rows before them and these. Eight threads
// are the lanes of a tile of 4 x 4 numbers.

constexpr int kColumns = 32, kPitch = kColumns + 2, kTile = kGhostTile * kGhostTile;  // a pitch without conflicts of banks

// 16 rows from row i on of a sample, columns k on; zeros beyond.
template <class S>
__device__ inline void load_rows(const SampleRows& s, int64_t sample, int64_t steps, int64_t i, int64_t k, double* to) {
  for (int at = threadIdx.x; at < kGhostBlock * kColumns; at += kThreads) {
    const int64_t row = i + at / kColumns, column = k + at % kColumns;
    const bool inside = row < steps && column < s.columns;
    to[at / kColumns * kPitch + at % kColumns] =
        inside ? double(widen(static_cast<const S*>(s.x)[(sample * steps + row) * s.columns + column])) : 0.0;
  }
}
// The two numbers of the tile that are this thread's.
template <class S>
__device__ inline void gram_tile(const SampleRows& s, int64_t sample, int64_t steps, int64_t i, int64_t j, double* shared,
                                 double (&mine)[2]) {
  const int tile = threadIdx.x / kGhostLanes, lane = threadIdx.x % kGhostLanes;
  const double* x = shared + tile / kGhostTile * kGhostTile * kPitch + lane;
  const double* y = shared + (kGhostBlock + tile % kGhostTile * kGhostTile) * kPitch + lane;
  double sum[kTile] = {};
  for (int64_t k = 0; k < s.columns; k += kColumns) {
    __syncthreads();
    load_rows<S>(s, sample, steps, i, k, shared);
    load_rows<S>(s, sample, steps, j, k, shared + kGhostBlock * kPitch);
    __syncthreads();
    for (int c = 0; c < kColumns; c += kGhostLanes) {
      double u[kGhostTile], v[kGhostTile];
#pragma unroll
      for (int r = 0; r < kGhostTile; ++r) {
        u[r] = x[r * kPitch + c];
        v[r] = y[r * kPitch + c];
      }
#pragma unroll
      for (int e = 0; e < kTile; ++e) sum[e] = add_product<S>(u[e / kGhostTile], v[e % kGhostTile], sum[e]);
    }
  }
#pragma unroll
  for (int e = 0; e < kTile; ++e) {
    for (int half = kGhostLanes / 2; half > 0; half /= 2) sum[e] += __shfl_xor_sync(kAll, sum[e], half);
    if (e / 2 == lane) mine[e % 2] = sum[e];
  }
}

template <class A, class G>
__global__ void __launch_bounds__(kThreads) ghost_kernel(const __grid_constant__ GhostNorm s, double* partial) {
  __shared__ double shared[2 * kGhostBlock * kPitch];
  __shared__ double total[kGhostBlock * kGhostBlock];
  const int64_t sample = blockIdx.x / s.blocks(), i = blockIdx.x % s.blocks() * kGhostBlock;
  const int tile = threadIdx.x / kGhostLanes, lane = threadIdx.x % kGhostLanes;
  double sum[2] = {};
  for (int64_t j = 0; j <= i; j += kGhostBlock) {
    double inputs[2], grads[2];
    gram_tile<A>(s.a, sample, s.steps, i, j, shared, inputs);
    gram_tile<G>(s.g, sample, s.steps, i, j, shared, grads);
    for (int e = 0; e < 2; ++e) {
      const int row = tile / kGhostTile * kGhostTile + (2 * lane + e) / kGhostTile;
      const int column = tile % kGhostTile * kGhostTile + (2 * lane + e) % kGhostTile;
      const double weight = s.weight(i + row, j + column), product = (inputs[e] + s.bias) * grads[e];
      if (weight > 0.0) sum[e] += weight * product;
      if (weight > 0.0 && i + row == j + column) sum[e] += s.rounding * product;
      total[row * kGhostBlock + column] = sum[e];
    }
  }
  for (int half = kGhostBlock * kGhostBlock / 2; half > 0; half /= 2) {
    __syncthreads();
    for (int k = threadIdx.x; k < half; k += kThreads) total[k] += total[k + half];
  }
  if (threadIdx.x == 0) partial[blockIdx.x] = total[0];
}

__global__ void __launch_bounds__(kThreads)
    add_blocks_kernel(const double* partial, int64_t blocks, double* out, int64_t batch) {
  const int64_t b = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (b >= batch) return;
  double norm = 0.0;
  for (int64_t k = 0; k < blocks; ++k) norm += partial[b * blocks + k];
  out[b] += not_negative(norm);
}

int ghost_norm_cuda(const GhostNorm& s, double* partial, double* out, Stream stream) {
  int error = 0;
  with_type(s.a.type, [&](auto a) {
    with_type(s.g.type, [&](auto g) {
      error = launch(ghost_kernel<decltype(a), decltype(g)>, unsigned(s.batch * s.blocks()), kThreads, 0, stream)(s, partial);
    });
  });
  if (error) return error;
  return launch(add_blocks_kernel, blocks_for(s.batch, kThreads), kThreads, 0, stream)(partial, s.blocks(), out, s.batch);
}

// ---- norms' weights and biases

// A thread a column of a sample.
template <class S>
__global__ void __launch_bounds__(kThreads) affine_kernel(const __grid_constant__ AffineGrads s) {
  const int64_t blocks = (s.columns + kThreads - 1) / kThreads, sample = blockIdx.x / blocks;
  const int64_t column = blockIdx.x % blocks * kThreads + threadIdx.x;
  if (column >= s.columns) return;
  double weight = 0.0, bias = 0.0;
#pragma unroll 4
  for (int64_t row = sample * s.steps; row < (sample + 1) * s.steps; ++row) {
    const double x = double(widen(static_cast<const S*>(s.x)[row * s.columns + column]));
    const double g = double(widen(static_cast<const S*>(s.g)[row * s.columns + column]));
    weight += affine_product(g, x, s.mean_of(row), s.scale[row]);
    bias += g;
  }
  auto* to = static_cast<decltype(widen(S{}))*>(s.out) + sample * s.columns + column;
  narrow(weight, *to);
  if (s.bias) narrow(bias, to[s.batch * s.columns]);
}

int affine_grads_cuda(const AffineGrads& s, Stream stream) {
  const unsigned blocks = unsigned(s.batch) * blocks_for(s.columns, kThreads);
  int error = 0;
  with_type(s.type, [&](auto tag) { error = launch(affine_kernel<decltype(tag)>, blocks, kThreads, 0, stream)(s); });
  return error;
}

// ---- embeddings and scaling

// A warp a step: the norm of the sum of the rows with its id if it is the first of them, else 0.
template <class S>
__global__ void __launch_bounds__(kThreads) embedding_kernel(const __grid_constant__ EmbeddingNorm s, double* partial) {
  constexpr int kAtOnce = 8;  // columns of a thread
  const int64_t unit = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (unit >= s.batch * s.steps) return;  // a whole warp
  const int64_t sample = unit / s.steps, t = unit % s.steps, lane = threadIdx.x % 32;
  const int64_t *ids = s.ids + sample * s.steps, id = ids[t];
  const S* g = static_cast<const S*>(s.g) + sample * s.steps * s.columns;
  bool first = s.padding < 0 || id != s.padding;
  for (int64_t begin = 0; first && begin < t; begin += 32)
    first = !__any_sync(kAll, begin + lane < t && ids[begin + lane] == id);
  double sum = 0.0;
  for (int64_t k = lane; first && k - lane < s.columns; k += 32 * kAtOnce) {
    double row[kAtOnce] = {}, squares[kAtOnce] = {};
    int count = 0;
    for (int64_t begin = t / 32 * 32; begin < s.steps; begin += 32) {
      const int64_t other = begin + lane;
      unsigned same = __ballot_sync(kAll, other >= t && other < s.steps && ids[other] == id);
      count += __popc(same);
      for (; same; same &= same - 1) {
        const S* x = g + (begin + __ffs(int(same)) - 1) * s.columns;
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j)
          if (k + 32 * j < s.columns) {
            const double v = double(widen(x[k + 32 * j]));
            row[j] += v;
            squares[j] = add_product<S>(v, v, squares[j]);
          }
      }
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      sum += row[j] * row[j];
      if (count > 1 && s.rounding > 0.0) sum += s.rounding * squares[j];
    }
  }
  sum = fold_warp(sum);
  if (lane == 0) partial[unit] = sum;
}

int embedding_norm_cuda(const EmbeddingNorm& s, double* partial, double* out, Stream stream) {
  int error = 0;
  with_type(s.type, [&](auto tag) {
    error = launch(embedding_kernel<decltype(tag)>, blocks_for(s.batch * s.steps, kWarps), kThreads, 0, stream)(s, partial);
  });
  if (error) return error;
  return launch(finish_kernel, blocks_for(s.batch, kWarps), kThreads, 0, stream)(partial, s.steps, nullptr, 1, 0.0, out,
                                                                                 s.batch);
}

// A block of threads a chunk of a row.
template <class S>
__global__ void __launch_bounds__(kThreads) scale_kernel(const __grid_constant__ ScaleRows s) {
  using T = decltype(widen(S{}));
  const int64_t chunks = (s.columns + kNormChunk - 1) / kNormChunk, row = blockIdx.x / chunks;
  const int64_t begin = blockIdx.x % chunks * kNormChunk, n = smaller(kNormChunk, s.columns - begin);
  const double factor = s.factor_of(row);
  if (factor == 1.0) return;  // a whole block
  const T f = T(factor);
  S* x = static_cast<S*>(s.x) + row * s.columns + begin;
  for (int64_t k = threadIdx.x; k < n; k += kThreads) {
    S y{};
    if (f != T(0)) narrow(scaled_within<S>(f, widen(x[k])), y);
    x[k] = y;
  }
}

int scale_rows_cuda(const ScaleRows& s, Stream stream) {
  const unsigned blocks = unsigned(s.rows * norm_chunks(s.columns));
  int error = 0;
  with_type(s.type, [&](auto tag) { error = launch(scale_kernel<decltype(tag)>, blocks, kThreads, 0, stream)(s); });
  return error;
}
}  // namespace dither
