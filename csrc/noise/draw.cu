#include "draw.h"
#include "../common/chacha.h"
#include "../common/launch.cuh"
#include "../common/philox.h"

namespace dither {
constexpr int kDrawThreads = 256;

// One thread draws one generator block; 16 neighbouring threads write 16 neighbouring elements.
template <class Generator, class D>
__global__ void __launch_bounds__(kDrawThreads)
    draw_kernel(const __grid_constant__ D draw, const __grid_constant__ Draw d, void* out, int64_t n) {
  using Value = typename D::Value;
  constexpr int per_pair = sizeof(Value) / 2, tile = 32 * Generator::words / per_pair;
  const int64_t block = d.start / tile * 16 + int64_t(blockIdx.x) * kDrawThreads + threadIdx.x;
  if (block / 16 * tile >= d.start + n) return;
  uint32_t w[Generator::words];
  Generator::block(d.address, uint64_t(block), w);
#pragma unroll
  for (int p = 0; p < tile / 32; ++p) {
    uint32_t pair[per_pair];
    for (int i = 0; i < per_pair; ++i) pair[i] = w[per_pair * p + i];
    Value z[2];
    draw(pair, z[0], z[1]);
    const int64_t e = block / 16 * tile + 32 * p + block % 16 - d.start;
    with_stored(d.stored, [&](auto tag) {
      auto* o = static_cast<decltype(tag)*>(out);
      for (int half = 0; half < 2; ++half) {
        const int64_t i = e + 16 * half;
        if (i < 0 || i >= n) continue;
        if (d.add) add(z[half], o[i]);
        else put(z[half], o[i]);
      }
    });
  }
}

template <class Generator, class D>
static int launch_draw(const D& draw, const Draw& d, void* out, int64_t n, Stream stream) {
  constexpr int tile = 16 * Generator::words / int(sizeof(typename D::Value) / 4);
  const int64_t blocks = 16 * ((d.start + n + tile - 1) / tile - d.start / tile);
  const unsigned grid = unsigned((blocks + kDrawThreads - 1) / kDrawThreads);
  return launch(draw_kernel<Generator, D>, grid, kDrawThreads, 0, stream)(draw, d, out, n);
}

int draw_cuda(const Draw& d, void* out, int64_t n, Stream stream) {
  if (n == 0) return 0;
  return with_distribution(d, [&](const auto& draw) {
    return d.chacha ? launch_draw<ChaCha20>(draw, d, out, n, stream) : launch_draw<Philox>(draw, d, out, n, stream);
  });
}

__global__ void __launch_bounds__(kDrawThreads)
    round_kernel(const __grid_constant__ Rounding r, const void* x, void* out, int64_t n) {
  const int64_t block = r.start / 64 * 16 + int64_t(blockIdx.x) * kDrawThreads + threadIdx.x;
  uint32_t w[Philox::words];
  Philox::block(r.address, uint64_t(block), w);
  with_type(r.from, [&](auto from) {
    with_type(r.to, [&](auto to) {
      for (int p = 0; p < 4; ++p) {
        const int64_t i = block / 16 * 64 + 16 * p + block % 16 - r.start;
        if (i < 0 || i >= n) continue;
        const float value = float(widen(static_cast<const decltype(from)*>(x)[i]));
        narrow(value, RoundingBits(0)(w[p]), static_cast<decltype(to)*>(out)[i]);
      }
    });
  });
}

int round_cuda(const Rounding& r, const void* x, void* out, int64_t n, Stream stream) {
  if (n == 0) return 0;
  const int64_t blocks = 16 * ((r.start + n + 63) / 64 - r.start / 64);
  const unsigned grid = unsigned((blocks + kDrawThreads - 1) / kDrawThreads);
  return launch(round_kernel, grid, kDrawThreads, 0, stream)(r, x, out, n);
}
}  // namespace dither
