#include "roof.h"
#include "../common/scalar.h"

namespace dither::DITHER_ISA {
// All arrays in one loop: what a fused kernel does at best.
template <int kWritten, int kRead>
static uint32_t interleaved(uint32_t* const* x, int64_t lo, int64_t hi) {
  uint32_t* __restrict w0 = x[0];
  uint32_t* __restrict w1 = kWritten > 1 ? x[1] : nullptr;
  uint32_t* __restrict w2 = kWritten > 2 ? x[2] : nullptr;
  uint32_t* __restrict w3 = kWritten > 3 ? x[3] : nullptr;
  const uint32_t* __restrict r0 = kRead > 0 ? x[kWritten] : nullptr;
  const uint32_t* __restrict r1 = kRead > 1 ? x[kWritten + 1] : nullptr;
  uint32_t total = 0;
  for (int64_t i = lo; i < hi; ++i) {
    uint32_t sum = 1;
    if constexpr (kRead > 0) sum += r0[i];
    if constexpr (kRead > 1) sum += r1[i];
    if constexpr (kWritten == 0) total += sum;
    if constexpr (kWritten > 0) w0[i] += sum;
    if constexpr (kWritten > 1) w1[i] += sum;
    if constexpr (kWritten > 2) w2[i] += sum;
    if constexpr (kWritten > 3) w3[i] += sum;
  }
  return total;
}

uint32_t roof_range(const Roof& r, int64_t lo, int64_t hi) {
  uint32_t* x[kMaxLists];
  bool same = true;
  for (int k = 0; k < r.count; ++k) {
    x[k] = static_cast<uint32_t*>(r.x[k]);
    same = same && r.item[k] == r.item[0];
  }
  const int shape = r.written * 10 + (r.count - r.written);
  const int64_t first = lo * r.item[0] / 4, last = hi * r.item[0] / 4;
  if (same) switch (shape) {
      case 1: return interleaved<0, 1>(x, first, last);
      case 2: return interleaved<0, 2>(x, first, last);
      case 10: return interleaved<1, 0>(x, first, last);
      case 11: return interleaved<1, 1>(x, first, last);
      case 12: return interleaved<1, 2>(x, first, last);
      case 20: return interleaved<2, 0>(x, first, last);
      case 21: return interleaved<2, 1>(x, first, last);
      case 30: return interleaved<3, 0>(x, first, last);
      case 31: return interleaved<3, 1>(x, first, last);
      case 32: return interleaved<3, 2>(x, first, last);
      case 40: return interleaved<4, 0>(x, first, last);
      case 41: return interleaved<4, 1>(x, first, last);
      default: break;
    }
  // Arrays of different widths: in blocks, one after the other.
  uint32_t total = 0;
  for (int64_t at = lo; at < hi; at += 1024)
    for (int k = 0; k < r.count; ++k) {
      const int64_t begin = at * r.item[k] / 4, end = smaller<int64_t>(at + 1024, hi) * r.item[k] / 4;
      if (k < r.written)
        for (int64_t i = begin; i < end; ++i) x[k][i] += 1;
      else
        for (int64_t i = begin; i < end; ++i) total += x[k][i];
    }
  return total;
}
}  // namespace dither::DITHER_ISA
