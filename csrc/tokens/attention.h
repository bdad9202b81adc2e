// What attention pays each key, without the matrix of its probabilities.
//
// s_ij = scale q_i . k_j for the pairs that take part. lse_i = ln sum_j exp(s_ij); colsum_j = sum_i w_i exp(s_ij - lse_i).
// A pair that takes no part adds nothing, whatever q, k and w hold; a query whose lse is -inf adds nothing either. One with a
// score of NaN or +inf has an lse of NaN and gives NaN to every key that it sees.
//
// Scores are kept times log2 e, so that probabilities are powers of 2. On the CPU sums are taken in a fixed order, the same on
// every instruction set, number of threads and size of the batch: a row's probabilities by lanes, element k to lane k mod 16 (8
// in float64), that fold by halves; a column's over the queries of a strip, strip by strip, and then chunk by chunk of queries,
// two neighbours at a time. CUDA's order is fixed too, but another one.
#pragma once
#include "../common/cpu.h"
#include "../common/dtype.h"
#include "../common/power.h"
#include "../common/stream.h"

namespace dither {
// Numbers of a tensor [batch][heads][rows] that may be broadcast; the elements of a row lie side by side.
struct HeadRows {
  int64_t batch, head, row;  // strides, in elements
  DITHER_HD int64_t at(int64_t b, int64_t h, int64_t i) const { return b * batch + h * head + i * row; }
};

struct Attention {
  const void *q, *k;     // [batch][heads][queries][dim], [batch][heads / group][keys][dim]
  const void* weight;    // [batch][heads][queries] of the sums' type; nullptr: 1
  const void* lse;       // [batch][heads][queries], in order; nullptr: unknown
  const uint8_t* mask;   // [batch][heads][queries][keys], 1: takes part; nullptr: all do
  void *lse_out, *sums;  // [batch][heads][queries], [batch][heads][keys], in order; either may be nullptr
  HeadRows q_at, k_at, weight_at, mask_at;
  int64_t mask_column;
  int64_t batch, heads, group, queries, keys, dim;
  double scale;  // times log2 e
  bool causal;
  DType type;
  DITHER_HD bool takes_part(int64_t b, int64_t h, int64_t i, int64_t j) const {
    return (!causal || j <= i) && (!mask || mask[mask_at.at(b, h, i) + j * mask_column]);
  }
  DITHER_HD int64_t pairs() const { return batch * heads; }
};

// A query's lse as what is taken from its scores: probabilities are 0 where it is -inf.
template <class T>
DITHER_HD T subtrahend(T lse) {
  return lse == T(-__builtin_inf()) ? -lse : T(double(lse) * kLog2e);
}

// ---- CPU

constexpr int64_t kStrip = 12, kStripPitch = 16;  // queries whose scores are held at a time, and their room
constexpr int64_t kPanelBytes = 128, kFoldBytes = 64;
DITHER_HD int64_t parts_of(int64_t n, int64_t size) { return (n + size - 1) / size; }
DITHER_HD int64_t panel_width(int64_t item) { return kPanelBytes / item; }  // keys side by side in memory
DITHER_HD int64_t whole_panels(int64_t keys, int64_t item) { return parts_of(keys, panel_width(item)) * panel_width(item); }

// Enough parts of all heads to share among threads.
constexpr int64_t kUnits = 32;
DITHER_HD int64_t parts_of_a_head(int64_t pairs) { return parts_of(kUnits, larger<int64_t>(1, pairs)); }
DITHER_HD int64_t whole_parts(int64_t n, int64_t parts, int64_t unit) {
  return larger(parts_of(parts_of(n, parts), unit) * unit, 8 * unit);
}
// Queries are cut into chunks by their number alone. The sum of n of them is that of the first 2^l < n and that of the others,
// so that runs of 2^m can be added up apart, and m may depend on the number of heads.
struct Chunks {
  int64_t size, count, run;
  DITHER_HD int64_t runs() const { return parts_of(count, run); }
};
constexpr int kLevels = 5;
static_assert(kUnits == 1 << kLevels);
DITHER_HD Chunks query_chunks(const Attention& a) {
  const int64_t size = whole_parts(a.queries, kUnits, kStrip), count = parts_of(a.queries, size);
  int64_t run = 1;
  while (run < count && parts_of(count, 2 * run) >= parts_of_a_head(a.pairs())) run *= 2;
  return {size, count, run};
}
// Keys are cut into blocks, beyond which no sum goes.
struct Blocks {
  int64_t size, count;
};
DITHER_HD Blocks key_blocks(const Attention& a) {
  const int64_t size = smaller<int64_t>(whole_parts(a.keys, parts_of_a_head(a.pairs()), 32), 1024);
  return {size, parts_of(a.keys, size)};
}

// Bytes of room that a thread needs, from an address of a whole cache line on.
inline int64_t rows_scratch(const Attention& a, int64_t item) {
  return (whole_panels(a.keys, item) * (a.dim + kStrip + kLevels) + kStripPitch * (a.dim + 2)) * item;
}
inline int64_t columns_scratch(const Attention& a, int64_t item) {
  return (key_blocks(a).size * (a.dim + 2) + panel_width(item) * kStrip + kStripPitch * (a.dim + 2)) * item;
}
// Without lse, a unit is a run of chunks of queries of a head, all keys at once: it writes lse_out, and if partial is not
// nullptr its column sums, [pairs][runs][keys in whole panels].
DITHER_PER_ISA(void attention_rows(const Attention&, int64_t lo, int64_t hi, void* scratch, void* partial))
// With lse, a unit is a block of keys of a head, all queries one after the other: it writes sums.
DITHER_PER_ISA(void attention_columns(const Attention&, int64_t lo, int64_t hi, void* scratch))

// PageRank with the probabilities of a head kept: as many queries as keys, in whole strips and panels. An odd number of cache
// lines to a row, or the rows of a strip would compete for one set of the cache.
struct Kept {
  int64_t length, pitch;
};
DITHER_HD Kept kept_of(const Attention& a, int64_t item) {
  const int64_t length = whole_panels(parts_of(a.queries, kStrip) * kStrip, item);
  return {length, length + kFoldBytes / item};
}
inline int64_t pagerank_scratch(const Attention& a, int64_t item) {
  const Kept kept = kept_of(a, item);
  return (kept.length * (a.dim + kept.pitch + 3) + kStripPitch * a.dim) * item;
}
// A unit is a head: weight is the first s, sums the last. A head stops when the L1 norm of its change is below tol.
DITHER_PER_ISA(void attention_pagerank(const Attention&, int64_t lo, int64_t hi, void* scratch, int64_t iterations, double tol))

// CUDA: the lse, or sums with a given lse.
int attention_lse_cuda(const Attention&, Stream);
int attention_colsum_cuda(const Attention&, Stream);
}  // namespace dither
