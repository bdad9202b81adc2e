// Uniform words -> normals (Box & Muller 1958), by polynomials in plain multiplies and adds, so that every instruction set
// and CUDA give the same bits. Checked over all 2^32 words: finite, radius monotone and at most 6.6604, no subnormals.
#pragma once
#include "scalar.h"

namespace dither {
// -2 ln u, u = ((w >> 1) + 1/2) 2^-31 rounded to float, in [2^-32, 1].
DITHER_HD float minus_two_log(uint32_t w) {
  const float u = (float(int32_t(w >> 1)) + 0.5f) * 0x1p-31f;
  const int32_t bits = bit_as<int32_t>(u);
  const int32_t e = (bits - 0x3f3504f3) & int32_t(0xff800000);  // exponent that leaves m in [sqrt(1/2), sqrt(2)) ...
  const float m = bit_as<float>(bits - e) - 1.0f;               // ... minus 1, exact
  float p = -0.17400871f;                                       // -2 ln(1+m) = -2m + m^2 + m^3 p(m), error 3.5e-8
  p = p * m + 0.28534973f;
  p = p * m - 0.29829535f;
  p = p * m + 0.3315517f;
  p = p * m - 0.39926127f;
  p = p * m + 0.50002676f;
  p = p * m - 0.6666782f;
  const float z = m * m, y = z * m * p + z - (m + m);
  return float(e) * float(-1.3862943611198906 * 0x1p-23) + y;  // e is a multiple of 2^23: float(e) is exact
}
// u = (w0 >> 1) 2^-31 + ((w1 >> 1) + 1/2) 2^-62, in [2^-63, 1].
DITHER_HD double minus_two_log(uint32_t w0, uint32_t w1) {
  return -2.0 * logarithm(double(int32_t(w0 >> 1)) * 0x1p-31 + (double(int32_t(w1 >> 1)) + 0.5) * 0x1p-62);
}

// Unit vector at an angle uniform on 2^32 points: t = int(w) 2^-31 pi/4 in a quarter; the two low bits choose the quarter.
DITHER_HD void direction(uint32_t w, float& x, float& y) {
  const float t = float(int32_t(w)) * float(0.78539816339744831 * 0x1p-31), z = t * t;
  float s = (-0.00019515283f * z + 0.00833216f) * z - 0.16666655f;
  float c = ((-0.0013591853f * z + 0.04165578f) * z - 0.49999884f) * z + 1.0f;
  s = z * t * s + t;
  c = bit_as<float>(bit_as<uint32_t>(c) ^ (w << 31));  // left or right quarter
  const bool swap = w & 2;                             // top or bottom quarter
  x = swap ? s : c;
  y = swap ? c : s;
}
// The same in double from two words; sin and cos: Cephes.
DITHER_HD void direction(uint32_t w0, uint32_t w1, double& x, double& y) {
  const double t = (double(int32_t(w0)) * 0x1p-31 + double(int32_t(w1 >> 1)) * 0x1p-62) * 0.78539816339744831, z = t * t;
  double s = 1.58962301576546568060e-10;
  s = s * z - 2.50507477628578072866e-8;
  s = s * z + 2.75573136213857245213e-6;
  s = s * z - 1.98412698295895385996e-4;
  s = s * z + 8.33333333332211858878e-3;
  s = s * z - 1.66666666666666307295e-1;
  s = z * t * s + t;
  double c = -1.13585365213876817300e-11;
  c = c * z + 2.08757008419747316778e-9;
  c = c * z - 2.75573141792967388112e-7;
  c = c * z + 2.48015872888517045348e-5;
  c = c * z - 1.38888888888730564116e-3;
  c = c * z + 4.16666666666665929218e-2;
  c = (c * z * z - 0.5 * z) + 1.0;
  c = bit_as<double>(bit_as<uint64_t>(c) ^ uint64_t(w1) << 63);
  const bool swap = w1 & 2;
  x = swap ? s : c;
  y = swap ? c : s;
}

DITHER_HD void box_muller(uint32_t w0, uint32_t w1, float& z0, float& z1) {
  float x, y;
  const float r = square_root(minus_two_log(w0));
  direction(w1, x, y);
  z0 = r * x;
  z1 = r * y;
}
DITHER_HD void box_muller(uint32_t w0, uint32_t w1, uint32_t w2, uint32_t w3, double& z0, double& z1) {
  double x, y;
  const double r = square_root(minus_two_log(w0, w1));
  direction(w2, w3, x, y);
  z0 = r * x;
  z1 = r * y;
}
}  // namespace dither
