// Prints what the intrinsics give, what uninitialised shared memory holds, and what launches return.
#include <cstdint>
#include <cstdio>

#include "launch.cuh"

constexpr unsigned kAll = 0xffffffffu;
constexpr int kRows = 9;

__global__ void shuffles(int* out) {
  const int t = threadIdx.x;
  int row = 0;
  const auto put = [&](int value) { out[blockDim.x * row++ + t] = value; };
  put(__shfl_sync(kAll, 10 * t, 3));
  put(__shfl_sync(kAll, 10 * t, 35));
  put(__shfl_xor_sync(kAll, 10 * t, 5));
  put(__shfl_down_sync(kAll, 10 * t, 4));
  put(__shfl_up_sync(kAll, 10 * t, 4));
  put(int(4 * __shfl_xor_sync(kAll, 0.25 * t, 1)));
  put(int(__shfl_xor_sync(kAll, (1ull << 40) * t, 1) >> 40));
  put(int(4 * __shfl_xor_sync(kAll, 0.25f * t, 1)));
  if (t % 32 < 8) put(__shfl_xor_sync(0x000000ffu, t, 7));
  else put(__shfl_down_sync(0xffffff00u, -t, 1));
}

__global__ void votes(unsigned* out) {
  const int t = threadIdx.x;
  const unsigned thirds = __ballot_sync(kAll, t % 3 == 0);
  if (t % 32 == 31) return;
  const unsigned rest = __ballot_sync(kAll, 1);
  __syncwarp();
  const int any[] = {__any_sync(kAll, t == 5), __any_sync(kAll, t == 31)},
            all[] = {__all_sync(kAll, t < 31), __all_sync(kAll, t < 9)};
  if (t == 0) {
    out[0] = thirds;
    out[1] = rest;
    out[2] = any[0] << 3 | any[1] << 2 | all[0] << 1 | all[1];
    out[3] = __popc(thirds) * 100 + __ffs(8) * 10 + __ffs(0);
  }
}

// The last warp has 8 lanes; the others do not exist and have no value to give.
__global__ void partial_warp(float* out) { out[threadIdx.x] = __shfl_down_sync(kAll, float(threadIdx.x), 4); }

__global__ void atomics(int* i, unsigned* u, float* f) {
  atomicMax(i, int(atomicAdd(i + 1, 1)));
  atomicOr(u, 1u << threadIdx.x % 32);
  atomicAdd(f, 0.5f);
}

__global__ void dimensions(int* out) {
  const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  out[block * blockDim.x * blockDim.y * blockDim.z + thread] += 100 * block + thread;
}

// Gives what the shared memory holds, after writing it or not, and leaves values behind for the next block.
template <class T, bool kWrite>
__global__ void looks(T* out) {
  __shared__ T values[32];
  DYNAMIC_SHARED(T, more);
  if (kWrite) values[threadIdx.x] = more[threadIdx.x] = T(1);
  __syncthreads();
  out[2 * threadIdx.x] = values[threadIdx.x ^ 1];
  out[2 * threadIdx.x + 1] = more[threadIdx.x ^ 1];
  __syncthreads();
  values[threadIdx.x] = more[threadIdx.x] = T(2);
}

__global__ void never_written(float* out) {
  __shared__ float value;
  out[threadIdx.x] = value;
}

__global__ void nothing() {}

template <class T>
void print(const char* name, const T* values, int count) {
  std::printf("%s", name);
  for (int i = 0; i < count; ++i) std::printf(" %.17g", double(values[i]));
  std::printf("\n");
}

thread_local int host_variable = 7;

int main() {
  int rows[kRows * 64], last[2] = {}, cells[2 * 3 * 2 * 24] = {}, errors[5];
  unsigned ballots[4], bits = 0;
  float partial[40], looked[64], sum = 0, one;
  double doubles[64];
  launch(shuffles, 1, 64)(rows);
  for (int r = 0; r < kRows; ++r) print("shuffle", rows + 64 * r, 64);
  launch(votes, 1, 32)(ballots);
  print("votes", ballots, 4);
  launch(partial_warp, 1, 40)(partial);
  print("partial_warp", partial, 40);
  launch(atomics, 2, 100)(last, &bits, &sum);
  print("atomics", last, 2);
  print("bits", &bits, 1);
  print("sum", &sum, 1);
  launch(dimensions, dim3(2, 3, 2), dim3(4, 3, 2))(cells);
  print("dimensions", cells, 288);
  launch(looks<float, false>, 2, 32, 128)(looked);
  print("unwritten", looked, 64);
  launch(looks<float, true>, 2, 32, 128)(looked);
  print("written", looked, 64);
  launch(looks<double, false>, 2, 32, 256)(doubles);
  print("unwritten", doubles, 64);
  launch(never_written, 1, 1)(&one);
  print("unwritten", &one, 1);
  print("host", &host_variable, 1);
  errors[0] = launch(nothing, 1, 1024)();
  errors[1] = launch(nothing, 1, 1025)();
  errors[2] = launch(nothing, 0, 32)();
  errors[3] = launch(nothing, dim3(1, 65536), 32)();
  errors[4] = launch(nothing, 1, 32, (48 << 10) + 1)();
  print("errors", errors, 5);
}
