// The k tokens of highest score of each row, in the order of their places. Equal scores: the lower place first.
#pragma once
#include "../common/order.h"
#include "../common/stream.h"

namespace dither {
struct TopK {
  const void* scores;   // [batch][count]
  const uint8_t* mask;  // 1: chosen before any score; [batch][count] with strides, or nullptr
  int64_t mask_stride[2];
  int64_t batch, count, k, protect;  // protect: so many first tokens as by the mask
  int64_t* indices;                  // [batch][k]
  DType type;
  DITHER_HD bool is_protected(int64_t row, int64_t i) const {
    return i < protect || (mask && mask[row * mask_stride[0] + i * mask_stride[1]]);
  }
};

template <class S>
DITHER_HD OrderKey<S> key_at(const TopK& t, int64_t row, int64_t i) {
  return t.is_protected(row, i) ? ~OrderKey<S>(0) : order_key(widen(static_cast<const S*>(t.scores)[row * t.count + i]));
}

int topk_cuda(const TopK&, Stream);
}  // namespace dither
