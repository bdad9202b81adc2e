#include "match.h"
#include "../common/mma.cuh"
#include "compact.cuh"
#include "topk.h"

namespace dither {
constexpr int kThreads = 256, kSide = 16, kStep = 16;                        // channels at a time
constexpr int kRows = kMatchRows / kSide, kColumns = kMatchColumns / kSide;  // of a thread
static_assert(kSide * kSide == kThreads);
constexpr int kRowPitch = kMatchRows + 4, kColumnPitch = kMatchColumns + 4;

// A warp a token: widened and normalised. For the filter: scaled, and the factor that is left, NaN of what is not finite.
template <class S>
__global__ void __launch_bounds__(kThreads)
    normalize_kernel(const __grid_constant__ Tokens t, decltype(widen(S{}))* out, S* scaled, float* factors, int64_t width) {
  using T = decltype(widen(S{}));
  const int64_t row = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row >= t.batch * t.count) return;
  const S* x = static_cast<const S*>(t.x) + t.at(row / t.count, row % t.count);
  double sum = 0.0;
  for (int64_t k = lane; t.normalize && k < t.channels; k += 32) sum += double(widen(x[k])) * double(widen(x[k]));
  for (int half = 16; half > 0; half /= 2) sum += __shfl_down_sync(~0u, sum, half);
  sum = __shfl_sync(~0u, sum, 0);
  const double factor = inverse_norm(sum);
  for (int64_t k = lane; k < t.channels; k += 32)
    out[row * t.channels + k] = t.normalize ? T(double(widen(x[k])) * factor) : T(widen(x[k]));
  if constexpr (sizeof(S) == 2) {
    if (!scaled) return;
    const double power = bit_as<double>(bit_as<uint64_t>(factor) & 0x7ff0000000000000ull);
    for (int64_t k = lane; k < width; k += 32) {
      S y{};
      if (power > 0.0 && k < t.channels) narrow(float(double(widen(x[k])) * power), y);
      scaled[row * width + k] = y;
    }
    if (lane == 0) factors[row] = power > 0.0 ? float(factor / power) : float(sum - sum);
  }
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

// ---- the filter for 16-bit tokens

template <class S>
struct Filtered {
  const S *a, *b;                  // scaled
  const float* factor;             // of b
  const float *exact_a, *exact_b;  // normalised
  float* most;                     // [splits][batch][a]: a's largest product with a token of b, times that token's factor
  int64_t width;
  int splits;
};

// With a norm of at most 1, products of n channels are off by (9/8 n + 1) 2^-23 if a tensor core cuts off each of 16 summands
// and their sum at the last bit of the largest one; those of normalised floats by (n / 2 + 2) 2^-23; scaled tokens of float16
// by sqrt(n) 2^-23. The best pair is thus no further below the largest product than twice their sum.
__device__ inline float filter_margin(int64_t channels) { return float(channels + 32) * 0x1p-21f; }

// As match_kernel, in two passes: the largest product of each row, then the exact ones of those that come close to it.
template <class S, bool kExact>
__global__ void __launch_bounds__(kMatchRows)
    filter_kernel(const __grid_constant__ Match m, const __grid_constant__ Filtered<S> f, int64_t blocks, int64_t range,
                  float* scores, int64_t* indices) {
  constexpr int kPieces = 2, kTiles = kMatchColumns / 8, kWarpRows = 16 * kPieces;  // of 16 rows and 8 columns, a warp
  constexpr int kPitch = kFilterDepth + 8, kLines = kMatchRows + kMatchColumns, kList = 4 * kMatchRows;
  static_assert(kPieces * kTiles * 4 == 64, "a bit for each product of a thread");
  struct Pair {
    int row, column;
  };
  __shared__ __align__(16) S tokens[2][kLines * kPitch];
  __shared__ Pair list[kList];
  __shared__ int listed;
  __shared__ unsigned long long best[kMatchRows];  // order_key of the score, then the complement of the column
  const int64_t C = m.a.channels, sample = blockIdx.x / blocks, first = blockIdx.x % blocks * kMatchRows;
  const int64_t begin = blockIdx.y * range, end = smaller(begin + range, m.b.count), all = m.a.batch * m.a.count;
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * kWarpRows, chunks = int(f.width / kFilterDepth);
  const int steps = begin < end ? int((end - begin + kMatchColumns - 1) / kMatchColumns) * chunks : 0;
  const S *a = f.a + sample * m.a.count * f.width, *b = f.b + sample * m.b.count * f.width;
  const auto row_of = [&](int bit) { return row + bit / 32 * 16 + lane / 4 + bit % 4 / 2 * 8; };
  const auto column_of = [&](int bit) { return bit % 32 / 4 * 8 + lane % 4 * 2 + bit % 2; };

  const auto load = [&](int step, int buffer) {
    for (int at = threadIdx.x; step < steps && at < kLines * int(kFilterDepth) / 8; at += kMatchRows) {
      const int line = at / (int(kFilterDepth) / 8), d = at % (int(kFilterDepth) / 8) * 8;
      const bool of_a = line < kMatchRows;
      const int64_t token = of_a ? first + line : begin + int64_t(step / chunks) * kMatchColumns + line - kMatchRows;
      const bool inside = token < (of_a ? m.a.count : m.b.count);
      copy_async(&tokens[buffer][line * kPitch + d],
                 (of_a ? a : b) + (inside ? token : 0) * f.width + step % chunks * kFilterDepth + d, inside);
    }
    commit_copies();
  };
  const auto exact = [&](int64_t row, int64_t column) {
    const float *x = f.exact_a + (sample * m.a.count + first + row) * C, *y = f.exact_b + (sample * m.b.count + column) * C;
    float sum = 0;
#pragma unroll 4
    for (int64_t k = 0; k < C; ++k) sum = multiply_add(x[k], y[k], sum);
    return sum;
  };

  float high[kPieces][2];  // the largest yet, or what must be reached
#pragma unroll
  for (int p = 0; p < kPieces; ++p)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t i = first + row + 16 * p + lane / 4 + 8 * half;
      float most = -__builtin_inff();
      for (int s = 0; kExact && i < m.a.count && s < f.splits; ++s) {
        const float other = f.most[s * all + sample * m.a.count + i];
        most = other > most ? other : most;
      }
      high[p][half] = !kExact ? most : most == -__builtin_inff() ? __builtin_inff() : most - filter_margin(C);
    }
  best[threadIdx.x] = 0;
  if (threadIdx.x == 0) listed = 0;

