// 2:4 matrices as CUTLASS takes them: of every four 16-bit elements the two kept, and two 2-bit indices for each four.
#pragma once
#include "../common/dtype.h"
#include "../common/stream.h"

namespace dither {
struct Pack24 {
  const uint16_t* dense;  // [rows][columns]
  const uint8_t* bits;    // what is kept: of more than two in four the first two; or nullptr: the two largest
  uint16_t* values;       // [rows][columns / 2]
  uint16_t* indices;      // rows * columns / 16 words, in CUTLASS's order
  int64_t rows, columns;  // multiples of 32
  int32_t nan;            // magnitudes above it are NaN
};
struct Unpack24 {
  const uint16_t *values, *indices;
  uint16_t* dense;
  int64_t rows, columns;
};

// The word of indices for row r, columns 16 c .. 16 c + 15, stands at c / 2 * 2 rows + place_in_pair(r, c % 2): rows are
// interleaved in 32s, blocks of 2 x 2 transposed, columns in pairs (CUTLASS: reorder_meta, ColumnMajorInterleaved<2>).
DITHER_HD int64_t place_in_pair(int64_t r, int parity) {
  r = r / 32 * 32 + r % 8 * 4 + r % 32 / 8;
  return r % 2 == 0 ? 2 * (r + parity) : 2 * (r - 1 + parity) + 1;
}

// Four elements are read and written as one word, the first in its low bits. Code: place of the first value | of the second
// << 2.
DITHER_HD uint64_t load4(const uint16_t* x) {
  uint64_t word;
  __builtin_memcpy(&word, x, 8);
  return word;
}
// By the bits of those kept; where fewer than two are, the first of the others are zeros.
DITHER_HD uint32_t code_of(uint32_t kept) { return 0x498e4dcc49884444ull >> 4 * kept & 15; }
DITHER_HD uint32_t largest_two(uint64_t x, int32_t nan) {
  int32_t key[4];
  DITHER_UNROLL(4)
  for (int j = 0; j < 4; ++j) key[j] = smaller<int32_t>(int32_t(x >> 16 * j & 0x7fff), nan);
  uint32_t kept = 0;
  DITHER_UNROLL(4)
  for (int j = 0; j < 4; ++j) {
    int rank = 0;
    DITHER_UNROLL(4)
    for (int k = 0; k < 4; ++k)
      if (k != j) rank += k < j ? key[k] >= key[j] : key[k] > key[j];
    kept |= uint32_t(rank < 2) << j;
  }
  return kept;
}

// Sixteen elements at dense + 16 i: eight values and a word of indices.
DITHER_HD uint16_t pack16(const Pack24& p, int64_t i) {
  const uint32_t given = p.bits ? p.bits[2 * i] | uint32_t(p.bits[2 * i + 1]) << 8 : 0;
  uint32_t word = 0;
  DITHER_UNROLL(4)
  for (int g = 0; g < 4; ++g) {
    const uint64_t x = load4(p.dense + 16 * i + 4 * g);
    const uint32_t kept = p.bits ? given >> 4 * g & 15 : largest_two(x, p.nan);
    const uint32_t code = code_of(kept), first = code & 3, second = code >> 2;
    const uint32_t low = kept >> first & 1 ? uint32_t(x >> 16 * first & 0xffff) : 0;
    const uint32_t high = kept >> second & 1 ? uint32_t(x >> 16 * second & 0xffff) : 0;
    const uint32_t pair = low | high << 16;
    __builtin_memcpy(p.values + 8 * i + 2 * g, &pair, 4);
    word |= code << 4 * g;
  }
  return uint16_t(word);
}
DITHER_HD void unpack16(const Unpack24& p, int64_t i, uint32_t word) {
  DITHER_UNROLL(4)
  for (int g = 0; g < 4; ++g) {
    const uint32_t code = word >> 4 * g & 15;
    uint32_t pair;
    __builtin_memcpy(&pair, p.values + 8 * i + 2 * g, 4);
    const uint64_t x = uint64_t(pair & 0xffff) << 16 * (code & 3) | uint64_t(pair >> 16) << 16 * (code >> 2);
    __builtin_memcpy(p.dense + 16 * i + 4 * g, &x, 8);
  }
}

int pack24_cuda(const Pack24&, Stream);
int unpack24_cuda(const Unpack24&, Stream);
}  // namespace dither
