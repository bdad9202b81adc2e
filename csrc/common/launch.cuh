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
// Waits for what the stream has been given so far.
inline int read_back(void* to, const void* from, size_t bytes, cudaStream_t stream) {
  const cudaError_t error = cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream);
  return int(error ? error : cudaStreamSynchronize(stream));
}
inline bool is_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  return cudaStreamIsCapturing(stream, &status) != cudaSuccess || status != cudaStreamCaptureStatusNone;
}
#else
#include "cuda_on_cpu.h"
inline int read_back(void* to, const void* from, size_t bytes, cudaStream_t) {
  std::memcpy(to, from, bytes);
  return 0;
}
inline bool is_capturing(cudaStream_t) { return false; }
#endif

// An integer as a type: of_size(Constant<4>{}).
template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};
