// Noise is addressed, not streamed: value = f(key, stream, step, element). This header is the address arithmetic of layout v1.
#pragma once
#include "scalar.h"

namespace dither {
// Kinds separate the uses of one (stream, step, element): a uniform and a normal never share words.
enum class Kind : uint32_t { bits = 0, normal32 = 1, normal64 = 2, digits64 = 3, key = 15 };

struct Address {
  uint32_t key[8];  // Philox reads 2 words, ChaCha20 all 8
  uint32_t stream, step;
  Kind kind;

  // The 128-bit counter of one generator block; injective for block < 2^60.
  DITHER_HD void counter(uint64_t block, uint32_t c[4]) const {
    c[0] = uint32_t(block);
    c[1] = uint32_t(block >> 32) | uint32_t(kind) << 28;
    c[2] = step;
    c[3] = stream;
  }
};

constexpr int64_t kMaxElement = int64_t(1) << 60;
// Words form tiles of 16 blocks: with W words a block, word i of block 16 t + k is word number 16 W t + 16 i + k.
// A 4-byte draw of element e uses word e (normals: the pair 32 g + k, 32 g + 16 + k shares its two words); an 8-byte draw
// of the elements 32 g + k, 32 g + 16 + k uses the words 64 g + {0, 16, 32, 48} + k.
constexpr int kLanes = 16;
}  // namespace dither
