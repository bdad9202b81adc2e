// Inner products of a few tensors and their sums, sample by sample, in double and in a fixed order: the same bits on every
// device, instruction set and number of threads, in every batch.
//
// A chunk is 64 rows of 64 lanes; each lane adds its rows, the lanes fold by halves. The sums of a sample's chunks go to 32
// lanes in turn, which fold by halves.
#pragma once
#include "../common/cpu.h"
#include "../common/dtype.h"
#include "../common/stream.h"

namespace dither {
constexpr int kGramInputs = 4, kGramLanes = 64, kGramTotalLanes = 32;
constexpr int64_t kGramChunk = 64 * kGramLanes;
DITHER_HD constexpr int gram_sums(int inputs) {
  return inputs * (inputs + 3) / 2;
}  // products of pairs r <= s, row by row, then sums
constexpr int kGramSums = gram_sums(kGramInputs);

struct Gram {
  const void* x[kGramInputs];
  DType type[kGramInputs];
  int inputs;
  int64_t samples, sample;  // elements of a sample
  DITHER_HD int64_t chunks() const { return (sample + kGramChunk - 1) / kGramChunk; }
};

// The sum of one kind over the chunks of a sample goes to where it stands in out, [inputs][inputs + 1].
DITHER_HD void put_sum(int inputs, int which, double sum, double* out) {
  int r = 0, s = which;
  for (; r < inputs && s >= inputs - r; ++r) s -= inputs - r;
  if (r == inputs) {
    out[s * (inputs + 1) + inputs] = sum;
  } else {
    out[r * (inputs + 1) + r + s] = sum;
    out[(r + s) * (inputs + 1) + r] = sum;
  }
}

DITHER_PER_ISA(void gram_chunk(const Gram&, int64_t sample, int64_t chunk, double* sums))
int gram_cuda(const Gram&, double* partial, double* out, Stream);  // partial: [samples][chunks][sums]
}  // namespace dither
