// ChaCha20: Bernstein 2008; block function of RFC 8439 section 2.3 (state words 12..15 = the address counter).
#pragma once
#include "address.h"

namespace dither {
// T is uint32_t (one block) or a vector of lanes (one block each).
template <class T>
DITHER_HD void chacha20(const T (&s)[16], T (&x)[16]) {
  for (int i = 0; i < 16; ++i) x[i] = s[i];
  // clang-format off
#define DITHER_QUARTER(a, b, c, d)                              \
  x[a] += x[b], x[d] ^= x[a], x[d] = x[d] << 16 | x[d] >> 16,   \
  x[c] += x[d], x[b] ^= x[c], x[b] = x[b] << 12 | x[b] >> 20,   \
  x[a] += x[b], x[d] ^= x[a], x[d] = x[d] << 8 | x[d] >> 24,    \
  x[c] += x[d], x[b] ^= x[c], x[b] = x[b] << 7 | x[b] >> 25
  // clang-format on
  for (int r = 0; r < 10; ++r) {
    DITHER_QUARTER(0, 4, 8, 12);
    DITHER_QUARTER(1, 5, 9, 13);
    DITHER_QUARTER(2, 6, 10, 14);
    DITHER_QUARTER(3, 7, 11, 15);
    DITHER_QUARTER(0, 5, 10, 15);
    DITHER_QUARTER(1, 6, 11, 12);
    DITHER_QUARTER(2, 7, 8, 13);
    DITHER_QUARTER(3, 4, 9, 14);
  }
#undef DITHER_QUARTER
  for (int i = 0; i < 16; ++i) x[i] += s[i];
}

struct ChaCha20 {
  static constexpr int words = 16;

  template <class T>
  DITHER_HD static void state(const Address& a, uint64_t n, T (&s)[16]) {
    const uint32_t head[4] = {0x61707865u, 0x3320646eu, 0x79622d32u, 0x6b206574u};  // "expand 32-byte k"
    uint32_t c[4];
    a.counter(n, c);
    for (int i = 0; i < 16; ++i) s[i] = T{} + (i < 4 ? head[i] : i < 12 ? a.key[i - 4] : c[i - 12]);
  }
  DITHER_HD static void block(const Address& a, uint64_t n, uint32_t (&x)[16]) {
    uint32_t s[16];
    state(a, n, s);
    chacha20(s, x);
  }
};
}  // namespace dither
