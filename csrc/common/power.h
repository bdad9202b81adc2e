// Powers of 2 of vectors and of scalars.
#pragma once
#include "scalar.h"

namespace dither {
constexpr double kLog2e = 1.44269504088896338700, kLn2 = 0.693147180559945309417;

// 2^r for |r| <= 1/2, near minimax with a relative error of 1e-7, and Taylor's with 3e-16. V: T, or a vector of T.
// fma(a, b, c): a b + c, rounded once or twice.
template <class T, class V, class Fma>
DITHER_HD V power_near_1(V r, const Fma& fma) {
  V p = V{};
  if constexpr (sizeof(T) == 8) {
    p += T(2.5678435993488206e-11);
    p = fma(p, r, V{} + T(4.4455382718708116e-10));
    p = fma(p, r, V{} + T(7.0549116208011233e-09));
    p = fma(p, r, V{} + T(1.0178086009239699e-07));
    p = fma(p, r, V{} + T(1.3215486790144309e-06));
    p = fma(p, r, V{} + T(1.5252733804059841e-05));
    p = fma(p, r, V{} + T(1.5403530393381609e-04));
    p = fma(p, r, V{} + T(1.3333558146428443e-03));
    p = fma(p, r, V{} + T(9.6181291076284772e-03));
    p = fma(p, r, V{} + T(5.5504108664821580e-02));
    p = fma(p, r, V{} + T(2.4022650695910072e-01));
    p = fma(p, r, V{} + T(6.9314718055994531e-01));
  } else {
    p += T(1.326472712e-03);
    p = fma(p, r, V{} + T(9.671512645e-03));
    p = fma(p, r, V{} + T(5.550733743e-02));
    p = fma(p, r, V{} + T(2.402224209e-01));
    p = fma(p, r, V{} + T(6.931469776e-01));
  }
  return fma(p, r, V{} + T(1));
}
template <class T, class V>
DITHER_HD V power_near_1(V r) {
  return power_near_1<T>(r, [](V a, V b, V c) { return a * b + c; });
}
template <class T>
constexpr T kLeastPower = sizeof(T) == 8 ? T(-1021) : T(-125);
template <class T>
constexpr T kMostPower = sizeof(T) == 8 ? T(1025) : T(129);
// 2^x: 0 of what is less than kLeastPower, infinity of what is too large, NaN of NaN. Int: unsigned integers of V's shape.
template <class T, class Int, class V>
DITHER_HD V power_of_2(V x) {
  constexpr bool kDouble = sizeof(T) == 8;
  constexpr T kRound = kDouble ? T(0x1.8p52) : T(0x1.8p23);  // leaves an integer in the last bits
  constexpr int kHalf = kDouble ? 1022 : 126, kDigits = kDouble ? 52 : 23;
  const V least = V{} + kLeastPower<T>, most = V{} + kMostPower<T>;
  V y = x < least ? least : x;
  y = y > most ? most : y;
  const V shifted = y + kRound, p = power_near_1<T>(y - (shifted - kRound));
  const Int exponent = (bit_as<Int>(shifted) + kHalf) << kDigits;
  const V result = (p + p) * bit_as<V>(exponent);
  return x < least ? V{} : result;
}
}  // namespace dither
