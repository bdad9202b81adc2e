#include "roof.h"
#include "../common/launch.cuh"
#include "../common/scalar.h"

namespace dither {
struct alignas(16) Quad {
  uint32_t x[4];
};

__global__ void __launch_bounds__(256) roof_kernel(const __grid_constant__ Roof r, int64_t numel) {
  const int64_t stride = int64_t(gridDim.x) * 256;
  uint32_t total = 0;
  for (int k = 0; k < r.count; ++k) {
    Quad* x = static_cast<Quad*>(r.x[k]);
    const int64_t n = numel * r.item[k] / 16;
    for (int64_t i = int64_t(blockIdx.x) * 256 + threadIdx.x; i < n; i += stride) {
      Quad q = x[i];
      if (k < r.written) {
        for (int j = 0; j < 4; ++j) q.x[j] += 1;
        x[i] = q;
      } else {
        for (int j = 0; j < 4; ++j) total += q.x[j];
      }
    }
  }
  if (total == 0x9e3779b9u && numel < 0) static_cast<uint32_t*>(r.x[0])[0] = total;  // never: keeps the reads
}

int roof_cuda(const Roof& r, int64_t numel, Stream stream) {
  if (numel == 0) return 0;
  const int64_t blocks = smaller<int64_t>((numel + 1023) / 1024, 132 * 64);
  return launch(roof_kernel, unsigned(blocks), 256, 0, stream)(r, numel);
}
}  // namespace dither
