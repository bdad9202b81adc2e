// Sum of squares in a fixed order: the same bits on every device, instruction set and number of threads.
//
// A chunk of 16,384 elements is 16 rows of 1,024 lanes; each lane adds its rows in double, the lanes fold by halves. The
// chunks' sums are reduced the same way, unsquared, until one is left.
#pragma once
#include "../common/cpu.h"
#include "../common/dtype.h"
#include "../common/stream.h"

namespace dither {
constexpr int64_t kSumLanes = 1024, kSumChunk = 16 * kSumLanes;

struct SumPart {
  const void* x;
  int64_t numel;
  DType type;
  bool square;
};

inline int64_t sum_chunks(int64_t numel) { return (numel + kSumChunk - 1) / kSumChunk; }

DITHER_PER_ISA(double sum_chunk(const SumPart& part, int64_t chunk))
// partial: room for twice the number of chunks; out: the total, left alone where there is no element at all.
int sum_cuda(const SumPart* parts, int64_t count, double* partial, double* out, Stream stream);
}  // namespace dither
