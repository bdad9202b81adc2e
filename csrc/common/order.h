// Integers in the order of numbers, so that digits and bits of floating-point numbers can be selected and sorted.
#pragma once
#include "dtype.h"

namespace dither {
// 0 and -0 alike, NaN below -infinity, all ones above infinity.
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

// The number of a key; a NaN again.
DITHER_HD float of_order_key(uint32_t key) { return bit_as<float>(key & 0x80000000u ? key & 0x7fffffffu : ~key); }
DITHER_HD double of_order_key(uint64_t key) { return bit_as<double>(key >> 63 ? key & 0x7fffffffffffffffull : ~key); }
}  // namespace dither
