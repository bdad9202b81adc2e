// Scalar building blocks shared by every device, in plain + - * / sqrt: no libm, no fma. Compiled with contraction off,
// the same inputs give the same bits on SSE2, AVX2, AVX-512, NEON and CUDA.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define DITHER_HD __host__ __device__ __forceinline__
#else
#define DITHER_HD inline __attribute__((always_inline))
#endif
#define DITHER_PRAGMA(text) _Pragma(#text)
#if defined(__CUDA_ARCH__)
#define DITHER_UNROLL(count) DITHER_PRAGMA(unroll)
#elif defined(__CUDACC__)  // nvcc's pass for the host, which knows neither
#define DITHER_UNROLL(count)
#else
#define DITHER_UNROLL(count) DITHER_PRAGMA(GCC unroll count)
#endif

namespace dither {

template <class To, class From>
DITHER_HD To bit_as(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  __builtin_memcpy(&y, &x, sizeof y);
  return y;
}

template <class T>
DITHER_HD T smaller(T a, T b) {
  return a < b ? a : b;
}
template <class T>
DITHER_HD T larger(T a, T b) {
  return a > b ? a : b;
}
// The larger one; NaN if either is.
template <class T>
DITHER_HD T maximum(T a, T b) {
  return a > b || a != a ? a : b;
}
template <class T>
DITHER_HD T absolute(T x) {
  return x < T(0) ? -x : x;
}

DITHER_HD float square_root(float x) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(x);
#else
  return __builtin_sqrtf(x);
#endif
}
DITHER_HD double square_root(double x) {
#if defined(__CUDA_ARCH__)
  return __dsqrt_rn(x);
#else
  return __builtin_sqrt(x);
#endif
}

// exp: x = k ln2 + r, |r| <= ln2/2; Cephes' degree-6 polynomial, relative error below 9e-8. Clamped to [-87, 88].
DITHER_HD float exponential(float x) {
  x = x < -87.0f ? -87.0f : (x > 88.0f ? 88.0f : x);
  const float k = (x * 1.44269504f + 12582912.0f) - 12582912.0f;
  const float r = x - k * 0.693359375f + k * 2.12194440e-4f;
  float y = 1.9875691500e-4f;
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  return y * bit_as<float>((static_cast<int32_t>(k) + 127) << 23);
}

// exp in double: fdlibm's e_exp.c (Sun Microsystems 1993), below 1 ulp. Clamped to [-708, 709].
DITHER_HD double exponential(double x) {
  x = x < -708.0 ? -708.0 : (x > 709.0 ? 709.0 : x);
  const double k = (x * 1.44269504088896338700 + 6755399441055744.0) - 6755399441055744.0;
  const double high = x - k * 6.93147180369123816490e-01, low = k * 1.90821492927058770002e-10;
  const double r = high - low, z = r * r;
  double p = 4.13813679705723846039e-08;
  p = p * z - 1.65339022054652515390e-06;
  p = p * z + 6.61375632143793436117e-05;
  p = p * z - 2.77777777770155933842e-03;
  p = p * z + 1.66666666666666019037e-01;
  const double c = r - z * p;
  const double y = 1.0 - ((low - (r * c) / (2.0 - c)) - high);
  return y * bit_as<double>(int64_t(static_cast<int32_t>(k) + 1023) << 52);
}

// ln x of a normal positive double: fdlibm's e_log.c.
DITHER_HD double logarithm(double x) {
  const int64_t bits = bit_as<int64_t>(x);
  const int64_t e = (bits - 0x3fe6a09e667f3bcdll) & int64_t(0xfff0000000000000ull);  // leaves x 2^-k in [sqrt(1/2), sqrt(2))
  const double f = bit_as<double>(bits - e) - 1.0;
  const double k = double(int32_t(e >> 32)) * 0x1p-20;
  const double s = f / (2.0 + f), z = s * s, h = 0.5 * f * f;
  double p = 1.479819860511658591e-01;
  p = p * z + 1.531383769920937332e-01;
  p = p * z + 1.818357216161805012e-01;
  p = p * z + 2.222219843214978396e-01;
  p = p * z + 2.857142874366239149e-01;
  p = p * z + 3.999999999940941908e-01;
  p = p * z + 6.666666666666735130e-01;
  p = p * z;
  return k * 6.93147180369123816490e-01 - ((h - (s * (h + p) + k * 1.90821492927058770002e-10)) - f);
}

// x^n by squaring. The relative error grows like n eps, exactly where beta^n itself dies out of 1 - beta^n.
DITHER_HD double power(double x, int64_t n) {
  double y = 1.0;
  for (; n > 0; n >>= 1, x *= x)
    if (n & 1) y *= x;
  return y;
}
// x^a for x > 0.
DITHER_HD double real_power(double x, double a) { return exponential(a * logarithm(x)); }

// 0 .. n - 1 as the arguments of a template: typename CountTo<n>::type.
template <int... i>
struct Indices {};
template <int n, int... i>
struct CountTo : CountTo<n - 1, n - 1, i...> {};
template <int... i>
struct CountTo<0, i...> {
  using type = Indices<i...>;
};
}  // namespace dither
