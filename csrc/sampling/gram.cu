#include "gram.h"
#include "../common/launch.cuh"

namespace dither {
// A block a chunk, a thread a lane.
template <int R>
__global__ void __launch_bounds__(kGramLanes) gram_kernel(const __grid_constant__ Gram g, double* partial) {
  constexpr int kSums = gram_sums(R);
  __shared__ double shared[kSums][kGramLanes];
  const int64_t sample = blockIdx.x / g.chunks(), chunk = blockIdx.x % g.chunks();
  const int64_t begin = chunk * kGramChunk, end = smaller(g.sample, begin + kGramChunk);
  double sum[kSums] = {};
  for (int64_t k = begin + threadIdx.x; k < end; k += kGramLanes) {
    double v[R];
    for (int r = 0; r < R; ++r)
      with_type(g.type[r],
                [&](auto tag) { v[r] = double(widen(static_cast<const decltype(tag)*>(g.x[r])[sample * g.sample + k])); });
    int i = 0;
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
      for (int s = r; s < R; ++s) sum[i++] += v[r] * v[s];
#pragma unroll
    for (int r = 0; r < R; ++r) sum[i++] += v[r];
  }
  for (int i = 0; i < kSums; ++i) shared[i][threadIdx.x] = sum[i];
  for (int half = kGramLanes / 2; half > 0; half /= 2) {
    __syncthreads();
    if (int(threadIdx.x) < half)
      for (int i = 0; i < kSums; ++i) shared[i][threadIdx.x] += shared[i][threadIdx.x + half];
  }
  if (threadIdx.x == 0)
    for (int i = 0; i < kSums; ++i) partial[int64_t(blockIdx.x) * kSums + i] = shared[i][0];
}

// A block a sample and a kind of sum.
__global__ void __launch_bounds__(kGramTotalLanes)
    gram_total_kernel(const __grid_constant__ Gram g, const double* partial, double* out) {
  __shared__ double shared[kGramTotalLanes];
  const int sums = gram_sums(g.inputs), which = blockIdx.x % sums;
  const int64_t sample = blockIdx.x / sums, chunks = g.chunks();
  double sum = 0.0;
  for (int64_t c = threadIdx.x; c < chunks; c += kGramTotalLanes) sum += partial[(sample * chunks + c) * sums + which];
  shared[threadIdx.x] = sum;
  for (int half = kGramTotalLanes / 2; half > 0; half /= 2) {
    __syncthreads();
    if (int(threadIdx.x) < half) shared[threadIdx.x] += shared[threadIdx.x + half];
  }
  if (threadIdx.x == 0) put_sum(g.inputs, which, shared[0], out + sample * g.inputs * (g.inputs + 1));
}

int gram_cuda(const Gram& g, double* partial, double* out, Stream stream) {
  const auto run = [&](auto kernel) {
    return launch(kernel, unsigned(g.samples * g.chunks()), kGramLanes, 0, stream)(g, partial);
  };
  if (g.chunks() > 0) {
    const int error = g.inputs == 1   ? run(gram_kernel<1>)
                      : g.inputs == 2 ? run(gram_kernel<2>)
                      : g.inputs == 3 ? run(gram_kernel<3>)
                                      : run(gram_kernel<4>);
    if (error) return error;
  }
  return launch(gram_total_kernel, unsigned(g.samples * gram_sums(g.inputs)), kGramTotalLanes, 0, stream)(g, partial, out);
}
}  // namespace dither
