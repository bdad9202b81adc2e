// Sums and ranks over a block of threads, which all take part.
#pragma once
#include "../common/launch.cuh"

namespace dither {
constexpr int kMaxWarps = 32;

// Of the flags of the block, how many are set before this thread's; `total`: in all. `shared`: kMaxWarps numbers.
__device__ inline int rank_in_block(bool flag, int* shared, int& total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  const unsigned votes = __ballot_sync(~0u, flag);
  __syncthreads();
  if (lane == 0) shared[warp] = __popc(votes);
  __syncthreads();
  int before = 0;
  total = 0;
  for (int w = 0; w < warps; ++w) {
    before += w < warp ? shared[w] : 0;
    total += shared[w];
  }
  return before + __popc(votes & ((1u << lane) - 1));
}

__device__ inline int64_t sum_of_block(int x, int* shared) {
  const int warps = blockDim.x / 32;
  for (int half = 16; half > 0; half /= 2) x += __shfl_xor_sync(~0u, x, half);
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  int total = 0;
  for (int w = 0; w < warps; ++w) total += shared[w];
  return total;
}

// A multiple of a warp that is not much larger than n.
inline unsigned threads_for(int64_t n) { return unsigned(n >= 1024 ? 1024 : n < 128 ? 128 : (n + 31) / 32 * 32); }
inline unsigned blocks_of(int64_t n, int64_t each) { return unsigned((n + each - 1) / each); }
}  // namespace dither