  float s[kPieces][kTiles][4];
  load(0, 0);
  for (int step = 0; step < steps; ++step) {
    const int buffer = step % 2;
    load(step + 1, buffer ^ 1);
    wait_for_copies<1>();
    __syncthreads();
    if (step % chunks == 0) {
#pragma unroll
      for (int p = 0; p < kPieces; ++p)
#pragma unroll
        for (int t = 0; t < kTiles; ++t)
#pragma unroll
          for (int w = 0; w < 4; ++w) s[p][t][w] = 0;
    }
    if (first + row < m.a.count) {  // a whole warp
#pragma unroll
      for (int depth = 0; depth < kFilterDepth; depth += 16) {
        uint32_t x[kPieces][4], y[kTiles / 2][4];
#pragma unroll
        for (int p = 0; p < kPieces; ++p)
          load_matrices(x[p], &tokens[buffer][(row + 16 * p + lane % 16) * kPitch + depth + lane / 16 * 8]);
#pragma unroll
        for (int t = 0; t < kTiles / 2; ++t)
          load_matrices(y[t],
                        &tokens[buffer][(kMatchRows + 16 * t + lane / 16 * 8 + lane % 8) * kPitch + depth + lane / 8 % 2 * 8]);
#pragma unroll
        for (int t = 0; t < kTiles; ++t)
#pragma unroll
          for (int p = 0; p < kPieces; ++p) {
            const uint32_t words[2] = {y[t / 2][t % 2 * 2], y[t / 2][t % 2 * 2 + 1]};
            multiply_add_tile<S>(s[p][t], x[p], words);
          }
      }
    }
    __syncthreads();
    if (step % chunks != chunks - 1) continue;

    const int64_t column = begin + int64_t(step / chunks) * kMatchColumns;
    float factor[kTiles][2];  // NaN, which never wins, of what is no token
#pragma unroll
    for (int t = 0; t < kTiles; ++t)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int64_t j = column + column_of(4 * t + e);
        factor[t][e] = j < m.b.count ? f.factor[sample * m.b.count + j] : __builtin_nanf("");
      }
    const bool hidden = m.mask || m.skip_diagonal;
    uint64_t close = 0;
#pragma unroll
    for (int bit = 0; bit < 64; ++bit) {
      const int p = bit / 32, half = bit % 4 / 2;
      const int64_t i = first + row_of(bit), j = column + column_of(bit);
      float product = s[p][bit % 32 / 4][bit % 4] * factor[bit % 32 / 4][bit % 2];
      if (hidden && i < m.a.count && !m.allows(sample, i, j)) product = __builtin_nanf("");
      if (kExact) close |= uint64_t(product >= high[p][half]) << bit;
      else high[p][half] = product > high[p][half] ? product : high[p][half];
    }
    if constexpr (kExact) {
      bool again;
      do {
        for (int bit = 0; close && bit < 64; ++bit)
          if (close >> bit & 1) {
            const int at = atomicAdd(&listed, 1);
            if (at >= kList) break;
            list[at] = {row_of(bit), int(column) + column_of(bit)};
            close &= ~(uint64_t(1) << bit);
          }
        __syncthreads();
        const int count = listed;
        again = count > kList;
        if (count < kMatchRows && step + 1 < steps) break;  // wait until there is one for each thread
        for (int at = threadIdx.x; at < count && at < kList; at += kMatchRows) {
          const Pair pair = list[at];
          const unsigned long long key = order_key(exact(pair.row, pair.column));
          atomicMax(&best[pair.row], key << 32 | uint32_t(~pair.column));
        }
        __syncthreads();
        if (threadIdx.x == 0) listed = 0;
        __syncthreads();
      } while (again);
    }
  }

  if constexpr (kExact) {
    __syncthreads();
    const int64_t i = first + threadIdx.x, to = blockIdx.y * all + sample * m.a.count + i;
    if (i < m.a.count) {
      const unsigned long long found = best[threadIdx.x];
      indices[to] = found ? int64_t(uint32_t(~found)) : 0;
      scores[to] = found ? exact(threadIdx.x, indices[to]) : -__builtin_inff();
    }
  } else {
#pragma unroll
    for (int p = 0; p < kPieces; ++p)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        for (int step = 2; step > 0; step /= 2) {
          const float other = __shfl_xor_sync(~0u, high[p][half], step);
          high[p][half] = other > high[p][half] ? other : high[p][half];
        }
        const int64_t i = first + row + 16 * p + lane / 4 + 8 * half;
        if (lane % 4 == 0 && i < m.a.count) f.most[blockIdx.y * all + sample * m.a.count + i] = high[p][half];
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

int match_cuda(const Match& m, int splits, void* tokens, void* filter, void* scores, int64_t* indices, Stream stream) {
  const Filter sizes(m, splits);
  int error = 0;
  with_type(m.a.type, [&](auto tag) {
    using S = decltype(tag);
    using T = decltype(widen(S{}));
    const int64_t a_tokens = m.a.batch * m.a.count;
    T *a = static_cast<T*>(tokens), *b = a + a_tokens * m.a.channels;
    S* scaled = sizes.on ? static_cast<S*>(filter) : nullptr;
    float* factors = sizes.on ? reinterpret_cast<float*>(scaled + sizes.tokens * sizes.width) : nullptr;
    const auto prepare = [&](const Tokens& t, T* to, int64_t before) {
      if (error == 0)
        error = launch(normalize_kernel<S>, blocks_of(t.batch * t.count, kThreads / 32), kThreads, 0, stream)(
            t, to, scaled ? scaled + before * sizes.width : scaled, factors ? factors + before : factors, sizes.width);
    };
    prepare(m.a, a, 0);
    prepare(m.b, b, a_tokens);
    const int64_t blocks = blocks_of(m.a.count, kMatchRows), tiles = blocks_of(m.b.count, kMatchColumns);
    const int64_t range = (tiles + splits - 1) / splits * kMatchColumns;
    const dim3 grid(unsigned(m.a.batch * blocks), unsigned(splits));
    T* found = static_cast<T*>(scores);
    if (!sizes.on) {
      if (error == 0) error = launch(match_kernel<T>, grid, kThreads, 0, stream)(m, a, b, blocks, range, found, indices);
    } else if constexpr (sizeof(S) == 2) {
      const Filtered<S> f{scaled, scaled + a_tokens * sizes.width, factors + a_tokens, a,
                          b,      factors + sizes.tokens,          sizes.width,        splits};
      if (error == 0) error = launch(filter_kernel<S, false>, grid, kMatchRows, 0, stream)(m, f, blocks, range, found, indices);
      if (error == 0) error = launch(filter_kernel<S, true>, grid, kMatchRows, 0, stream)(m, f, blocks, range, found, indices);
    }
    if (error == 0)
      error = launch(best_kernel<T>, blocks_of(a_tokens, kThreads), kThreads, 0, stream)(m, splits, found, indices);
  });
  return error;
}
}  // namespace dither
