// Random words and normals on the host, in tiles of 16 generator blocks. Included by per-instruction-set files only.
//
// Philox: vectors of 64-bit lanes: 32x32->64 products read the low halves, so the high halves may hold garbage and a round
// is 4 products, shifts and xors. GCC 12 does not find vpmuludq by itself; that is the only intrinsic needed.
#pragma once
#include "chacha.h"
#include "normal.h"
#include "philox.h"
#include "vector_cpu.h"

namespace dither::DITHER_ISA {
using Wide = uint64_t __attribute__((vector_size(DITHER_VECTOR_BYTES)));

inline __attribute__((always_inline)) Wide multiply_low_halves(Wide a, Wide b) {
#if defined(__AVX512DQ__)
  return (Wide)_mm512_maskz_mul_epu32(0xff, (__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (Wide)_mm256_mul_epu32((__m256i)a, (__m256i)b);
#elif defined(__x86_64__)
  return (Wide)_mm_mul_epu32((__m128i)a, (__m128i)b);
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

// Part h of kTiles tiles. A round waits for its products: the rounds of other tiles fill the time.
template <int kTiles>
static inline __attribute__((always_inline)) void philox_tiles(const Address& a, uint64_t tile, int h, uint32_t* out) {
  constexpr int L = sizeof(Wide) / 8;
  Wide iota, x[2 * kTiles][4];  // of the tiles' even and odd blocks
  for (int j = 0; j < L; ++j) iota[j] = 2 * j;
  const Wide m0 = Wide{} + Philox::M0, m1 = Wide{} + Philox::M1;
#pragma GCC unroll 4
  for (int t = 0; t < kTiles; ++t) {
    uint32_t c[4];
    a.counter(16 * (tile + t) + 2 * L * h, c);  // a tile never carries out of the low word
    Wide(&even)[4] = x[2 * t], (&odd)[4] = x[2 * t + 1];
    even[0] = iota + c[0];
    odd[0] = even[0] + 1;
    for (int i = 1; i < 4; ++i) odd[i] = even[i] = Wide{} + c[i];
  }
  uint32_t k0 = a.key[0], k1 = a.key[1];
#pragma GCC unroll 10
  for (int r = 0; r < Philox::rounds; ++r, k0 += Philox::W0, k1 += Philox::W1) {
    const Wide K0 = Wide{} + k0, K1 = Wide{} + k1;
#pragma GCC unroll 8
    for (Wide(&y)[4] : x) {
      const Wide p = multiply_low_halves(y[0], m0), q = multiply_low_halves(y[2], m1);
      y[0] = (q >> 32) ^ y[1] ^ K0;
      y[1] = q;
      y[2] = (p >> 32) ^ y[3] ^ K1;
      y[3] = p;
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < kTiles; ++t)
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const Wide z = (x[2 * t][i] & 0xffffffffu) | (x[2 * t + 1][i] << 32);
      __builtin_memcpy(out + 64 * t + 16 * i + 2 * L * h, &z, sizeof z);
    }
}

// words(generator, address, first tile, count, out): count tiles of 16 * Generator::words words.
static inline void words(Philox, const Address& a, uint64_t tile, int64_t count, uint32_t* out) {
  constexpr int kAtOnce = 4, kParts = 64 / sizeof(Wide);
  int64_t t = 0;
  for (; t + kAtOnce <= count; t += kAtOnce)
    for (int h = 0; h < kParts; ++h) philox_tiles<kAtOnce>(a, tile + t, h, out + 64 * t);
  for (; t < count; ++t)
    for (int h = 0; h < kParts; ++h) philox_tiles<1>(a, tile + t, h, out + 64 * t);
}

static inline void words(ChaCha20, const Address& a, uint64_t tile, int64_t count, uint32_t* out) {
  using Lanes = uint32_t __attribute__((vector_size(DITHER_VECTOR_BYTES)));
  constexpr int L = sizeof(Lanes) / 4;
  Lanes iota{}, s[16]{}, x[16]{};
  for (int j = 0; j < L; ++j) iota[j] = j;
  for (int64_t t = 0; t < count; ++t, out += 256)
    for (int h = 0; h < 16; h += L) {
      ChaCha20::state(a, 16 * (tile + t) + h, s);
      s[12] += iota;
      chacha20(s, x);
      for (int i = 0; i < 16; ++i) __builtin_memcpy(out + 16 * i + h, &x[i], sizeof(Lanes));
    }
}

// Normals in element order: 32 words -> 32 floats, 64 words -> 32 doubles. n is a multiple of 32.
static inline void normals(const uint32_t* __restrict w, int64_t n, float* __restrict z) {
  for (int64_t g = 0; g < n; g += 32)
    for (int k = 0; k < kLanes; ++k) box_muller(w[g + k], w[g + 16 + k], z[g + k], z[g + 16 + k]);
}
static inline void normals(const uint32_t* __restrict w, int64_t n, double* __restrict z) {
  for (int64_t g = 0; g < n; g += 32, w += 64)
    for (int k = 0; k < kLanes; ++k) box_muller(w[k], w[16 + k], w[32 + k], w[48 + k], z[g + k], z[g + 16 + k]);
}

// use(w, first, at, count) for runs of whole tiles: w are the words of the tiles that begin at element `first`, of which
// the elements at .. at + count lie in [lo, hi). Words stay in a 4 KB buffer, in L1.
template <int kWordsPerElement, class Generator, class Use>
static inline void for_each_run(Generator g, const Address& a, int64_t lo, int64_t hi, Use use) {
  constexpr int64_t tile = 16 * Generator::words / kWordsPerElement, run = 1024 / kWordsPerElement;
  alignas(64) uint32_t w[1024];
  for (int64_t at = lo; at < hi;) {
    const int64_t first = at / tile * tile, last = smaller(first + run, (hi + tile - 1) / tile * tile);
    const int64_t end = smaller(last, hi);
    words(g, a, uint64_t(first / tile), (last - first) / tile, w);
    use(w, first, last - first, at, end - at);
    at = end;
  }
}
}  // namespace dither::DITHER_ISA
