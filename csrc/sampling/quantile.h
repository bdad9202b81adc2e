// Quantiles of |x|, sample by sample, by radix selection on the bits: |x| orders like its bits.
#pragma once
#include "../common/dtype.h"
#include "../common/stream.h"

namespace dither {
constexpr int kDigitBits = 11, kDigits = 1 << kDigitBits;

template <class T>
struct Magnitude;
template <>
struct Magnitude<float> {
  using Key = unsigned;
  static constexpr int bits = 31;
  static constexpr Key infinity = 0x7f800000u;
};
template <>
struct Magnitude<double> {
  using Key = unsigned long long;
  static constexpr int bits = 63;
  static constexpr Key infinity = 0x7ff0000000000000ull;
};
template <class S>
using Computed = decltype(widen(S{}));
template <class S>
using Key = typename Magnitude<Computed<S>>::Key;
template <class S>
DITHER_HD Key<S> magnitude(S x) {
  return bit_as<Key<S>>(widen(x)) & (~Key<S>(0) >> 1);
}

// Between the places `below` and `above` of a sample in order, `weight` of the way.
struct Quantile {
  const void* x;  // [samples][sample]
  void* out;      // [samples], float or, for doubles, double
  DType type;
  int64_t samples, sample, below, above;
  double weight;
};

// From the magnitudes at these places and the largest of all; torch's interpolation, but between infinities it is infinite.
template <class T>
DITHER_HD T quantile_of(typename Magnitude<T>::Key below, typename Magnitude<T>::Key above, typename Magnitude<T>::Key largest,
                        double weight) {
  constexpr auto infinity = Magnitude<T>::infinity;
  if (largest > infinity) return bit_as<T>(infinity | infinity >> 1);  // NaN
  const T a = bit_as<T>(below), b = bit_as<T>(above), w = T(weight);
  if (below == above || above == infinity) return b;
  return w < T(0.5) ? a + w * (b - a) : b - (b - a) * (T(1) - w);
}

int quantile_cuda(const Quantile&, Stream);
}  // namespace dither
