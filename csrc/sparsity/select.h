// N:M selection: of every m consecutive weights along a dimension keep the n of largest magnitude, the lower index first among
// equals. A weight's memory is dense: [panels][m][inner], whatever its shape and strides.
#pragma once
#include "../common/cpu.h"
#include "../common/dtype.h"
#include "../common/stream.h"

namespace dither {
struct Select {
  const void* w;
  void* out;                    // w where kept, else beta w; or nullptr
  uint8_t* bits;                // one per element in storage order, 1 = kept; or nullptr
  uint8_t* keep;                // bytes 0 and 1; or nullptr
  const void* factor;           // the score is |w| factor[index along the dimension], float or double; or nullptr
  const float* beta_on_device;  // overrides beta
  double beta;
  int64_t panels, inner, groups;  // groups: panels that follow each other along the dimension
  int n, m;
  DType type;
  bool stream_out;  // out is so large that it should not pass through the caches

  DITHER_HD int64_t numel() const { return panels * m * inner; }
};

// out = a where the bit is 1, else scale a + lamb b. Where scale is 0 its product is +0, whatever a is.
struct Blend {
  void* out;
  const void *a, *b;  // b may be nullptr
  const uint8_t* bits;
  const float* scale_on_device;
  double scale, lamb;
  int64_t numel;
  DType type;
  bool stream_out;  // as in Select
};

// The order of magnitudes as integers. NaN is one value above infinity, so that NaNs tie like other equals.
template <class S>
constexpr int64_t kNan = 0x7f800001;
template <>
constexpr int64_t kNan<double> = 0x7ff0000000000001ll;
template <>
constexpr int64_t kNan<bfloat16> = 0x7f81;
template <>
constexpr int64_t kNan<float16> = 0x7c01;
template <int kBytes>
struct KeyOf {
  using type = int32_t;
};
template <>
struct KeyOf<8> {
  using type = int64_t;
};
template <>
struct KeyOf<2> {
  using type = int16_t;
};
template <class S>
DITHER_HD auto magnitude(S x) {
  using Key = typename KeyOf<sizeof(S)>::type;
  return smaller(Key(bit_as<Key>(x) & Key(~(uint64_t(1) << (8 * sizeof(Key) - 1)))), Key(kNan<S>));
}

// A unit of CPU work: some panels where they are small, else a part of one, some lanes wide. Runs of memory that begin or end
// inside a byte of bits update it atomically.
constexpr int64_t kTile = 4096;  // elements
constexpr int kMostGroup = 256;
DITHER_HD int64_t tile_lanes(int m) { return 2 * kTile / m / 32 * 32; }                  // of a panel that is no whole tile
DITHER_HD bool has_own_kernel(int m) { return m == 4 || m == 8 || m == 16 || m == 32; }  // other sizes compare all with all
DITHER_HD bool in_parts(int64_t inner, int m) { return inner * m > kTile; }
DITHER_HD int64_t panels_of_a_tile(int64_t inner, int m) { return larger<int64_t>(kTile / (inner * m) & ~int64_t(1), 2); }
DITHER_HD int64_t units(const Select& s) {
  if (in_parts(s.inner, s.m)) return s.panels * ((s.inner + tile_lanes(s.m) - 1) / tile_lanes(s.m));
  const int64_t each = panels_of_a_tile(s.inner, s.m);
  return (s.panels + each - 1) / each;
}

DITHER_PER_ISA(void select_units(const Select&, int64_t lo, int64_t hi))
DITHER_PER_ISA(void blend_range(const Blend&, int64_t lo, int64_t hi))  // lo: a multiple of 8
DITHER_HD bool bits_need_keep(const Select& s) { return !has_own_kernel(s.m) || (s.inner > 1 && s.inner % 8 != 0); }
int select_cuda(const Select&, Stream);  // with keep where bits need it
int blend_cuda(const Blend&, Stream);
}  // namespace dither
