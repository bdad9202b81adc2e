#include "exact.h"
#include "../common/generator_cpu.h"

namespace dither::DITHER_ISA {
template <class S>
constexpr int64_t kLine = 64 / int64_t(sizeof(S));
template <class S>
static void accumulate_some(const Accumulate& a, int64_t first, int64_t n) {
  int64_t* __restrict sum = a.sum + first;
  for (int64_t b = 0; b < a.count; ++b) {
    const double scale = a.scale(b);
    if (scale == 0.0) continue;
    const S* __restrict x = static_cast<const S*>(a.rows) + b * a.pitch + first;
    const S* const next = x + (b + 1 < a.count ? a.pitch : 0);  // far away, where the processor does not look by itself
    for (int64_t j = 0; j < n; j += kLine<S>) {
      __builtin_prefetch(next + j);
      if (j + kLine<S> <= n)
        for (int64_t i = j; i < j + kLine<S>; ++i) sum[i] += units_of(x[i], scale);
      else
        for (int64_t i = j; i < n; ++i) sum[i] += units_of(x[i], scale);
    }
  }
}

void accumulate_range(const Accumulate& a, int64_t lo, int64_t hi) {
  constexpr int64_t block = 2048;  // sums stay in L1
  with_type(a.type, [&]<class S>(S) {
    for (int64_t j = lo; j < hi; j += block) accumulate_some<S>(a, j, smaller(block, hi - j));
  });
}

static bool round_all(const uint32_t* __restrict w, double std, int64_t* __restrict q, int64_t* __restrict unsure) {
  for (int k = 0; k < kLanes; ++k) unsure[k] = round_pair(w[k], w[16 + k], w[32 + k], w[48 + k], std, q[k], q[16 + k]);
  int64_t any = 0;
  for (int k = 0; k < kLanes; ++k) any |= unsure[k];
  return any != 0;
}
static __attribute__((noinline)) void round_again(const Address& digits, int64_t first, const uint32_t* w, double std,
                                                  const int64_t* unsure, int64_t* q) {
  constexpr int64_t tile = 8 * ChaCha20::words;  // 32 elements have a word of each lane
  for (int k = 0; k < kLanes; ++k)
    if (unsure[k]) {
      uint32_t v[ChaCha20::words];
      ChaCha20::block(digits, uint64_t(first / tile * 16 + k), v);
      const uint32_t pair[] = {w[k], w[16 + k], w[32 + k], w[48 + k]};
      round_pair_with_all_digits(pair, v + first % tile / 8, std, q[k], q[16 + k]);
    }
}

void exact_noise_range(const ExactNoise& x, int64_t lo, int64_t hi) {
  const Address digits = address_of_digits(x.address);
  const auto add_run = [&](const uint32_t* w, int64_t first, int64_t n, int64_t at, int64_t count) {
    alignas(64) int64_t q[512], unsure[kLanes];
    for (int64_t g = 0; g < n; g += 32, w += 64)
      if (round_all(w, x.std, q + g, unsure)) round_again(digits, first + g, w, x.std, unsure, q + g);
    int64_t* __restrict sum = x.sum + (at - x.start);
    const int64_t* __restrict noise = q + (at - first);
    for (int64_t i = 0; i < count; ++i) sum[i] += noise[i];
  };
  for_each_run<2>(ChaCha20{}, x.address, x.start + lo, x.start + hi, add_run);
}
}  // namespace dither::DITHER_ISA
