#include "transposable.h"
#include "../common/launch.cuh"

namespace dither {
constexpr int kThreads = 128;

// A thread a tile. Bits: a byte of a row is two tiles, joined by a shuffle; where columns are no multiple of 8 a byte spans two
// rows, and a block of four rows is packed from `keep` afterwards.
template <class S>
__global__ void __launch_bounds__(kThreads) tiles_kernel(const __grid_constant__ Transposable t) {
  using T = decltype(widen(S{}) + 0);
  const int64_t across = t.columns / 4, tile = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const bool inside = tile < t.rows / 4 * across;
  const int64_t start = tile / across * 4 * t.columns + tile % across * 4;
  uint32_t pattern = 0;
  if (inside) {
    T a[16];
    for (int r = 0; r < 4; ++r)
      for (int c = 0; c < 4; ++c) a[4 * r + c] = weight_of(T(widen(static_cast<const S*>(t.w)[start + r * t.columns + c])));
    pattern = uint32_t(t.exact ? best_pattern(a, 0) : greedy_pattern(a, 0));
    if (t.keep)
      for (int j = 0; j < 16; ++j) t.keep[start + j / 4 * t.columns + j % 4] = pattern >> j & 1;
  }
  if (t.bits && t.columns % 8 == 0) {
    const uint32_t right = __shfl_down_sync(~0u, pattern, 1);
    if (inside && threadIdx.x % 2 == 0)
      for (int r = 0; r < 4; ++r)
        t.bits[(start + r * t.columns) / 8] = uint8_t((pattern >> 4 * r & 15) | (right >> 4 * r & 15) << 4);
  }
}

__global__ void __launch_bounds__(kThreads) pack_rows_kernel(const __grid_constant__ Transposable t) {
  const int64_t i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * 8;
  if (i >= t.rows * t.columns) return;
  uint32_t byte = 0;
  for (int j = 0; j < 8; ++j) byte |= uint32_t(t.keep[i + j]) << j;  // four rows are a multiple of 16
  t.bits[i / 8] = uint8_t(byte);
}

int transposable_cuda(const Transposable& t, Stream stream) {
  const auto blocks = [](int64_t threads) { return unsigned((threads + kThreads - 1) / kThreads); };
  int error = 0;
  with_type(t.type, [&](auto tag) {
    error = launch(tiles_kernel<decltype(tag)>, blocks(t.rows * t.columns / 16), kThreads, 0, stream)(t);
  });
  if (error == 0 && t.bits && t.columns % 8)
    error = launch(pack_rows_kernel, blocks(t.rows * t.columns / 8), kThreads, 0, stream)(t);
  return error;
}
}  // namespace dither
