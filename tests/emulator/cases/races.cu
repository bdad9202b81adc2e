// Kernels that are right only with their barriers, which BROKEN removes, and with no say of the order of blocks.
#include <cstdio>

#include "launch.cuh"

#if defined(BROKEN)
#define SYNCTHREADS()
#define SYNCWARP()
#define COMBINE(target, value) *(target) = value
#else
#define SYNCTHREADS() __syncthreads()
#define SYNCWARP() __syncwarp()
#define COMBINE(target, value) atomicMax(target, value)
#endif
constexpr int kThreads = 256, kBlocks = 3;

template <class T>
__device__ void tree(T* partial, T* out) {
  const int t = threadIdx.x, x = blockIdx.x * kThreads + t;
  partial[t] = T(x);
  SYNCTHREADS();
  for (int half = kThreads / 2; half > 0; half /= 2) {
    if (t < half) partial[t] += partial[t + half];
    SYNCTHREADS();
  }
  if (t == 0) out[blockIdx.x] = partial[0];
}

__global__ void __launch_bounds__(kThreads) ordinary(float* __restrict__ out) {
  __shared__ float partial[kThreads];
  tree(partial, out);
}

template <class T, int N>
__global__ void templated(T* out) {
  __shared__ __align__(16) T partial[N];
  tree(partial, out);
}

__global__ void dynamic(double* out) {
  DYNAMIC_SHARED(double, partial);
  tree(partial, out);
}

struct Scale {
  float factor;
};

__global__ void warps(const __grid_constant__ Scale scale, float* out) {
  __shared__ float values[kThreads];
  const int t = threadIdx.x;
  float sum = scale.factor * (blockIdx.x * kThreads + t);
  for (int half = 16; half > 0; half /= 2) {
    values[t] = sum;
    SYNCWARP();
    sum += values[t ^ half];
    SYNCWARP();
  }
  if (t % 32 == 0) atomicAdd(&out[blockIdx.x], sum);
}

__global__ void blocks(int* out) { COMBINE(out + threadIdx.x, int(blockIdx.x * blockDim.x + threadIdx.x)); }

template <class T>
void report(const char* name, const T* got, bool sums) {
  bool right = true;
  for (int b = 0; b < kBlocks; ++b) {
    const int sum = b * kThreads * kThreads + kThreads * (kThreads - 1) / 2, last = (kBlocks - 1) * kBlocks + b;
    right = right && got[b] == T(sums ? sum : last);
  }
  std::printf("%s %s\n", name, right ? "right" : "wrong");
}

int main() {
  float f[kBlocks], zeros[kBlocks] = {};
  double d[kBlocks];
  int i[kBlocks] = {};
  launch(ordinary, kBlocks, kThreads)(f);
  report("ordinary", f, true);
  launch(templated<float, kThreads>, kBlocks, kThreads)(f);
  report("templated<float>", f, true);
  launch(templated<double, kThreads>, kBlocks, kThreads)(d);
  report("templated<double>", d, true);
  launch(dynamic, kBlocks, kThreads, kThreads * sizeof(double))(d);
  report("dynamic", d, true);
  launch(warps, kBlocks, kThreads)(Scale{1}, zeros);
  report("warps", zeros, true);
  launch(blocks, kBlocks, kBlocks)(i);
  report("blocks", i, false);
}
