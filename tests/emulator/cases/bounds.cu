// One access past the end of each kind of memory, by name; "healthy" stays inside.
#include <cstdio>
#include <cstring>
#include <vector>

#include "launch.cuh"

constexpr int kThreads = 64;
enum Victim { kNone, kGlobalRead, kGlobalWrite, kDynamicRead, kDynamicWrite, kStaticWrite, kLocalWrite };
const char* const kNames[] = {"healthy",       "global_read",  "global_write", "dynamic_read",
                              "dynamic_write", "static_write", "local_write"};

// Every thread gives its value to its neighbour through each memory; the last one overruns the victim.
__global__ void ring(const float* in, float* out, int victim) {
  __shared__ float fixed[kThreads];
  DYNAMIC_SHARED(float, dynamic);
  float local[4];
  const int t = threadIdx.x, next = (t + 1) % kThreads;
  const auto at = [&](Victim v, int index, int size = kThreads) { return victim == v && t == kThreads - 1 ? size : index; };
  dynamic[at(kDynamicWrite, next)] = in[at(kGlobalRead, t)];
  __syncthreads();
  fixed[at(kStaticWrite, next)] = dynamic[at(kDynamicRead, t)];
  __syncthreads();
  local[at(kLocalWrite, t % 4, 4)] = fixed[t];
  __syncthreads();
  out[at(kGlobalWrite, t)] = local[t % 4] + __shfl_xor_sync(0xffffffffu, 0.0f, 1);
}

int main(int, char** argv) {
  int victim = 0;
  while (std::strcmp(argv[1], kNames[victim]) != 0) ++victim;
  std::vector<float> in(kThreads), out(kThreads);
  for (int i = 0; i < kThreads; ++i) in[i] = i;
  for (int repeat = 0; repeat < 3; ++repeat) launch(ring, 4, kThreads, kThreads * sizeof(float))(in.data(), out.data(), victim);
  bool right = true;
  for (int i = 0; i < kThreads; ++i) right = right && out[i] == (i + kThreads - 2) % kThreads;
  std::printf("%s\n", right ? "right" : "wrong");
}
