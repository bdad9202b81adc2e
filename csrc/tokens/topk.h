// The k tokens of highest score of each row, in the order of their places. Equal scores: the lower place first.
#pragma once
#include "../common/dtype.h"
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

// Integers in the order of numbers, 0 and -0 alike, NaN below -infinity, all ones above infinity.
DITHER_HD uint32_t order_key(float x) {
  const uint32_t bits = bit_as<uint32_t>(x + 0.0f);
  return x != x ? 0 : bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
DITHER_HD uint64_t order_key(double x) {
  const uint64_t bits = bit_as<uint64_t>(x + 0.0);
  return x != x ? 0 : bits >> 63 ? ~bits : bits | 0x8000000000000000ull;
}
template <class S>
using OrderKey = decltype(order_key(widen(S{})));
template <class S>
DITHER_HD OrderKey<S> key_at(const TopK& t, int64_t row, int64_t i) {
  return t.is_protected(row, i) ? ~OrderKey<S>(0) : order_key(widen(static_cast<const S*>(t.scores)[row * t.count + i]));
}

int topk_cuda(const TopK&, Stream);
}  // namespace dither
