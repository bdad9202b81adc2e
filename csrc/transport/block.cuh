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

template <class S>
__device__ inline double cost_at(const Costs& c, int64_t problem, int64_t i, int64_t j) {
  const S* x = static_cast<const S*>(c.x) + problem * c.x_batch + i * c.dim;  // dim is m where costs are given
  if (c.ground == Ground::given) return double(x[j]);
  const S* y = static_cast<const S*>(c.y) + problem * c.y_batch + j;
  S sum = 0;
  for (int64_t k = 0; k < c.dim; ++k) sum = distance_part(c.ground, x[k], y[k * c.m], sum);
  return double(c.ground == Ground::euclidean ? square_root(sum) : sum);
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
