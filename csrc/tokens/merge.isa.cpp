#include "merge.h"

namespace dither::DITHER_ISA {
void merge_rows(const Merge& m, int64_t lo, int64_t hi) {
  with_type(m.type, [&]<class S>(S) {
    using T = decltype(widen(S{}));
    constexpr int64_t kChunk = 256;
    for (int64_t unit = lo; unit < hi; ++unit) {
      const int64_t sample = unit / m.places, C = m.channels, *start = m.start + sample * (m.places + 1) + unit % m.places;
      const int64_t *order = m.order + sample * m.count + start[0], rows = start[1] - start[0];
      const S* x = static_cast<const S*>(m.x) + sample * m.count * C;
      const T* size = m.size ? static_cast<const T*>(m.size) + sample * m.count : nullptr;
      S* out = static_cast<S*>(m.out) + unit * C;
      if (m.copies(rows)) {
        __builtin_memcpy(out, x + order[0] * C, uint64_t(C) * sizeof(S));
        continue;
      }
      T total = T(rows);
      if (size) {
        total = T(0);
        for (int64_t i = 0; i < rows; ++i) total += size[order[i]];
      }
      for (int64_t c = 0; c < C; c += kChunk) {
        const int64_t n = smaller(kChunk, C - c);
        T sum[kChunk] = {};
        for (int64_t i = 0; i < rows; ++i) {
          const S* row = x + order[i] * C + c;
          const T weight = size ? size[order[i]] : T(1);
          const auto each = [&](auto mode) {
            for (int64_t k = 0; k < n; ++k) sum[k] = joined<T>(mode.value, sum[k], widen(row[k]), weight);
          };
          if (i == 0 && m.mode >= MergeMode::amax)
            for (int64_t k = 0; k < n; ++k) sum[k] = widen(row[k]);
          else if (m.mode == MergeMode::amax) each(Mode<MergeMode::amax>{});
          else if (m.mode == MergeMode::amin) each(Mode<MergeMode::amin>{});
          else each(Mode<MergeMode::sum>{});
        }
        if (m.mode == MergeMode::mean && rows > 0)
          for (int64_t k = 0; k < n; ++k) sum[k] = sum[k] / total;
        for (int64_t k = 0; k < n; ++k) narrow(sum[k], out[c + k]);
      }
    }
  });
}
}  // namespace dither::DITHER_ISA
