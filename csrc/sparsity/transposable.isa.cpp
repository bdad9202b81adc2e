#include "transposable.h"
#include "../common/mask_cpu.h"

namespace dither::DITHER_ISA {
constexpr int64_t kColumns = 1024;  // at a time, of four rows
constexpr int64_t kMargin = 64;

// Tiles side by side in the lanes of vectors; beyond `columns` they are zeros.
template <class S>
static void columns_of_tiles(const Transposable& t, int64_t row, int64_t column, int64_t columns) {
  using T = decltype(widen(S{}) + 0);
  constexpr int L = DITHER_VECTOR_BYTES / sizeof(T);
  using V __attribute__((vector_size(DITHER_VECTOR_BYTES))) = T;
  using I = decltype(V{} > V{});
  alignas(64) uint8_t kept[4][kColumns + 2 * kMargin];
  const S* const w = static_cast<const S*>(t.w) + row * t.columns + column;
  for (int64_t at = 0; at < columns; at += 4 * L) {
    alignas(64) T a[16][L];
    for (int r = 0; r < 4; ++r) {
      const S* x = w + r * t.columns + at;
      S last[4 * L] = {};
      if (at + 4 * L > columns) {
        for (int64_t i = 0; i < columns - at; ++i) last[i] = x[i];
        x = last;
      }
      for (int l = 0; l < L; ++l) {
        a[4 * r + 0][l] = weight_of(T(widen(x[4 * l + 0])));
        a[4 * r + 1][l] = weight_of(T(widen(x[4 * l + 1])));
        a[4 * r + 2][l] = weight_of(T(widen(x[4 * l + 2])));
        a[4 * r + 3][l] = weight_of(T(widen(x[4 * l + 3])));
      }
    }
    V v[16];
    __builtin_memcpy(v, a, sizeof v);
    const I pattern = t.exact ? best_pattern(v, I{}) : greedy_pattern(v, I{});
    alignas(64) decltype(pattern[0] + 0) row[L];
    __builtin_memcpy(row, &pattern, sizeof pattern);
    for (int r = 0; r < 4; ++r)
      for (int l = 0; l < L; ++l) {  // four bits as four bytes
        const uint32_t bytes = uint32_t(row[l] >> 4 * r & 15) * 0x00204081u & 0x01010101u;
        __builtin_memcpy(&kept[r][kMargin + at + 4 * l], &bytes, 4);
      }
  }
  for (int r = 0; r < 4; ++r) {
    uint8_t* const from = kept[r] + kMargin;
    const int64_t start = (row + r) * t.columns + column;
    __builtin_memset(from - 8, 0, 8);
    __builtin_memset(from + columns, 0, 8);
    if (t.keep) __builtin_memcpy(t.keep + start, from, uint64_t(columns));
    if (t.bits) store_bits(t.bits, start, columns, from);
  }
}

void transposable_range(const Transposable& t, int64_t lo, int64_t hi) {
  with_type(t.type, [&]<class S>(S) {
    for (int64_t row = 4 * lo; row < 4 * hi; row += 4)
      for (int64_t column = 0; column < t.columns; column += kColumns)
        columns_of_tiles<S>(t, row, column, smaller(kColumns, t.columns - column));
  });
}
}  // namespace dither::DITHER_ISA
