// n:m masks that stay n:m when the matrix is transposed: of every m x m tile n weights in each row and each column.
// Meng, Makni and Mazumder 2025 (TSENOR): the best mask is optimal transport with plans that are at most 1. Its entropic form,
// a mask from the plan greedily, completed, and improved by exchanges; all in float32, sums in the order of indices.
#pragma once
#include "../common/cpu.h"
#include "../common/dtype.h"
#include "../common/power.h"
#include "../common/stream.h"

namespace dither {
constexpr int kMostSide = 32;  // rows of a mask are words

struct TransposableNM {
  const void* w;  // [rows][columns], both multiples of m
  uint8_t* keep;
  int64_t rows, columns;
  DType type;
  int n, m, iterations;  // none: the magnitudes take the place of the plan
  DITHER_HD int64_t tiles() const { return rows / m * (columns / m); }
  DITHER_HD int64_t start(int64_t tile) const {  // of a tile in w
    const int64_t across = columns / m;
    return tile / across * m * columns + tile % across * m;
  }
};

// Magnitudes: those that are not finite count as the largest of their tile. T: float or double.
template <class T>
DITHER_HD bool is_finite(T size) {
  return size <= (sizeof(T) == 8 ? T(1.7976931348623157e308) : T(3.4028234663852886e38f));
}
template <class T>
DITHER_HD float relative(T size, T largest) {
  const float ratio = float(size / (largest > T(0) ? largest : T(1)));
  return is_finite(size) ? ratio : 1.0f;
}

template <class V>
DITHER_HD V at_most(V x, V bound) {
  return x < bound ? x : bound;
}

// exp(60 (w - 1)) for a weight w of at most 1: the plan at first.
template <class Int, class V>
DITHER_HD V first_plan(V w) {
  return power_of_2<float, Int>((w - 1.0f) * float(60 * kLog2e));
}

DITHER_HD int lowest_bit(uint32_t word) {
#if defined(__CUDA_ARCH__)
  return __ffs(int(word)) - 1;
#else
  return __builtin_ctz(word);
#endif
}
#define DITHER_EACH_BIT(j, word) \
  for (uint32_t j##_rest = (word), j = 0; j##_rest && (j = lowest_bit(j##_rest), true); j##_rest &= j##_rest - 1)

template <class X>
DITHER_HD int first_of_largest(int m, const X* x) {
  int best = 0;
  for (int k = 1; k < m; ++k) best = x[k] > x[best] ? k : best;
  return best;
}

// A square of the tile, by row and by column. Lanes read along both: they lie side by side in a mirror image, or each at its
// own.
template <bool kMirrored>
struct Square {
  float* at;
  int pitch;
  float* mirror;
  DITHER_HD float operator()(int i, int j) const { return at[i * pitch + j]; }
  DITHER_HD void set(int i, int j, float x) const {
    at[i * pitch + j] = x;
    if constexpr (kMirrored) mirror[j * pitch + i] = x;
  }
  DITHER_HD const float* row(int i, int k) const { return at + i * pitch + k; }
  DITHER_HD const float* column(int j, int k) const { return kMirrored ? mirror + j * pitch + k : at + k * pitch + j; }
};

// What a team keeps of a tile beside its squares: an entry a row or a column.
struct Margins {
  float *row, *column;
  int32_t *row_at, *column_at, *row_room, *column_room;
  uint32_t* held;  // the mask, a word a row
  static constexpr int kArrays = 7;
  DITHER_HD Margins(float* room, int size)
      : row(room),
        column(room + size),
        row_at(reinterpret_cast<int32_t*>(room + 2 * size)),
        column_at(reinterpret_cast<int32_t*>(room + 3 * size)),
        row_room(reinterpret_cast<int32_t*>(room + 4 * size)),
        column_room(reinterpret_cast<int32_t*>(room + 5 * size)),
        held(reinterpret_cast<uint32_t*>(room + 6 * size)) {}
};

// From scores and weights to the mask. A team is a thread with vectors or threads of a warp. Of Team:
//   lanes(m, body)   body(k) for k below m: several k at once, in V (floats), I and U (integers)
//   where(m, test)   the word of those k with test(k), several at once
//   each(m, body), each_of(word, body), which(word, test)   one at a time, below m or of the bits of a word
//   first_largest(m, x)   the first k with the largest x[k], of floats that are -infinity beyond m
// Before and after each of them the team sees the same memory.
template <class Team>
struct Rounding {
  using V = typename Team::V;
  using I = typename Team::I;
  using U = typename Team::U;
  const Team& team;
  const int n, m;
  const Square<Team::kMirrored> weight, score;
  const Margins at;
  static constexpr float kNone = -__builtin_inff();

  template <class T, class E>
  static DITHER_HD T load(const E* x) {
    T v;
    __builtin_memcpy(&v, x, sizeof v);
    return v;
  }
  template <class T, class E>
  static DITHER_HD void store(E* to, T v) {
    __builtin_memcpy(to, &v, sizeof v);
  }
  // The largest score of each row or column, first of equals, among those whose bits are open.
  template <class Scores>
  DITHER_HD void best_of(uint32_t open, const Scores& scores, float* most, int32_t* where) const {
    team.lanes(m, [&](int k) {
      V best = V{} - 1.0f;
      I found = I{};
      DITHER_EACH_BIT(j, open) {
        const V x = load<V>(scores(int(j), k));
        const auto better = x > best;
        best = better ? x : best;
        found = better ? I{} + int32_t(j) : found;
      }
      store(most + k, best);
      store(where + k, found);
    });
  }

  // The largest scores first, lower index first among equals, as long as row and column have room. An entry that is the largest
  // that is left of its row and of its column is next, whatever the others do.
  DITHER_HD void choose() const {
    const auto take = [&](int i, int j) {
      --at.column_room[j];
      score.set(i, j, -1.0f);
    };
    team.each(m, [&](int k) { at.row_room[k] = at.column_room[k] = n; });
    for (int i = 0; i < m; ++i) {  // those that are 1, of which there are many
      const auto is_one = [&](int k) { return (load<V>(score.row(i, k)) >= 1.0f) & (load<I>(at.column_room + k) > 0); };
      uint32_t left = team.where(m, is_one), taken = 0;
      int room = n;
      for (; left && room > 0; --room, left &= left - 1) taken |= left & (~left + 1);
      team.each_of(taken, [&](int k) { take(i, k); });
      team.each(1, [&](int) {
        at.held[i] = taken;
        at.row_room[i] = room;
      });
    }
    for (;;) {
      const uint32_t rows = team.where(m, [&](int k) { return load<I>(at.row_room + k) > 0; });
      const uint32_t columns = team.where(m, [&](int k) { return load<I>(at.column_room + k) > 0; });
      best_of(columns, [&](int j, int k) { return score.column(j, k); }, at.row, at.row_at);
      best_of(rows, [&](int i, int k) { return score.row(i, k); }, at.column, at.column_at);
      const uint32_t next = team.which(rows, [&](int i) { return at.row[i] >= 0.0f && at.column_at[at.row_at[i]] == i; });
      if (!next) return;
      team.each_of(next, [&](int i) {
        at.held[i] |= 1u << at.row_at[i];
        --at.row_room[i];
        take(i, at.row_at[i]);
      });
    }
  }

  // For a row i and a column j that lack one: the exchange of (i', j') for (i, j') and (i', j) that gains most. There is always
  // one: (i, j) is held, rows that are 0 in j are full, and hold more than row i has outside of j.
  DITHER_HD void complete() const {
    for (;;) {
      const int i = first_of_largest(m, at.row_room), j = first_of_largest(m, at.column_room);
      if (at.row_room[i] <= 0) return;
      const uint32_t mine = at.held[i];
      team.each(m, [&](int k) {
        float best = kNone;
        int32_t found = 0;
        if (!(at.held[k] >> j & 1)) {
          DITHER_EACH_BIT(c, at.held[k] & ~mine) {
            const float gain = weight(i, c) + weight(k, j) - weight(k, c);
            found = gain > best ? int32_t(c) : found;
            best = gain > best ? gain : best;
          }
        }
        at.row[k] = best;
        at.row_at[k] = found;
      });
      const int k = first_of_largest(m, at.row), c = at.row_at[k];
      team.each(1, [&](int) {
        at.held[k] ^= 1u << c | 1u << j;
        at.held[i] |= 1u << c;
        --at.row_room[i];
        --at.column_room[j];
      });
    }
  }

  // What row i and each other row gain when i gives one column to it and takes another, the best of each. Gains replace scores.
  DITHER_HD void gains_of(int i, bool both) const {
    const uint32_t mine = at.held[i];
    team.lanes(m, [&](int k) {
      const U theirs = load<U>(at.held + k);
      V gives = V{} + kNone, takes = gives;
      DITHER_EACH_BIT(j, mine) {
        const V gain = (theirs & (1u << j)) != 0 ? V{} + kNone : load<V>(weight.column(j, k)) - weight(i, j);
        gives = gain > gives ? gain : gives;
      }
      DITHER_EACH_BIT(j, ~mine & ~0u >> (32 - m)) {
        const V gain = (theirs & (1u << j)) != 0 ? weight(i, j) - load<V>(weight.column(j, k)) : V{} + kNone;
        takes = gain > takes ? gain : takes;
      }
      store(score.at + i * score.pitch + k, gives + takes);
    });
    if (both) team.each(m, [&](int k) { score.at[k * score.pitch + i] = score(i, k); });
  }
  DITHER_HD int best_gift(int from, int to) const {
    float best = kNone;
    int found = 0;
    DITHER_EACH_BIT(j, at.held[from] & ~at.held[to]) {
      const float gain = weight(to, j) - weight(from, j);
      found = gain > best ? int(j) : found;
      best = gain > best ? gain : best;
    }
    return found;
  }
  // Until no exchange of two weights between two rows makes the mask better.
  DITHER_HD void exchange() const {
    for (int i = 0; i < m; ++i) gains_of(i, false);
    for (;;) {
      team.lanes(m, [&](int k) {
        V best = V{} + kNone;
        for (int i = 0; i < m; ++i) {
          const V gain = load<V>(score.row(i, k));
          best = gain > best ? gain : best;
        }
        store(at.row + k, best);
      });
      const int i = team.first_largest(m, at.row);
      if (!(at.row[i] > 1e-6f)) return;
      const int k = team.first_largest(m, score.row(i, 0));
      const uint32_t change = 1u << best_gift(i, k) | 1u << best_gift(k, i);
      team.each(1, [&](int) {
        at.held[i] ^= change;
        at.held[k] ^= change;
      });
      gains_of(i, true);
      gains_of(k, true);
    }
  }
};

// Tiles lo .. hi.
DITHER_PER_ISA(void transposable_nm_range(const TransposableNM&, int64_t lo, int64_t hi))
int transposable_nm_cuda(const TransposableNM&, Stream);
}  // namespace dither
