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

// words(generator, address, first tile, count, out): count tiles of 16 * Generator::words words.
static inline void words(Philox, const Address& a, uint64_t tile, int64_t count, uint32_t* out) {
  constexpr int L = sizeof(Wide) / 8;
  Wide iota;
  for (int j = 0; j < L; ++j) iota[j] = 2 * j;
  const Wide m0 = Wide{} + Philox::M0, m1 = Wide{} + Philox::M1;
  for (int64_t t = 0; t < count; ++t, out += 64)
    for (int h = 0; h < 8 / L; ++h) {
      uint32_t c[4];
      a.counter(16 * (tile + t) + 2 * L * h, c);  // a tile never carries out of the low word
      Wide even[4] = {iota + c[0], Wide{} + c[1], Wide{} + c[2], Wide{} + c[3]};
      Wide odd[4] = {even[0] + 1, even[1], even[2], even[3]};
      uint32_t k0 = a.key[0], k1 = a.key[1];
#pragma GCC unroll 10
      for (int r = 0; r < Philox::rounds; ++r, k0 += Philox::W0, k1 += Philox::W1) {
        const Wide K0 = Wide{} + k0, K1 = Wide{} + k1;
        auto round = [&](Wide(&x)[4]) __attribute__((always_inline)) {
          const Wide p = multiply_low_halves(x[0], m0), q = multiply_low_halves(x[2], m1);
          x[0] = (q >> 32) ^ x[1] ^ K0;
          x[1] = q;
          x[2] = (p >> 32) ^ x[3] ^ K1;
          x[3] = p;
        };
        round(even);
        round(odd);
      }
      for (int i = 0; i < 4; ++i) {
        const Wide z = (even[i] & 0xffffffffu) | (odd[i] << 32);
        __builtin_memcpy(out + 16 * i + 2 * L * h, &z, sizeof z);
      }
    }
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
