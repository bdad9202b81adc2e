#include "conv.h"
#include "../common/launch.cuh"

namespace dither {
constexpr int kSide = 16, kThreads = kSide * kSide, kPlaces = 32, kPitch = kPlaces + 1;

// A block of threads computes 16 output channels by 16 weights of a group of a sample, a number a thread.
template <class S, class Out>
__global__ void __launch_bounds__(kThreads) conv_kernel(const __grid_constant__ ConvGrads c) {
  using T = decltype(widen(S{}));
  __shared__ T grads[kSide * kPitch], inputs[kSide * kPitch];
  const int64_t across = (c.weights() + kSide - 1) / kSide, down = (c.outputs + kSide - 1) / kSide;
  const int64_t group = blockIdx.x / (across * down);
  const int64_t o = blockIdx.x / across % down * kSide, n = blockIdx.x % across * kSide;
  const S* x = static_cast<const S*>(c.x) + group * c.channels * c.rows.size * c.columns.size;
  const S* g = static_cast<const S*>(c.g) + group * c.outputs * c.places();
  const int64_t part_rows = chunk_rows(c), part_columns = chunk_columns(c);
  const int row = threadIdx.x / kSide, column = threadIdx.x % kSide;
  T total = 0;
  bool first = true;
  for (int64_t y0 = 0; y0 < c.rows.places; y0 += part_rows)
    for (int64_t x0 = 0; x0 < c.columns.places; x0 += part_columns) {
      const int64_t width = smaller(part_columns, c.columns.places - x0),
                    count = smaller(part_rows, c.rows.places - y0) * width;
      T sum = 0;
      for (int64_t begin = 0; begin < count; begin += kPlaces) {
        __syncthreads();
        for (int at = threadIdx.x; at < kSide * kPlaces; at += kThreads) {
          const int64_t place = begin + at % kPlaces, i = y0 + place / width, j = x0 + place % width;
          const int64_t output = o + at / kPlaces, weight = n + at / kPlaces;
          const int64_t channel = weight / (c.rows.kernel * c.columns.kernel);
          const int64_t p = c.rows.at(i, weight / c.columns.kernel % c.rows.kernel);
          const int64_t q = c.columns.at(j, weight % c.columns.kernel);
          const bool inside = p >= 0 && p < c.rows.size && q >= 0 && q < c.columns.size;
          T u = 0, v = 0;
          if (place < count && output < c.outputs) u = widen(g[output * c.places() + i * c.columns.places + j]);
          if (place < count && weight < c.weights() && inside) v = widen(x[(channel * c.rows.size + p) * c.columns.size + q]);
          grads[at / kPlaces * kPitch + at % kPlaces] = u;
          inputs[at / kPlaces * kPitch + at % kPlaces] = v;
        }
        __syncthreads();
        const int places = int(smaller<int64_t>(kPlaces, count - begin));
        for (int k = 0; k < places; ++k) sum += grads[row * kPitch + k] * inputs[column * kPitch + k];
      }
      total = first ? sum : total + sum;
      first = false;
    }
  if (o + row < c.outputs && n + column < c.weights())
    narrow(total, static_cast<Out*>(c.out)[(group * c.outputs + o + row) * c.weights() + n + column]);
}

int conv_cuda(const ConvGrads& c, Stream stream) {
  const int64_t tiles = (c.weights() + kSide - 1) / kSide * ((c.outputs + kSide - 1) / kSide);
  const unsigned blocks = unsigned(c.batch * c.groups * tiles);
  int error = 0;
  with_type(c.type, [&](auto tag) {
    using S = decltype(tag);
    if (c.out_type == c.type) error = launch(conv_kernel<S, S>, blocks, kThreads, 0, stream)(c);
    else if constexpr (sizeof(S) == 2) error = launch(conv_kernel<S, float>, blocks, kThreads, 0, stream)(c);
  });
  return error;
}
}  // namespace dither
