#include "norm.h"
#include "../common/launch.cuh"

namespace dither {
constexpr int kSumThreads = 256, kSumPerThread = int(kSumLanes) / kSumThreads, kPartsPerLaunch = 512;

struct Parts {
  SumPart part[kPartsPerLaunch];
  int32_t first_block[kPartsPerLaunch + 1], count;
};

// Thread k owns the lanes 4 k .. 4 k + 3, so that it reads 16 bytes of float32 at a time.
__global__ void __launch_bounds__(kSumThreads) sum_kernel(const __grid_constant__ Parts b, double* partial) {
  DYNAMIC_SHARED(double, shared);  // kSumLanes
  int t = 0;
  for (int end = b.count; end - t > 1;) {
    const int middle = (t + end) / 2;
    (b.first_block[middle] <= int(blockIdx.x) ? t : end) = middle;
  }
  const SumPart& part = b.part[t];
  const int64_t begin = int64_t(blockIdx.x - b.first_block[t]) * kSumChunk, n = smaller(kSumChunk, part.numel - begin);
  double sum[kSumPerThread] = {};
  with_type(part.type, [&](auto tag) {
    using S = decltype(tag);
    struct alignas(kSumPerThread * sizeof(S)) Pack {
      S x[kSumPerThread];
    };
    const S* x = static_cast<const S*>(part.x) + begin;
    for (int64_t at = threadIdx.x * kSumPerThread; at < n; at += kSumLanes) {
      double v[kSumPerThread];
      if (at + kSumPerThread <= n && reinterpret_cast<uintptr_t>(x + at) % sizeof(Pack) == 0) {
        const Pack pack = *reinterpret_cast<const Pack*>(x + at);
        for (int j = 0; j < kSumPerThread; ++j) v[j] = double(widen(pack.x[j]));
      } else {
        for (int j = 0; j < kSumPerThread; ++j) v[j] = at + j < n ? double(widen(x[at + j])) : 0.0;
      }
      for (int j = 0; j < kSumPerThread; ++j) sum[j] += part.square ? v[j] * v[j] : v[j];
    }
  });
  for (int j = 0; j < kSumPerThread; ++j) shared[threadIdx.x * kSumPerThread + j] = sum[j];
  for (int half = int(kSumLanes) / 2; half > 0; half /= 2) {
    __syncthreads();
    for (int k = threadIdx.x; k < half; k += kSumThreads) shared[k] += shared[k + half];
  }
  if (threadIdx.x == 0) partial[blockIdx.x] = shared[0];
}

static int sum_level(const SumPart* parts, int64_t count, double* to, Stream stream) {
  for (int64_t first = 0; first < count; first += kPartsPerLaunch) {
    Parts b;
    b.count = int32_t(smaller<int64_t>(kPartsPerLaunch, count - first));
    b.first_block[0] = 0;
    for (int i = 0; i < b.count; ++i) {
      b.part[i] = parts[first + i];
      b.first_block[i + 1] = b.first_block[i] + int32_t(sum_chunks(b.part[i].numel));
    }
    const int blocks = b.first_block[b.count];
    if (blocks == 0) continue;
    if (int error = launch(sum_kernel, blocks, kSumThreads, kSumLanes * sizeof(double), stream)(b, to)) return error;
    to += blocks;
  }
  return 0;
}

int sum_cuda(const SumPart* parts, int64_t count, double* partial, double* out, Stream stream) {
  int64_t chunks = 0;
  for (int64_t i = 0; i < count; ++i) chunks += sum_chunks(parts[i].numel);
  if (int error = sum_level(parts, count, chunks > 1 ? partial : out, stream)) return error;
  while (chunks > 1) {
    const SumPart level{partial, chunks, DType::f64, false};
    partial += chunks;
    chunks = sum_chunks(chunks);
    if (int error = sum_level(&level, 1, chunks > 1 ? partial : out, stream)) return error;
  }
  return 0;
}
}  // namespace dither
