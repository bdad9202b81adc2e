// Tokens that leave a sequence and come back: gathering rows, sums over the rows that share a place, and the plan of a merge.
#pragma once
#include "../common/cpu.h"
#include "../common/dtype.h"
#include "../common/stream.h"

namespace dither {
// out[s][j] = x[s][index[s][j]], rows of `bytes`.
struct Gather {
  const void* x;         // [batch][count]
  const int64_t* index;  // [batch][taken]
  void* out;             // [batch][taken]
  int64_t batch, count, taken, bytes;
};

// The rows of each place, in rising order: those of place j are order[start[j]] .. order[start[j + 1] - 1].
struct Segments {
  const int64_t* index;    // [batch][count]
  int64_t *order, *start;  // [batch][count], [batch][places + 1]
  int64_t batch, count, places;
};

enum class MergeMode : int8_t { sum, mean, amax, amin };
template <MergeMode kMode>
struct Mode {
  static constexpr MergeMode value = kMode;
};
// One row of out from the rows of each place. Sums in the order of rows, in float or, for doubles, double; a row that is alone
// is copied unless it is weighted in a sum; 0 where there is none.
struct Merge {
  const void* x;                 // [batch][count][channels]
  const int64_t *order, *start;  // as above
  const void* size;              // [batch][count], float or double, or nullptr: 1 each
  void* out;                     // [batch][places][channels]
  int64_t batch, count, places, channels;
  MergeMode mode;
  DType type;
  DITHER_HD bool copies(int64_t rows) const { return rows == 1 && !(mode == MergeMode::sum && size); }
};
template <class T>
DITHER_HD T joined(MergeMode mode, T sum, T x, T size) {
  if (mode == MergeMode::amax) return maximum(sum, x);
  if (mode == MergeMode::amin) return -maximum(-sum, -x);
  return sum + size * x;
}

// Merging a's into b's: token a_places[top[s][t]] of s goes to b_places[match[s][top[s][t]]]; the others keep their order.
struct Plan {
  const int64_t *top, *match;          // [batch][merged], [batch][a_count]
  const int64_t *a_places, *b_places;  // [a_count], [b_count]
  int64_t batch, merged, a_count, b_count, count;
  int64_t *kept, *src, *dst, *index;  // [batch][count - merged], [batch][merged] twice, [batch][count]
};

DITHER_PER_ISA(void merge_rows(const Merge&, int64_t lo, int64_t hi))  // of [batch * places]
int gather_cuda(const Gather&, Stream);                                // an index out of range: bytes of ones, which are NaN
int segments_cuda(const Segments&, Stream);
int merge_cuda(const Merge&, Stream);
int plan_cuda(const Plan&, Stream);
}  // namespace dither
