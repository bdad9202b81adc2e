// a b + c for sums of products: rounded once in float, twice in double, the same on every device.
#pragma once
#include "../common/scalar.h"

namespace dither {
DITHER_HD double multiply_add(double a, double b, double c) { return a * b + c; }
DITHER_HD float multiply_add(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#elif defined(__FMA__) || defined(__aarch64__)
  return __builtin_fmaf(a, b, c);
#else
  // The product is exact in double. The sum is rounded to odd there, which leaves the second rounding as if there were no first
  // (Boldo and Melquiond 2008).
  const double product = double(a) * double(b), term = double(c), sum = product + term;
  const double other = sum - product, error = (product - (sum - other)) + (term - other);
  const int64_t bits = bit_as<int64_t>(sum);
  const bool inexact = error < 0.0 || error > 0.0, even = (bits & 1) == 0;
  return float(bit_as<double>(inexact && even ? bits + ((error > 0.0) == (sum > 0.0) ? 1 : -1) : bits));
#endif
}
}  // namespace dither
