#include "match.h"
#include "compact.cuh"

namespace dither {
constexpr int kThreads = 256, kSide = 16, kStep = 16;                        // channels at a time
constexpr int kRows = kMatchRows / kSide, kColumns = kMatchColumns / kSide;  // of a thread
static_assert(kSide * kSide == kThreads);
constexpr int kRowPitch = kMatchRows + 4, kColumnPitch = kMatchColumns + 4;

// A warp a token: widened and normalised.
template <class S>
__global__ void __launch_bounds__(kThreads) normalize_kernel(const __grid_constant__ Tokens t, decltype(widen(S{}))* out) {
  using T = decltype(widen(S{}));
  const int64_t row = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= t.batch * t.count) return;
  const S* x = static_cast<const S*>(t.x) + t.at(row / t.count, row % t.count);
  double sum = 0.0;
  for (int64_t k = lane; t.normalize && k < t.channels; k += 32) sum += double(widen(x[k])) * double(widen(x[k]));
  for (int half = 16; half > 0; half /= 2) sum += __shfl_down_sync(~0u, sum, half);
  const double factor = inverse_norm(__shfl_sync(~0u, sum, 0));
  for (int64_t k = lane; k < t.channels; k += 32)
    out[row * t.channels + k] = t.normalize ? T(double(widen(x[k])) * factor) : T(widen(x[k]));
}

// Channels k .. k + kStep of kTokens tokens, as [channel][token]; zeros beyond.
template <int kTokens, class T>
__device__ inline void load_tile(const T* tokens, int64_t count, int64_t channels, int64_t first, int64_t k, T* to) {
  for (int at = threadIdx.x; at < kTokens * kStep; at += kThreads) {
    const int64_t token = first + at / kStep, channel = k + at % kStep;
    to[at % kStep * (kTokens + 4) + at / kStep] =
        token < count && channel < channels ? tokens[token * channels + channel] : T(0);
  }
}

template <class T>
struct Best {
  T score;
  int64_t index;
  __device__ void join(T value, int64_t at) {
    if (value > score || (value == score && at < index)) {
      score = value;
      index = at;
    }
  }
};

// Neighbours, which are read together.
template <class T, int kCount>
struct alignas(16) Some {
  T of[kCount];
};

// A block has kMatchRows tokens of a and goes through a range of b, kMatchColumns at a time. A thread has 8 x 4 pairs of them.
template <class T>
__global__ void __launch_bounds__(kThreads) match_kernel(const __grid_constant__ Match m, const T* a, const T* b,
                                                         int64_t blocks, int64_t range, T* scores, int64_t* indices) {
  __shared__ __align__(16) T shared[kStep * (kRowPitch + kColumnPitch)];
  __shared__ int64_t places[kThreads];
  const T kLeast = -T(__builtin_inf());
  const int64_t C = m.a.channels, sample = blockIdx.x / blocks, first = blockIdx.x % blocks * kMatchRows;
  const int64_t begin = blockIdx.y * range, end = begin + range < m.b.count ? begin + range : m.b.count;
  const int row = threadIdx.x / kSide * kRows, column = threadIdx.x % kSide * kColumns;
  T *rows = shared, *columns = shared + kStep * kRowPitch;
  a += sample * m.a.count * C;
  b += sample * m.b.count * C;
  Best<T> best[kRows];
  for (int r = 0; r < kRows; ++r) best[r] = {kLeast, m.b.count};
  for (int64_t j = begin; j < end; j += kMatchColumns) {
    T sum[kRows][kColumns] = {};
    for (int64_t k = 0; k < C; k += kStep) {
      __syncthreads();
      load_tile<kMatchRows>(a, m.a.count, C, first, k, rows);
      load_tile<kMatchColumns>(b, m.b.count, C, j, k, columns);
      __syncthreads();
      const int steps = int(smaller<int64_t>(kStep, C - k));
      for (int c = 0; c < steps; ++c) {
        const auto x = *reinterpret_cast<const Some<T, kRows>*>(rows + c * kRowPitch + row);
        const auto y = *reinterpret_cast<const Some<T, kColumns>*>(columns + c * kColumnPitch + column);
#pragma unroll
        for (int r = 0; r < kRows; ++r)
#pragma unroll
          for (int e = 0; e < kColumns; ++e) sum[r][e] = multiply_add(x.of[r], y.of[e], sum[r][e]);
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int e = 0; e < kColumns; ++e)
        if (first + row + r < m.a.count && m.allows(sample, first + row + r, j + column + e))
          best[r].join(sum[r][e], j + column + e);
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    __syncthreads();
    shared[threadIdx.x] = best[r].score;
    places[threadIdx.x] = best[r].index;
    __syncthreads();
    const int64_t i = first + row + r;
    if (column == 0 && i < m.a.count) {
      Best<T> found = best[r];
      for (int c = 1; c < kSide; ++c) found.join(shared[threadIdx.x + c], places[threadIdx.x + c]);
      const int64_t to = (blockIdx.y * m.a.batch + sample) * m.a.count + i;
      scores[to] = found.score;
      indices[to] = found.score > kLeast ? found.index : 0;
    }
  }
}

// The best of the ranges.
template <class T>
__global__ void __launch_bounds__(kThreads)
    best_kernel(const __grid_constant__ Match m, int splits, const T* scores, const int64_t* indices) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x, all = m.a.batch * m.a.count;
  if (i >= all) return;
  Best<T> best{scores[i], indices[i]};
  for (int s = 1; s < splits; ++s) best.join(scores[s * all + i], indices[s * all + i]);
  static_cast<T*>(m.score)[i] = best.score;
  m.index[i] = best.index;
}

int match_cuda(const Match& m, int splits, void* tokens, void* scores, int64_t* indices, Stream stream) {
  int error = 0;
  with_type(m.a.type, [&](auto tag) {
    using S = decltype(tag);
    using T = decltype(widen(S{}));
    T *a = static_cast<T*>(tokens), *b = a + m.a.batch * m.a.count * m.a.channels;
    const auto prepare = [&](const Tokens& t, T* to) {
      if (error == 0)
        error = launch(normalize_kernel<S>, blocks_of(t.batch * t.count, kThreads / 32), kThreads, 0, stream)(t, to);
    };
    prepare(m.a, a);
    prepare(m.b, b);
    const int64_t blocks = blocks_of(m.a.count, kMatchRows), tiles = blocks_of(m.b.count, kMatchColumns);
    const int64_t range = (tiles + splits - 1) / splits * kMatchColumns;
    if (error == 0)
      error = launch(match_kernel<T>, dim3(unsigned(m.a.batch * blocks), unsigned(splits)), kThreads, 0, stream)(
          m, a, b, blocks, range, static_cast<T*>(scores), indices);
    if (error == 0)
      error = launch(best_kernel<T>, blocks_of(m.a.batch * m.a.count, kThreads), kThreads, 0, stream)(
          m, splits, static_cast<const T*>(scores), indices);
  });
  return error;
}
}  // namespace dither
