// 2:4 masks that stay 2:4 when the matrix is transposed: of every 4 x 4 tile two weights in each row and each column.
#pragma once
#include "../common/cpu.h"
#include "../common/dtype.h"
#include "../common/stream.h"

namespace dither {
struct Transposable {
  const void* w;  // [rows][columns], both multiples of 4
  uint8_t *bits, *keep;
  int64_t rows, columns;
  DType type;
  bool exact;
};

// |x| with room for the sum of eight; NaN counts as the largest.
template <class T>
constexpr T kLargest = T(4e37);
template <>
constexpr double kLargest<double> = 2e307;
template <class T>
DITHER_HD T weight_of(T x) {
  const T size = absolute(x);
  return size < kLargest<T> ? size : kLargest<T>;
}

// Below, T is a number or a vector of them, I the integer (or vector) that a comparison of T selects among, and bit 4 r + c of
// a pattern stands for row r, column c.
template <class T, class I>
struct Best {
  T sum;
  I pattern;
};
template <class T, class I>
DITHER_HD void improve(Best<T, I>& best, T sum, I pattern) {
  const auto better = sum > best.sum;
  best.sum = better ? sum : best.sum;
  best.pattern = better ? pattern : best.pattern;
}

// Two columns of four: 3, 5, 9, 6, 10, 12. Pair 5 - k is the complement of pair k.
DITHER_HD int columns_of(int pair) { return 0xca6953 >> 4 * pair & 15; }

// The pattern of 90 with the largest sum. The columns that rows 0 and 1 leave free are those of rows 2 and 3, so for each
// of the 19 ways to fill columns the two halves are chosen apart; the first of equals wins.
template <class T, class I>
DITHER_HD I best_pattern(const T (&a)[16], const I& zero) {
  T pair[4][6];
  DITHER_UNROLL(4)
  for (int r = 0; r < 4; ++r) {
    const T* x = a + 4 * r;
    pair[r][0] = x[0] + x[1];
    pair[r][1] = x[0] + x[2];
    pair[r][2] = x[0] + x[3];
    pair[r][3] = x[1] + x[2];
    pair[r][4] = x[1] + x[3];
    pair[r][5] = x[2] + x[3];
  }
  const auto code = [&](int p, int q) { return columns_of(p) | columns_of(q) << 4; };
  // Rows r and r + 1 with pairs (p, q) or (q, p).
  const auto half = [&](int r, int p, int q) {
    Best<T, I> best{pair[r][p] + pair[r + 1][q], zero + code(p, q)};
    if (p != q) improve(best, T(pair[r][q] + pair[r + 1][p]), I(zero + code(q, p)));
    return best;
  };
  const auto whole = [&](const Best<T, I>& top, const Best<T, I>& bottom) {
    return Best<T, I>{top.sum + bottom.sum, top.pattern | bottom.pattern << 8};
  };
  Best<T, I> best = whole(half(0, 0, 0), half(2, 5, 5));
  const auto consider = [&](const Best<T, I>& x) { improve(best, x.sum, x.pattern); };
  DITHER_UNROLL(6)
  for (int p = 0; p < 6; ++p) {
    if (p > 0) consider(whole(half(0, p, p), half(2, 5 - p, 5 - p)));
    DITHER_UNROLL(6)
    for (int q = p + 1; q < 6; ++q)
      if (p + q != 5) consider(whole(half(0, p, q), half(2, 5 - q, 5 - p)));
  }
  // Complements fill every column once; so do the rows below.
  const auto complements = [&](int r) {
    Best<T, I> x = half(r, 0, 5);
    const Best<T, I> y = half(r, 1, 4), z = half(r, 2, 3);
    improve(x, y.sum, y.pattern);
    improve(x, z.sum, z.pattern);
    return x;
  };
  consider(whole(complements(0), complements(2)));
  return best.pattern;
}

// The largest weight whose row and column still have room, eight times or until none has; lower index first among equals.
template <class T, class I>
DITHER_HD I greedy_pattern(const T (&a)[16], const I& zero) {
  I chosen = zero, allowed = zero + 0xffff;
  for (int round = 0; round < 8; ++round) {
    const T none = -a[0] - 1.0f;  // less than any
    Best<T, I> best[4];           // of each row, which do not wait for each other
    DITHER_UNROLL(4)
    for (int r = 0; r < 4; ++r) {
      best[r] = {none, zero};
      DITHER_UNROLL(4)
      for (int j = 4 * r; j < 4 * r + 4; ++j) improve(best[r], T((allowed & (1 << j)) != 0 ? a[j] : none), I(zero + (1 << j)));
    }
    improve(best[0], best[1].sum, best[1].pattern);
    improve(best[2], best[3].sum, best[3].pattern);
    improve(best[0], best[2].sum, best[2].pattern);
    const I pick = best[0].pattern;
    chosen |= pick;
    allowed &= ~pick;
    // Where two of four bits are set, the lowest bit of each nibble: of rows as they are, of columns when transposed.
    const auto two = [](const I& p, const I& q, const I& r, const I& s) { return (p & q) | (r & s) | ((p | q) & (r | s)); };
    const I rows = two(chosen, chosen >> 1, chosen >> 2, chosen >> 3) & 0x1111;
    const I columns = two(chosen, chosen >> 4, chosen >> 8, chosen >> 12) & 0xf;
    allowed &= ~(rows * 0xf | columns * 0x1111);
  }
  return chosen;
}

// Rows of tiles lo .. hi.
DITHER_PER_ISA(void transposable_range(const Transposable&, int64_t lo, int64_t hi))
int transposable_cuda(const Transposable&, Stream);
}  // namespace dither
