// The memory roof that benchmarks divide by: read some lists of tensors and rewrite others, with next to no arithmetic.
#pragma once
#include "../common/cpu.h"
#include "../common/stream.h"

namespace dither {
constexpr int kMaxLists = 8;

// Arrays walked side by side. The first `written` are rewritten (x += 1 + sum of the others' bits), the rest only read.
struct Roof {
  void* x[kMaxLists];
  int64_t item[kMaxLists];  // bytes an element
  int written, count;
};

DITHER_PER_ISA(uint32_t roof_range(const Roof&, int64_t lo, int64_t hi))  // elements; returns a sum, so that reads happen
int roof_cuda(const Roof&, int64_t numel, Stream);
}  // namespace dither
