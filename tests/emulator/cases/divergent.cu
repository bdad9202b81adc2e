// Barriers that not every thread reaches, by name; "uniform" runs them all with every thread.
#include <cstdio>
#include <cstring>

#include "launch.cuh"

__global__ void branch(int threads) {
  if (int(threadIdx.x) < threads) __syncthreads();
}

__global__ void two_places(int threads) {
  if (int(threadIdx.x) < threads) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void loop(int threads) {
  for (int i = 0; i < (int(threadIdx.x) < threads ? 3 : 2); ++i) __syncthreads();
}

__global__ void shuffle(int threads, int* out) {
  if (int(threadIdx.x) < threads) out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1, 1);
  __syncthreads();
}

__global__ void mask(unsigned mask, int* out) { out[threadIdx.x] = __shfl_xor_sync(mask, 1, 1); }

__global__ void throws(bool really) {
#if !defined(__CUDACC__)
  if (really) throw 1;
#endif
}

int main(int, char** argv) {
  const auto chosen = [&](const char* name) { return std::strcmp(argv[1], name) == 0; };
  const auto threads = [&](const char* name) { return chosen(name) ? 16 : 64; };
  int out[64];
  launch(branch, 2, 64)(threads("branch"));
  launch(two_places, 2, 64)(threads("two_places"));
  launch(loop, 2, 64)(threads("loop"));
  launch(shuffle, 2, 64)(threads("shuffle"), out);
  launch(mask, 2, 64)(chosen("mask") ? 0xffffu : 0xffffffffu, out);
  launch(throws, 2, 64)(chosen("throws"));
  std::printf("done\n");
}
