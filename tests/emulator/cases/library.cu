// Compiled several times into one library: the units share a template kernel and its shared memory.
#include "launch.cuh"

template <class T>
__global__ void sum(T* out) {
  __shared__ T values[64];
  values[threadIdx.x] = T(threadIdx.x);
  __syncthreads();
  if (threadIdx.x > 0) return;
  *out = 0;
  for (T value : values) *out += value;
}

__global__ static void unwritten(float* out) {
  __shared__ float value;
  *out = value;
}

__global__ static void last_block(int* out) { *out = blockIdx.x; }

extern "C" double NAME(sum)() {
  double out;
  return launch(sum<double>, 1, 64)(&out), out;
}
extern "C" float NAME(unwritten)() {
  float out;
  return launch(unwritten, 1, 1)(&out), out;
}
extern "C" int NAME(last_block)(int order) {
  int out;
  emulator::order = order;
  return launch(last_block, 4, 1)(&out), out;
}
