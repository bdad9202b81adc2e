// Sums of clipped gradients in integers, and Gaussian noise rounded to integers: what a float cannot leak.
#pragma once
#include "../common/address.h"
#include "../common/chacha.h"
#include "../common/cpu.h"
#include "../common/dtype.h"
#include "../common/normal.h"
#include "../common/stream.h"

namespace dither {
// The nearest integer, ties to even, of |x| < 2^51: as an integer and as a double.
constexpr double kMagic = 6755399441055744.0;  // 1.5 2^52
DITHER_HD int64_t nearest_integer(double x) { return bit_as<int64_t>(x + kMagic) - bit_as<int64_t>(kMagic); }
DITHER_HD double nearest(double x) { return (x + kMagic) - kMagic; }

// sum[j] += sum over rows of the nearest integer to factor row[j] / grid. Rows of factor 0 add nothing, whatever they hold.
struct Accumulate {
  int64_t* sum;
  const void *rows, *factor;
  double per_grid;  // 1 / grid, a power of 2
  int64_t count, columns, pitch;
  DType type;
  bool wide_factor;

  DITHER_HD double scale(int64_t row) const {
    return per_grid * (wide_factor ? static_cast<const double*>(factor)[row] : double(static_cast<const float*>(factor)[row]));
  }
};
constexpr double kMostUnits = 0x1p50;  // what one row can add at most; a NaN adds 0
template <class S>
DITHER_HD int64_t units_of(S x, double scale) {
  const double y = double(widen(x)) * scale;
  const double low = y > -kMostUnits ? y : -kMostUnits;  // a NaN too
  const double clamped = low < kMostUnits ? low : kMostUnits;
  return nearest_integer(y == y ? clamped : 0.0);
}

// sum[j] += round(std z), z normal: elements start + j.
struct ExactNoise {
  int64_t* sum;
  Address address;
  double std;
  int64_t start;
};

// A normal is a function of a uniform U, of a direction in an eighth T, and of two bits. The words of layout v1 are the first
// 62 binary digits of U and 61 of T; a second block of the same element, of its own kind, has 64 more of each. A double is
// enough to round std z unless that is close to half an integer: then all digits are used, with 106 bits of precision.
//
// The double std z is std (kAngle + (kRadius + kDigits / u) / r) / 8 off at most: docs/privacy.md, Rounded normals.
constexpr double kAngle = 0x1p-44, kRadius = 0x1p-50, kDigits = 0x1p-60;
constexpr double kLeastUniform = 0x1p-40;  // below, cells are not small: all digits

// The pair of a block's words, rounded; nonzero: it has to be done with all digits.
DITHER_HD int64_t round_pair(uint32_t w0, uint32_t w1, uint32_t w2, uint32_t w3, double std, int64_t& q0, int64_t& q1) {
  const double u = double(int32_t(w0 >> 1)) * 0x1p-31 + (double(int32_t(w1 >> 1)) + 0.5) * 0x1p-62;
  const double r = square_root(-2.0 * logarithm(u));
  double c, s;
  direction(w2, w3, c, s);
  const double x = std * (r * c), y = std * (r * s);
  const double safe = 0.5 - std * (kAngle + (kRadius + kDigits / u) / r);
  q0 = nearest_integer(x);
  q1 = nearest_integer(y);
  const bool usual = (u > kLeastUniform) & (u < 1.0);  // at 1 the radius is -0, and so 1 / r no bound
  const bool sure = (absolute(x - nearest(x)) < safe) & (absolute(y - nearest(y)) < safe) & usual;
  return sure ? 0 : 1;
}

// Numbers of twice the precision: high + low, |low| at most half an ulp of high (Dekker 1971). Products without fma.
struct Twofold {
  double high, low;
};
DITHER_HD Twofold two_sum(double a, double b) {
  const double s = a + b, part = s - a;
  return {s, (a - (s - part)) + (b - part)};
}
DITHER_HD Twofold fast_two_sum(double a, double b) {
  const double s = a + b;
  return {s, b - (s - a)};
}
DITHER_HD Twofold two_product(double a, double b) {
  const double ta = 134217729.0 * a, tb = 134217729.0 * b;
  const double a1 = ta - (ta - a), a2 = a - a1, b1 = tb - (tb - b), b2 = b - b1, p = a * b;
  return {p, ((a1 * b1 - p) + a1 * b2 + a2 * b1) + a2 * b2};
}
DITHER_HD Twofold operator+(Twofold a, Twofold b) {
  const Twofold s = two_sum(a.high, b.high), t = two_sum(a.low, b.low);
  const Twofold v = fast_two_sum(s.high, s.low + t.high);
  return fast_two_sum(v.high, v.low + t.low);
}
DITHER_HD Twofold operator-(Twofold a) { return {-a.high, -a.low}; }
DITHER_HD Twofold operator*(Twofold a, Twofold b) {
  const Twofold p = two_product(a.high, b.high);
  return fast_two_sum(p.high, p.low + (a.high * b.low + a.low * b.high));
}
DITHER_HD Twofold operator*(Twofold a, double b) { return a * Twofold{b, 0.0}; }
DITHER_HD Twofold operator/(Twofold a, Twofold b) {
  const double q = a.high / b.high;
  const Twofold rest = a + -(b * q);
  const double q2 = rest.high / b.high;
  const Twofold rest2 = rest + -(b * q2);
  return fast_two_sum(q, q2) + Twofold{rest2.high / b.high, 0.0};
}
DITHER_HD Twofold operator/(Twofold a, double b) { return a / Twofold{b, 0.0}; }

// ln x of x in (0, 1]: x = 2^k m, ln m = 2 artanh((m - 1) / (m + 1)), |(m - 1) / (m + 1)| < 0.172.
DITHER_HD Twofold logarithm(Twofold x) {
  const int64_t bits = bit_as<int64_t>(x.high);
  const int64_t e = (bits - 0x3fe6a09e667f3bcdll) & int64_t(0xfff0000000000000ull);
  const double k = double(int32_t(e >> 32)) * 0x1p-20, down = bit_as<double>(0x3ff0000000000000ll - e);
  const Twofold m{x.high * down, x.low * down}, one{1.0, 0.0};
  const Twofold s = (m + -one) / (m + one), z = s * s;
  Twofold p{0.0, 0.0};
  for (int n = 47; n > 0; n -= 2) p = p * z + one / double(n);
  return Twofold{0x1.62e42fefa39efp-1, 0x1.abc9e3b39803fp-56} * k + s * p * 2.0;
}
DITHER_HD Twofold square_root(Twofold x) {
  if (x.high <= 0.0) return {0.0, 0.0};
  const double r = square_root(x.high);
  const Twofold rest = x + -two_product(r, r);
  return fast_two_sum(r, rest.high / (2.0 * r));
}
// cos (first 0) or sin (first 1) of |x| <= pi/4 by Taylor's series.
DITHER_HD Twofold circular(Twofold x, int first) {
  const Twofold z = x * x, one{1.0, 0.0};
  Twofold p = one;
  for (int n = 32 + first; n > first; n -= 2) p = one + -(p * z / double(n * (n - 1)));
  return first ? x * p : p;
}
DITHER_HD int64_t nearest_integer(Twofold x) {
  const double n = nearest(x.high), rest = x.high - n;  // exact
  return nearest_integer(n) + (rest == 0.5 && x.low > 0.0) - (rest == -0.5 && x.low < 0.0);
}
// w: the words of the pair; v: its further digits.
DITHER_HD void round_pair_with_all_digits(const uint32_t* w, const uint32_t* v, double std, int64_t& q0, int64_t& q1) {
  const Twofold u = Twofold{double(w[0] >> 1) * 0x1p-31, 0.0} + Twofold{double(w[1] >> 1) * 0x1p-62, 0.0} +
                    Twofold{double(v[0]) * 0x1p-94, (double(v[1]) + 0.5) * 0x1p-126};
  const Twofold t = Twofold{double(int32_t(w[2])) * 0x1p-31, 0.0} + Twofold{double(w[3] >> 2) * 0x1p-61, 0.0} +
                    Twofold{double(v[2]) * 0x1p-93, (double(v[3]) + 0.5) * 0x1p-125};
  const Twofold r = square_root(logarithm(u) * -2.0) * std, angle = t * Twofold{0x1.921fb54442d18p-1, 0x1.1a62633145c07p-55};
  const Twofold cosine = r * circular(angle, 0), s = r * circular(angle, 1), c = w[3] & 1 ? -cosine : cosine;
  q0 = nearest_integer(w[3] & 2 ? s : c);
  q1 = nearest_integer(w[3] & 2 ? c : s);
}
DITHER_HD Address address_of_digits(const Address& a) {
  Address b = a;
  b.kind = Kind::digits64;
  return b;
}

DITHER_PER_ISA(void accumulate_range(const Accumulate&, int64_t lo, int64_t hi))  // columns
DITHER_PER_ISA(void exact_noise_range(const ExactNoise&, int64_t lo, int64_t hi))
int accumulate_cuda(const Accumulate&, Stream);
int exact_noise_cuda(const ExactNoise&, int64_t n, Stream);
}  // namespace dither
