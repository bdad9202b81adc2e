#include "quantile.h"
#include "../common/launch.cuh"

namespace dither {
constexpr int kThreads = 1024;
static_assert(kDigits == 2 * kThreads);

// A block a sample: digit by digit from the top, which digit the wanted one has, among those whose higher digits are its own.
template <class S>
__global__ void __launch_bounds__(kThreads) quantile_kernel(const __grid_constant__ Quantile q) {
  using K = Key<S>;
  using T = Computed<S>;
  __shared__ unsigned count[kDigits], until[kThreads];
  __shared__ unsigned long long found[3];  // digit; the complement of the least above; largest
  __shared__ unsigned before, equal;       // of the candidates, those below the digit and those with it
  const int t = threadIdx.x;
  const S* x = static_cast<const S*>(q.x) + int64_t(blockIdx.x) * q.sample;
  K prefix = 0, largest = 0;
  unsigned rank = unsigned(q.below);
  if (t < 3) found[t] = 0;
  for (int known = Magnitude<T>::bits; known > 0;) {
    const int shift = known > kDigitBits ? known - kDigitBits : 0;
    count[2 * t] = count[2 * t + 1] = 0;
    __syncthreads();
    for (int64_t i = t; i < q.sample; i += kThreads) {
      const K key = magnitude(x[i]);
      largest = key > largest ? key : largest;
      if (key >> known == prefix) atomicAdd(&count[key >> shift & ((1u << (known - shift)) - 1)], 1u);
    }
    __syncthreads();
    const unsigned low = count[2 * t], both = low + count[2 * t + 1];
    until[t] = both;
    for (int step = 1; step < kThreads; step *= 2) {
      __syncthreads();
      const unsigned more = t >= step ? until[t - step] : 0;
      __syncthreads();
      until[t] += more;
    }
    const unsigned end = until[t], begin = end - both, middle = begin + low;
    if (begin <= rank && rank < end) {
      const bool high = rank >= middle;
      found[0] = 2 * t + high;
      before = high ? middle : begin;
      equal = high ? end - middle : low;
    }
    __syncthreads();
    prefix = prefix << (known - shift) | K(found[0]);
    rank -= before;
    known = shift;
  }
  unsigned long long least = 0;  // complement of the least magnitude above
  const bool next = q.above != q.below && rank + 1 >= equal;
  for (int64_t i = t; next && i < q.sample; i += kThreads) {
    const K key = magnitude(x[i]);
    if (key > prefix && ~static_cast<unsigned long long>(key) > least) least = ~static_cast<unsigned long long>(key);
  }
  if (least) atomicMax(&found[1], least);
  atomicMax(&found[2], static_cast<unsigned long long>(largest));
  __syncthreads();
  if (t == 0) static_cast<T*>(q.out)[blockIdx.x] = quantile_of<T>(prefix, next ? K(~found[1]) : prefix, K(found[2]), q.weight);
}

int quantile_cuda(const Quantile& q, Stream stream) {
  int error = 0;
  with_type(q.type,
            [&](auto tag) { error = launch(quantile_kernel<decltype(tag)>, unsigned(q.samples), kThreads, 0, stream)(q); });
  return error;
}
}  // namespace dither
