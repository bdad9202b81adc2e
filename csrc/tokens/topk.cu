#include "topk.h"
#include "compact.cuh"

namespace dither {
// A block a row: the k-th key bit by bit from the top, then the places of the keys above it and of as many equal ones as
// remain.
template <class S>
__global__ void __launch_bounds__(1024) topk_kernel(const __grid_constant__ TopK t) {
  using Key = OrderKey<S>;
  __shared__ int shared[kMaxWarps];
  const int64_t row = blockIdx.x;
  const auto count = [&](auto counts) {
    int mine = 0;
    for (int64_t i = threadIdx.x; i < t.count; i += blockDim.x) mine += counts(key_at<S>(t, row, i));
    return sum_of_block(mine, shared);
  };
  Key least = 0;
  for (Key bit = ~(~Key(0) >> 1); bit; bit >>= 1) {
    const Key trial = least | bit;
    if (count([=](Key key) { return key >= trial; }) >= t.k) least = trial;
  }
  int64_t ties = t.k - count([=](Key key) { return key > least; }), chosen = 0;
  for (int64_t begin = 0; begin < t.count; begin += blockDim.x) {
    const int64_t i = begin + threadIdx.x;
    const Key key = i < t.count ? key_at<S>(t, row, i) : 0;
    int equal, taken;
    const bool tie = rank_in_block(i < t.count && key == least, shared, equal) < ties && key == least;
    const int place = rank_in_block(i < t.count && (key > least || tie), shared, taken);
    if (i < t.count && (key > least || tie)) t.indices[row * t.k + chosen + place] = i;
    ties -= equal < ties ? equal : ties;
    chosen += taken;
  }
}

int topk_cuda(const TopK& t, Stream stream) {
  int error = 0;
  with_type(t.type, [&](auto tag) {
    error = launch(topk_kernel<decltype(tag)>, unsigned(t.batch), threads_for(t.count), 0, stream)(t);
  });
  return error;
}
}  // namespace dither
