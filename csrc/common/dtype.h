// Storage types beside the compute types float and double, and the two ways to round into them.
#pragma once
#include "scalar.h"

namespace dither {
template <bool kWide>
struct ComputeType {
  using type = float;
};
template <>
struct ComputeType<true> {
  using type = double;
};

enum class DType : int8_t { f32, f64, bf16, f16 };

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

DITHER_HD float widen(float x) { return x; }
DITHER_HD double widen(double x) { return x; }
DITHER_HD float widen(bfloat16 x) { return bit_as<float>(uint32_t(x.bits) << 16); }
// IEEE binary16 by selects only, so that the loop around it vectorises. Subnormals: 2^-14 + m 2^-24 - 2^-14 is exact.
DITHER_HD float widen(float16 x) {
  const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13, sign = uint32_t(x.bits & 0x8000) << 16;
  const float normal = bit_as<float>(magnitude + (112u << 23));
  const float subnormal = bit_as<float>(magnitude + (113u << 23)) - 0x1p-14f;
  const uint32_t special = magnitude + (224u << 23);
  const uint32_t y = magnitude >= (31u << 23) ? special : bit_as<uint32_t>(magnitude < (1u << 23) ? subnormal : normal);
  return bit_as<float>(y | sign);
}

// yes ? a : b, in a form that vectorises.
template <class T>
DITHER_HD T pick(bool yes, T a, T b) {
  if constexpr (sizeof(T) == 2) return T{uint16_t(yes ? a.bits : b.bits)};
  else return yes ? a : b;
}

// Round to nearest even.
DITHER_HD void narrow(float x, float& y) { y = x; }
DITHER_HD void narrow(double x, double& y) { y = x; }
DITHER_HD void narrow(double x, float& y) { y = float(x); }
DITHER_HD void narrow(float x, double& y) { y = double(x); }
DITHER_HD uint32_t nearest_bfloat16(uint32_t b) {
  const uint32_t rounded = (b + 0x7fff + (b >> 16 & 1)) >> 16;
  return (b & 0x7fffffff) > 0x7f800000 ? (b >> 16 | 0x40) : rounded;  // a NaN stays one
}
DITHER_HD void narrow(float x, bfloat16& y) { y.bits = uint16_t(nearest_bfloat16(bit_as<uint32_t>(x))); }
DITHER_HD uint32_t nearest_float16(uint32_t b) {
  const uint32_t sign = b >> 16 & 0x8000, magnitude = b & 0x7fffffff;
  const uint32_t normal = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  const uint32_t subnormal = bit_as<uint32_t>(bit_as<float>(magnitude) + 0.5f) - 0x3f000000u;  // adder rounds to 2^-24
  const uint32_t finite = magnitude < (113u << 23) ? subnormal : normal;
  const uint32_t special = magnitude > 0x7f800000 ? 0x7e00u : 0x7c00u;
  return (magnitude >= 0x477ff000u ? special : finite) | sign;  // 65520 and above: infinity
}
DITHER_HD void narrow(float x, float16& y) { y.bits = uint16_t(nearest_float16(bit_as<uint32_t>(x))); }

// Stochastic rounding: up with the probability of the remainder, r uniform on 16 bits. NaN and infinity pass; values above
// the largest finite float16 round as to nearest.
DITHER_HD void narrow(float x, uint32_t, float& y) { y = x; }
DITHER_HD void narrow(double x, uint32_t, double& y) { y = x; }
DITHER_HD void narrow(double x, uint32_t, float& y) { y = float(x); }
DITHER_HD void narrow(float x, uint32_t, double& y) { y = double(x); }
DITHER_HD void narrow(float x, uint32_t r, bfloat16& y) {
  const uint32_t b = bit_as<uint32_t>(x), up = (b + r) >> 16;
  y.bits = uint16_t((b & 0x7fffffff) >= 0x7f7f0000 ? nearest_bfloat16(b) : up);
}
DITHER_HD void narrow(float x, uint32_t r, float16& y) {
  const uint32_t b = bit_as<uint32_t>(x), sign = b >> 16 & 0x8000, magnitude = b & 0x7fffffff;
  const uint32_t normal = (magnitude - (112u << 23) + (r >> 3)) >> 13;
  // Below 2^-14 the spacing is 2^-24: in units of 2^-40 the remainder has the 16 bits that r is compared with.
  const uint32_t units = uint32_t(int32_t((magnitude < (113u << 23) ? bit_as<float>(magnitude) : 0.0f) * 0x1p40f));
  const uint32_t subnormal = (units + r) >> 16;
  const uint32_t finite = (magnitude < (113u << 23) ? subnormal : normal) | sign;
  y.bits = uint16_t(magnitude >= 0x477fe000u ? nearest_float16(b) : finite);
}

// The 16 bits that round slot j (0 = parameter, 1.. = states) of an element whose random word is w: low half, high half,
// low + high, low + 3 high mod 2^16. The first three are pairwise independent.
struct RoundingBits {
  uint32_t from_low, from_high;
  DITHER_HD explicit RoundingBits(int slot) : from_low(slot == 1 ? 0 : 1), from_high(slot == 0 ? 0 : slot == 3 ? 3 : 1) {}
  DITHER_HD uint32_t operator()(uint32_t w) const { return ((w & 0xffff) * from_low + (w >> 16) * from_high) & 0xffff; }
};

DITHER_HD int64_t size_of(DType t) { return t == DType::f64 ? 8 : t == DType::f32 ? 4 : 2; }

// with_type(dtype, [&](auto tag) { using Stored = decltype(tag); ... })
#if defined(__CUDACC__)
#pragma nv_exec_check_disable  // f runs where its caller does
#endif
template <class F>
DITHER_HD void with_type(DType t, F&& f) {
  if (t == DType::f32) f(float{});
  else if (t == DType::bf16) f(bfloat16{});
  else if (t == DType::f16) f(float16{});
  else f(double{});
}
}  // namespace dither
