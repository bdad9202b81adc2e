// launch(kernel, grid, block, smem, stream)(args...): one spelling for nvcc and for the emulator of the tests.
#pragma once
#if defined(__CUDACC__)
#include <cuda_runtime.h>
#define DYNAMIC_SHARED(T, name)                      \
  extern __shared__ __align__(16) char name##_raw[]; \
  T* name = reinterpret_cast<T*>(name##_raw)
template <class... P>
auto launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t smem = 0, cudaStream_t stream = nullptr) {
  return [=](const P&... args) {
    kernel<<<grid, block, smem, stream>>>(args...);
    return int(cudaGetLastError());
  };
}
#else
#include "cuda_on_cpu.h"
#endif

// An integer as a type: of_size(Constant<4>{}).
template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};
