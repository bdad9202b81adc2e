// Distributions over addressed words: out[i] = f(words of element start + i), or out[i] += that, without storing the noise.
#pragma once
#include "../common/address.h"
#include "../common/cpu.h"
#include "../common/dtype.h"
#include "../common/stream.h"
#include "../common/normal.h"

namespace dither {
enum class Distribution : int8_t { normal, uniform, rademacher, bernoulli, laplace, randint, bits };
enum class Stored : int8_t { f32, f64, bf16, f16, u8, i8, i16, i32, i64 };

struct Draw {
  Address address;
  bool chacha;
  Distribution distribution;
  Stored stored;
  bool add;
  double a, b;  // normal: mean, std. uniform: low, high. bernoulli: p. laplace: loc, scale
  int64_t low;  // randint: low + floor(2^-64 word range)
  uint64_t range;
  int64_t start;  // address of out[0]
};

// A distribution turns the words of elements 32 g + k and 32 g + 16 + k into two values: two words for 4-byte values, four
// for 8-byte values.
template <class T>
struct Normal {
  using Value = T;
  T mean, std;
  DITHER_HD explicit Normal(const Draw& d) : mean(T(d.a)), std(T(d.b)) {}
  DITHER_HD void operator()(const uint32_t (&w)[2], float& x, float& y) const {
    box_muller(w[0], w[1], x, y);
    x = mean + std * x;
    y = mean + std * y;
  }
  DITHER_HD void operator()(const uint32_t (&w)[4], double& x, double& y) const {
    box_muller(w[0], w[1], w[2], w[3], x, y);
    x = mean + std * x;
    y = mean + std * y;
  }
};

// The others draw each element from its own words.
template <class Self, class T>
struct OneByOne {
  using Value = T;
  DITHER_HD void operator()(const uint32_t (&w)[2], T& x, T& y) const {
    x = static_cast<const Self&>(*this).one(w[0]);
    y = static_cast<const Self&>(*this).one(w[1]);
  }
  DITHER_HD void operator()(const uint32_t (&w)[4], T& x, T& y) const {
    x = static_cast<const Self&>(*this).one(w[0], w[1]);
    y = static_cast<const Self&>(*this).one(w[2], w[3]);
  }
};

template <class T>
struct Uniform : OneByOne<Uniform<T>, T> {  // low + (high - low) u, u in [0, 1) with 24 or 53 bits
  T low, width;
  DITHER_HD explicit Uniform(const Draw& d) : low(T(d.a)), width(T(d.b) - T(d.a)) {}
  DITHER_HD T one(uint32_t w) const { return low + width * (T(int32_t(w >> 8)) * T(0x1p-24)); }
  DITHER_HD T one(uint32_t w0, uint32_t w1) const {
    return low + width * ((T(int32_t(w0 >> 5)) * T(67108864) + T(int32_t(w1 >> 6))) * T(0x1p-53));
  }
};
struct Rademacher : OneByOne<Rademacher, float> {
  DITHER_HD explicit Rademacher(const Draw&) {}
  DITHER_HD float one(uint32_t w) const { return bit_as<float>(0x3f800000u | (w & 0x80000000u)); }
  DITHER_HD float one(uint32_t w, uint32_t) const { return one(w); }
};
struct Bernoulli : OneByOne<Bernoulli, float> {
  uint64_t threshold;  // round(p 2^32): p = 1 is always, p = 0 never
  DITHER_HD explicit Bernoulli(const Draw& d) : threshold(uint64_t(d.a * 0x1p32 + 0.5)) {}
  DITHER_HD float one(uint32_t w) const { return w < threshold ? 1.0f : 0.0f; }
  DITHER_HD float one(uint32_t w, uint32_t) const { return one(w); }
};
template <class T>
struct Laplace : OneByOne<Laplace<T>, T> {  // loc -+ scale ln u; the lowest bit, unused by u, is the sign
  T loc, scale;
  DITHER_HD explicit Laplace(const Draw& d) : loc(T(d.a)), scale(T(d.b)) {}
  DITHER_HD T signed_(T magnitude, uint32_t w) const { return loc + scale * (w & 1 ? -magnitude : magnitude); }
  DITHER_HD T one(uint32_t w) const { return signed_(T(0.5) * T(minus_two_log(w)), w); }
  DITHER_HD T one(uint32_t w0, uint32_t w1) const { return signed_(T(0.5) * T(minus_two_log(w0, w1)), w1); }
};
struct RandInt : OneByOne<RandInt, int64_t> {  // bias below range 2^-64
  int64_t low;
  uint64_t range;  // 0 means 2^64
  DITHER_HD explicit RandInt(const Draw& d) : low(d.low), range(d.range) {}
  DITHER_HD int64_t one(uint32_t w) const { return one(w, 0); }
  DITHER_HD int64_t one(uint32_t w0, uint32_t w1) const {
    const uint64_t r0 = uint32_t(range), r1 = range >> 32;  // high half of (w0 w1) x range by 32-bit products
    const uint64_t middle = w0 * r0 + (w1 * r0 >> 32), carry = w1 * r1 + uint32_t(middle);
    const uint64_t high = w0 * r1 + (middle >> 32) + (carry >> 32);
    return int64_t(uint64_t(low) + (range == 0 ? uint64_t(w0) << 32 | w1 : high));
  }
};
struct Bits : OneByOne<Bits, int32_t> {
  DITHER_HD explicit Bits(const Draw&) {}
  DITHER_HD int32_t one(uint32_t w) const { return int32_t(w); }
  DITHER_HD int32_t one(uint32_t w, uint32_t) const { return int32_t(w); }
};

template <class F>
inline auto with_distribution(const Draw& d, F&& f) {
  const bool wide = d.stored == Stored::f64;
  switch (d.distribution) {
    case Distribution::normal: return wide ? f(Normal<double>(d)) : f(Normal<float>(d));
    case Distribution::uniform: return wide ? f(Uniform<double>(d)) : f(Uniform<float>(d));
    case Distribution::laplace: return wide ? f(Laplace<double>(d)) : f(Laplace<float>(d));
    case Distribution::rademacher: return f(Rademacher(d));
    case Distribution::bernoulli: return f(Bernoulli(d));
    case Distribution::randint: return f(RandInt(d));
    default: return f(Bits(d));
  }
}

// put(value, out): numbers convert, 16-bit floats round to nearest even.
template <class Value, class Out>
DITHER_HD void put(Value z, Out& out) {
  out = static_cast<Out>(z);
}
template <class Value>
DITHER_HD void put(Value z, bfloat16& out) {
  narrow(float(z), out);
}
template <class Value>
DITHER_HD void put(Value z, float16& out) {
  narrow(float(z), out);
}
template <class Value, class Out>
DITHER_HD void add(Value z, Out& out) {
  if constexpr (__is_class(Out)) put(widen(out) + float(z), out);
  else out = static_cast<Out>(out + z);
}
template <class F>
DITHER_HD void with_stored(Stored s, F&& f) {
  switch (s) {
    case Stored::f32: return f(float{});
    case Stored::f64: return f(double{});
    case Stored::bf16: return f(bfloat16{});
    case Stored::f16: return f(float16{});
    case Stored::u8: return f(uint8_t{});
    case Stored::i8: return f(int8_t{});
    case Stored::i16: return f(int16_t{});
    case Stored::i32: return f(int32_t{});
    default: return f(int64_t{});
  }
}

// out[i] = x[i] rounded to the nearest or the next value, with the probabilities that make it right on average.
struct Rounding {
  Address address;
  DType from, to;
  int64_t start;
};

DITHER_PER_ISA(void draw_range(const Draw&, void* out, int64_t lo, int64_t hi))  // out[lo .. hi)
DITHER_PER_ISA(void round_range(const Rounding&, const void* x, void* out, int64_t lo, int64_t hi))
int draw_cuda(const Draw&, void* out, int64_t n, Stream);
int round_cuda(const Rounding&, const void* x, void* out, int64_t n, Stream);
}  // namespace dither
