#include "lazy.h"
#include "../common/chacha.h"
#include "../common/launch.cuh"
#include "../common/philox.h"

namespace dither {
constexpr int kLazyThreads = 128;
constexpr unsigned kAll = ~0u;

// A warp a row; a lane draws whole generator blocks and moves their elements, the same ones at every step.
template <class Generator, bool kMomentum, class T>
__global__ void __launch_bounds__(kLazyThreads) lazy_kernel(const __grid_constant__ LazyRows l) {
  constexpr int per_pair = sizeof(T) / 2, tile = 32 * Generator::words / per_pair;
  const int64_t i = (int64_t(blockIdx.x) * kLazyThreads + threadIdx.x) / 32;
  const int lane = int(threadIdx.x % 32);
  if (i >= l.count) return;
  const int64_t row = l.ids ? l.ids[i] : i;
  if (row < 0 || row >= l.rows) return;
  int from = 0;
  if (lane == 0) from = atomicMax(l.last + row, int(l.steps));
  from = __shfl_sync(kAll, from, 0);
  if (from >= l.steps) return;  // repeated, or not behind
  const int64_t begin = row * l.columns, end = begin + l.columns;
  Missed missed;
  for_each_move<T>(l, i, from, missed, [&](const Move<T>& a, uint32_t step, const T* gradient) {
    Address address = l.address;
    address.step = step;
    const bool two = kMomentum && a.rw != T(0);
    for (int64_t block = begin / tile * 16 + lane; block / 16 * tile < end; block += 32) {
      uint32_t w[Generator::words], v[Generator::words];
      Generator::block(address, uint64_t(block), w);
      if (two) Generator::block(address, uint64_t(block + l.second / tile * 16), v);
#pragma unroll
      for (int p = 0; p < tile / 32; ++p) {
        T z[2], y[2];
        const auto normals = [p](const uint32_t (&words)[Generator::words], T(&x)[2]) {
          if constexpr (per_pair == 2) box_muller(words[2 * p], words[2 * p + 1], x[0], x[1]);
          else box_muller(words[4 * p], words[4 * p + 1], words[4 * p + 2], words[4 * p + 3], x[0], x[1]);
        };
        normals(w, z);
        if (two) normals(v, y);
        for (int half = 0; half < 2; ++half) {
          const int64_t e = block / 16 * tile + 32 * p + 16 * half + block % 16;
          if (e < begin || e >= end) continue;
          const T other = two ? y[half] : z[half], g = gradient ? gradient[e - begin] : z[half];
          T unused = 0;
          move_one<kMomentum>(a, z[half], other, g, static_cast<T*>(l.weight)[e],
                              kMomentum ? static_cast<T*>(l.momentum)[e] : unused);
        }
      }
    }
  });
}

template <class Generator, bool kMomentum, class T>
static int launch_lazy(const LazyRows& l, Stream stream) {
  constexpr int rows = kLazyThreads / 32;
  const unsigned grid = unsigned((l.count + rows - 1) / rows);
  return launch(lazy_kernel<Generator, kMomentum, T>, grid, kLazyThreads, 0, stream)(l);
}
template <class Generator>
static int launch_lazy(const LazyRows& l, Stream stream) {
  if (l.wide && l.momentum) return launch_lazy<Generator, true, double>(l, stream);
  if (l.wide) return launch_lazy<Generator, false, double>(l, stream);
  if (l.momentum) return launch_lazy<Generator, true, float>(l, stream);
  return launch_lazy<Generator, false, float>(l, stream);
}
int lazy_cuda(const LazyRows& l, Stream stream) {
  return l.chacha ? launch_lazy<ChaCha20>(l, stream) : launch_lazy<Philox>(l, stream);
}

__global__ void append_kernel(double* history, int width, int64_t at, const __grid_constant__ Steps s) {
  append_steps(history, width, at, s);
}
int append_cuda(double* history, int width, int64_t at, const Steps& s, Stream stream) {
  return launch(append_kernel, 1, 1, 0, stream)(history, width, at, s);
}
}  // namespace dither
