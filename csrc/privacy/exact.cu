#include "exact.h"
#include "../common/launch.cuh"

namespace dither {
constexpr int kExactThreads = 256;
constexpr int64_t kRowsAtATime = 64;

// A thread a column and some rows; integers add up in any order.
template <class S>
__global__ void __launch_bounds__(kExactThreads) accumulate_kernel(const __grid_constant__ Accumulate a) {
  const int64_t j = int64_t(blockIdx.x) * kExactThreads + threadIdx.x;
  if (j >= a.columns) return;
  for (int64_t first = int64_t(blockIdx.y) * kRowsAtATime; first < a.count; first += int64_t(gridDim.y) * kRowsAtATime) {
    int64_t sum = 0;
    for (int64_t b = first; b < smaller(first + kRowsAtATime, a.count); ++b) {
      const double scale = a.scale(b);
      if (scale != 0.0) sum += units_of(static_cast<const S*>(a.rows)[b * a.pitch + j], scale);
    }
    if (sum != 0) atomicAdd(reinterpret_cast<unsigned long long*>(a.sum + j), static_cast<unsigned long long>(sum));
  }
}
int accumulate_cuda(const Accumulate& a, Stream stream) {
  int error = 0;
  const int64_t chunks = (a.count + kRowsAtATime - 1) / kRowsAtATime;
  const dim3 grid(unsigned((a.columns + kExactThreads - 1) / kExactThreads), unsigned(smaller<int64_t>(chunks, 1024)));
  with_type(a.type, [&](auto tag) { error = launch(accumulate_kernel<decltype(tag)>, grid, kExactThreads, 0, stream)(a); });
  return error;
}

// A thread a generator block: four pairs.
__global__ void __launch_bounds__(kExactThreads) exact_noise_kernel(const __grid_constant__ ExactNoise x, int64_t n) {
  constexpr int64_t tile = 8 * ChaCha20::words;
  const int64_t block = x.start / tile * 16 + int64_t(blockIdx.x) * kExactThreads + threadIdx.x;
  if (block / 16 * tile >= x.start + n) return;
  uint32_t w[ChaCha20::words];
  ChaCha20::block(x.address, uint64_t(block), w);
  for (int p = 0; p < 4; ++p) {
    int64_t q[2];
    if (round_pair(w[4 * p], w[4 * p + 1], w[4 * p + 2], w[4 * p + 3], x.std, q[0], q[1])) {
      uint32_t v[ChaCha20::words];
      ChaCha20::block(address_of_digits(x.address), uint64_t(block), v);
      round_pair_with_all_digits(w + 4 * p, v + 4 * p, x.std, q[0], q[1]);
    }
    for (int half = 0; half < 2; ++half) {
      const int64_t i = block / 16 * tile + 32 * p + 16 * half + block % 16 - x.start;
      if (i >= 0 && i < n) x.sum[i] += q[half];
    }
  }
}
int exact_noise_cuda(const ExactNoise& x, int64_t n, Stream stream) {
  constexpr int64_t tile = 8 * ChaCha20::words;
  const int64_t blocks = 16 * ((x.start + n + tile - 1) / tile - x.start / tile);
  const unsigned grid = unsigned((blocks + kExactThreads - 1) / kExactThreads);
  return launch(exact_noise_kernel, grid, kExactThreads, 0, stream)(x, n);
}
}  // namespace dither
