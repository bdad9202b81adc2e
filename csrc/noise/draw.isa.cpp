#include "draw.h"
#include "../common/generator_cpu.h"

namespace dither::DITHER_ISA {
template <class D>
static void values(const D& draw, const uint32_t* __restrict w, int64_t n, typename D::Value* __restrict z) {
  constexpr int per_pair = sizeof(typename D::Value) / 2;  // words
  for (int64_t g = 0; g < n; g += 32, w += 16 * per_pair)
    for (int k = 0; k < kLanes; ++k) {
      uint32_t pair[per_pair];
      for (int i = 0; i < per_pair; ++i) pair[i] = w[16 * i + k];
      draw(pair, z[g + k], z[g + 16 + k]);
    }
}

template <class Generator, class D>
static void draw_with(Generator g, const D& draw, const Draw& d, void* out, int64_t lo, int64_t hi) {
  using Value = typename D::Value;
  alignas(64) Value buffer[4096 / sizeof(Value)];
  for_each_run<sizeof(Value) / 4>(g, d.address, d.start + lo, d.start + hi,
                                  [&](const uint32_t* w, int64_t first, int64_t n, int64_t at, int64_t count) {
                                    with_stored(d.stored, [&]<class Out>(Out) {
                                      Out* __restrict o = static_cast<Out*>(out) + (at - d.start);
                                      if constexpr (__is_same(Out, Value))
                                        if (count == n && !d.add) return values(draw, w, n, o);
                                      values(draw, w, n, buffer);
                                      const Value* __restrict z = buffer + (at - first);
                                      if (d.add)
                                        for (int64_t i = 0; i < count; ++i) add(z[i], o[i]);
                                      else
                                        for (int64_t i = 0; i < count; ++i) put(z[i], o[i]);
                                    });
                                  });
}

void draw_range(const Draw& d, void* out, int64_t lo, int64_t hi) {
  with_distribution(d, [&](const auto& draw) {
    if (d.chacha) draw_with(ChaCha20{}, draw, d, out, lo, hi);
    else draw_with(Philox{}, draw, d, out, lo, hi);
  });
}

void round_range(const Rounding& r, const void* x, void* out, int64_t lo, int64_t hi) {
  for_each_run<1>(Philox{}, r.address, r.start + lo, r.start + hi,
                  [&](const uint32_t* w, int64_t first, int64_t, int64_t at, int64_t count) {
                    with_type(r.from, [&]<class From>(From) {
                      with_type(r.to, [&]<class To>(To) {
                        const From* __restrict from = static_cast<const From*>(x) + (at - r.start);
                        To* __restrict to = static_cast<To*>(out) + (at - r.start);
                        const uint32_t* __restrict word = w + (at - first);
                        for (int64_t i = 0; i < count; ++i) narrow(float(widen(from[i])), RoundingBits(0)(word[i]), to[i]);
                      });
                    });
                  });
}
}  // namespace dither::DITHER_ISA
