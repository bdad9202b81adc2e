// What kernels of plans share.
#pragma once
#include <algorithm>
#include <vector>
#include "../common/launch.cuh"
#include "sinkhorn.h"

namespace dither {
constexpr int64_t kPoll = 16;  // iterations between two looks of the host at whether all is done

__device__ inline double term(bool narrow, double x) {
  return narrow ? double(power_of_2<float, uint32_t>(float(x))) : exp2_of_double(x);
}

// Whether all of `flags` are set; false in a capture, where nobody can know.
inline int all_set(const double* flags, int64_t count, Stream stream, bool& all) {
  all = false;
  if (is_capturing(stream)) return 0;
  std::vector<double> set(count);
  const int error = read_back(set.data(), flags, count * sizeof(double), stream);
  all = !error && std::find(set.begin(), set.end(), 0.0) == set.end();
  return error;
}

template <class Join>
__device__ inline double over_block(double mine, double* shared, const Join& join) {
  __syncthreads();
  shared[threadIdx.x] = mine;
  for (int half = blockDim.x / 2; half > 0; half /= 2) {
    __syncthreads();
    if (int(threadIdx.x) < half) shared[threadIdx.x] = join(shared[threadIdx.x], shared[threadIdx.x + half]);
  }
  __syncthreads();
  return shared[0];
}
struct Plus {
  __device__ double operator()(double a, double b) const { return a + b; }
};
}  // namespace dither
