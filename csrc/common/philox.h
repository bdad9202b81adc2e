// Philox4x32-10: Salmon, Moraes, Dror & Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3".
#pragma once
#include "address.h"

namespace dither {
struct Philox {
  static constexpr int words = 4, rounds = 10;
  static constexpr uint32_t M0 = 0xD2511F53u, M1 = 0xCD9E8D57u, W0 = 0x9E3779B9u, W1 = 0xBB67AE85u;

  DITHER_HD static void block(const Address& a, uint64_t n, uint32_t (&c)[4]) {
    a.counter(n, c);
    uint32_t k0 = a.key[0], k1 = a.key[1];
    for (int r = 0; r < rounds; ++r, k0 += W0, k1 += W1) {
      const uint64_t p = uint64_t(M0) * c[0], q = uint64_t(M1) * c[2];
      c[0] = uint32_t(q >> 32) ^ c[1] ^ k0;
      c[1] = uint32_t(q);
      c[2] = uint32_t(p >> 32) ^ c[3] ^ k1;
      c[3] = uint32_t(p);
    }
  }
};
}  // namespace dither
