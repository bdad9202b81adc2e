#include "pack24.h"
#include "../common/launch.cuh"

namespace dither {
constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads) pack_kernel(const __grid_constant__ Pack24 p) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x, across = p.columns / 16;
  if (i >= p.rows * across) return;
  const int64_t r = i / across, c = i % across;
  p.indices[c / 2 * 2 * p.rows + place_in_pair(r, int(c % 2))] = pack16(p, i);
}
__global__ void __launch_bounds__(kThreads) unpack_kernel(const __grid_constant__ Unpack24 p) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x, across = p.columns / 16;
  if (i >= p.rows * across) return;
  const int64_t r = i / across, c = i % across;
  unpack16(p, i, p.indices[c / 2 * 2 * p.rows + place_in_pair(r, int(c % 2))]);
}

static unsigned blocks_for(int64_t words) { return unsigned((words + kThreads - 1) / kThreads); }
int pack24_cuda(const Pack24& p, Stream stream) {
  return launch(pack_kernel, blocks_for(p.rows * p.columns / 16), kThreads, 0, stream)(p);
}
int unpack24_cuda(const Unpack24& p, Stream stream) {
  return launch(unpack_kernel, blocks_for(p.rows * p.columns / 16), kThreads, 0, stream)(p);
}
}  // namespace dither
