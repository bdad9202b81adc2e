#include "norm.h"

namespace dither::DITHER_ISA {
double sum_chunk(const SumPart& part, int64_t chunk) {
  const int64_t begin = chunk * kSumChunk, n = smaller(kSumChunk, part.numel - begin);
  int64_t lanes = kSumLanes;
  while (lanes / 2 >= n && lanes > 1) lanes /= 2;  // the other lanes hold zeros
  alignas(64) double sum[kSumLanes];
  for (int64_t k = 0; k < lanes; ++k) sum[k] = 0.0;
  with_type(part.type, [&]<class S>(S) {
    const S* __restrict x = static_cast<const S*>(part.x) + begin;
    double* __restrict acc = sum;
    for (int64_t row = 0; row < n; row += kSumLanes) {
      const int64_t m = smaller(kSumLanes, n - row);
      const char* ahead = reinterpret_cast<const char*>(x + row) + 8192;
      for (int64_t line = 0; line < int64_t(kSumLanes * sizeof(S)); line += 64) __builtin_prefetch(ahead + line);
      if (part.square)
        for (int64_t k = 0; k < m; ++k) {
          const double v = double(widen(x[row + k]));
          acc[k] += v * v;
        }
      else
        for (int64_t k = 0; k < m; ++k) acc[k] += double(widen(x[row + k]));
    }
  });
  for (int64_t half = lanes / 2; half > 0; half /= 2)
    for (int64_t k = 0; k < half; ++k) sum[k] += sum[k + half];
  return sum[0];
}
}  // namespace dither::DITHER_ISA
