#include "step.h"
#include "../common/generator_cpu.h"
#include "../common/mask_cpu.h"

namespace dither::DITHER_ISA {
// Elements that pass through buffers at a time: so few that the processor, which looks some hundred instructions ahead, loads
// while it computes. Draws cost a call a block and want more, those of private noise, with the longest calls, the most.
constexpr int64_t kBlock = 512, kBlockOfDraws = 256, kBlockWithoutDraws = 128;
constexpr int64_t kMaskBlock = 1024;  // where only the mask passes through a buffer

// A block of a mask as bytes. kept: its bits. moves: 0 where the element stands still.
struct Masked {
  const uint8_t *kept, *moves;
};

// The loop of the rule over arrays of one stored type; w: the words of stochastic rounding.
enum class Loop { full, plain, random, masked };  // plain: scale 1, no clip, no decay
template <Loop kLoop, class R, class T, class S, class... State>
static inline void update(R rule, Around<T> a, int64_t n, const uint32_t* __restrict w, Masked mask, S* __restrict p,
                          const S* __restrict g, State* __restrict... s) {
  constexpr bool kRandom = kLoop == Loop::random, kPlain = kLoop == Loop::plain, kMasked = kLoop == Loop::masked;
  const uint8_t* __restrict kept = mask.kept, * __restrict moves = mask.moves;
  const T scale = a.scale, clip = a.clip, keep = a.keep, pull = a.pull;
  const auto round = [](T x, uint32_t word, int slot, S& y) __attribute__((always_inline)) {
    if constexpr (kRandom) narrow(x, RoundingBits(slot)(word), y);
    else narrow(x, y);
  };
  for (int64_t i = 0; i < n; ++i) {
    [[maybe_unused]] const uint32_t word = kRandom ? w[i] : 0;
    T q = T(widen(p[i])), d = T(widen(g[i]));
    if constexpr (!kPlain) d = clamp(d * scale, clip);
    if constexpr (kMasked) {
      const T pulled = d + pull * q;
      d = kept[i] ? d : pulled;
    }
    if constexpr (!kPlain) q *= keep;
    [&](auto... x) __attribute__((always_inline)) {
      rule(q, d, x...);
      if constexpr (kMasked) {
        ((s[i] = pick(moves[i], S(x), s[i])), ...);
        p[i] = pick(moves[i], S(q), p[i]);
      } else {
        [[maybe_unused]] int slot = 1;
        (round(x, word, slot++, s[i]), ...);
        round(q, word, 0, p[i]);
      }
    }(T(widen(s[i]))...);
  }
}
template <Loop kLoop, class R, class T, class S>
static inline void update_all(const R& rule, const Around<T>& a, int64_t n, const uint32_t* w, Masked mask, S* p, const S* g,
                              S* const (&s)[kMaxStates]) {
  if constexpr (R::states == 0) {  // so little arithmetic that what is left out shows
    const bool plain = kLoop == Loop::full && a.scale == T(1) && a.keep == T(1) && a.clip == T(__builtin_inf());
    plain ? update<Loop::plain>(rule, a, n, w, mask, p, g) : update<kLoop>(rule, a, n, w, mask, p, g);
  } else if constexpr (R::states == 1) {
    update<kLoop>(rule, a, n, w, mask, p, g, s[0]);
  } else if constexpr (R::states == 2) {
    update<kLoop>(rule, a, n, w, mask, p, g, s[0], s[1]);
  } else {
    update<kLoop>(rule, a, n, w, mask, p, g, s[0], s[1], s[2]);
  }
}

// Draws last longer than the processor looks ahead.
static inline void prefetch(const void* x, DType type, int64_t at, int64_t n) {
  const char* const first = static_cast<const char*>(x) + at * size_of(type);
  for (int64_t line = 0; line < n * size_of(type); line += 64) __builtin_prefetch(first + line);
}

template <class T>
static void load(const void* from, DType type, int64_t at, int64_t n, T* __restrict to) {
  with_type(type, [&]<class S>(S) {
    const S* __restrict x = static_cast<const S*>(from) + at;
    for (int64_t i = 0; i < n; ++i) to[i] = T(widen(x[i]));
  });
}
template <class T>
static void store(const T* __restrict from, void* to, DType type, int64_t at, int64_t n, const uint32_t* __restrict w,
                  int slot) {
  with_type(type, [&]<class S>(S) {
    S* __restrict y = static_cast<S*>(to) + at;
    if constexpr (sizeof(T) == 8 && sizeof(S) == 2) {
      for (int64_t i = 0; i < n; ++i) narrow(float(from[i]), y[i]);
    } else {
      const RoundingBits bits(slot);
      if (w)
        for (int64_t i = 0; i < n; ++i) narrow(from[i], bits(w[i]), y[i]);
      else
        for (int64_t i = 0; i < n; ++i) narrow(from[i], y[i]);
    }
  });
}

// out[i] = draw of element i of the block; fill(address range, out) for each run of consecutive addresses.
template <class Fill>
static void for_each_address(const Slot& slot, int64_t at, int64_t n, Fill fill) {
  for (int64_t i = 0; i < n;) {
    const int64_t left = slot.run >= slot.numel ? n - i : smaller(n - i, slot.run - (at + i) % slot.run);
    fill(int64_t(slot.element(at + i)), i, left);
    i += left;
  }
}
template <class T>
static void draw_normals(const Slot& slot, const Address& a, int64_t at, int64_t n, T* __restrict z) {
  for_each_address(slot, at, n, [&](int64_t element, int64_t offset, int64_t count) {
    for_each_run<sizeof(T) / 4>(Philox{}, a, element, element + count,
                                [&](const uint32_t* w, int64_t first, int64_t whole, int64_t from, int64_t part) {
                                  if (part == whole) return normals(w, whole, z + offset + (from - element));
                                  alignas(64) T buffer[4096 / sizeof(T)];
                                  normals(w, whole, buffer);
                                  __builtin_memcpy(z + offset + (from - element), buffer + (from - first),
                                                   uint64_t(part) * sizeof(T));
                                });
  });
}
static void draw_words(const Slot& slot, const Address& a, int64_t at, int64_t n, uint32_t* __restrict out) {
  for_each_address(slot, at, n, [&](int64_t element, int64_t offset, int64_t count) {
    for_each_run<1>(Philox{}, a, element, element + count,
                    [&](const uint32_t* w, int64_t first, int64_t, int64_t from, int64_t part) {
                      __builtin_memcpy(out + offset + (from - element), w + (from - first), uint64_t(part) * 4);
                    });
  });
}

template <class T>
static void keep_masked(const uint8_t* mask, int64_t n, const T* __restrict old, T* __restrict x) {
  alignas(64) uint8_t kept[kBlock];
  load_bits(mask, n, kept);
  for (int64_t i = 0; i < n; ++i) x[i] = kept[i] ? x[i] : old[i];
}

// The mask whose zeros stand still; that of SR-STE has none.
template <class T>
static const uint8_t* freezing(const Slot& slot, const Around<T>& a) {
  return a.pull == T(0) ? slot.mask : nullptr;
}

// The gradient of a block with private noise: while its normals are computed, memory is waited for.
template <class T, class S>
static void add_private(const Around<T>& a, const uint32_t* __restrict w, int64_t n, const S* __restrict x, T* __restrict y) {
  const T scale = a.scale, std = a.std, gain = a.gain;
  for (int64_t g = 0; g < n; g += 32, w += 8 * sizeof(T)) {
    for (int line = 0; line < 32; line += 64 / sizeof(S)) __builtin_prefetch(x + g + kBlock + line);
    for (int k = 0; k < kLanes; ++k) {
      T z[2];
      if constexpr (sizeof(T) == 8) box_muller(w[k], w[16 + k], w[32 + k], w[48 + k], z[0], z[1]);
      else box_muller(w[k], w[16 + k], z[0], z[1]);
      y[g + k] = (T(widen(x[g + k])) * scale + std * z[0]) * gain;
      y[g + 16 + k] = (T(widen(x[g + 16 + k])) * scale + std * z[1]) * gain;
    }
  }
}
template <class T>
static void load_private(const Slot& slot, const PrivateKey& key, const Around<T>& a, int64_t at, int64_t n, T* y) {
  const Address address = a.address(key);
  const auto run = [&]<class Generator, class S>(Generator generator, const S* x) {
    for_each_address(slot, at, n, [&](int64_t element, int64_t offset, int64_t count) {
      for_each_run<sizeof(T) / 4>(generator, address, element, element + count,
                                  [&](const uint32_t* w, int64_t first, int64_t whole, int64_t from, int64_t part) {
                                    const int64_t i = offset + (from - element);
                                    if (part == whole) return add_private(a, w, whole, x + at + i, y + i);
                                    alignas(64) S given[1024]{};
                                    alignas(64) T noised[1024];
                                    __builtin_memcpy(given + (from - first), x + at + i, uint64_t(part) * sizeof(S));
                                    add_private(a, w, whole, given, noised);
                                    __builtin_memcpy(y + i, noised + (from - first), uint64_t(part) * sizeof(T));
                                  });
    });
  };
  with_type(slot.g_type, [&]<class S>(S) {
    const S* x = static_cast<const S*>(slot.g);
    key.chacha ? run(ChaCha20{}, x) : run(Philox{}, x);
  });
}

// Everything before the rule, on a block of the gradient in its buffer.
template <class T>
static void prepare(const Slot& slot, const Around<T>& a, int64_t at, int64_t n, const T* __restrict p, T* __restrict g) {
  const T scale = a.scale, clip = a.clip;
  const uint8_t* frozen = freezing(slot, a);
  if (a.std == T(0))
    for (int64_t i = 0; i < n; ++i) g[i] = clamp(g[i] * scale, clip);
  else if (clip < T(__builtin_inf()))
    for (int64_t i = 0; i < n; ++i) g[i] = clamp(g[i], clip);
  if (slot.ema) {
    alignas(64) T h[kBlock], old[kBlock];
    load(slot.ema, slot.ema_type, at, n, old);
    for (int64_t i = 0; i < n; ++i) {
      h[i] = a.first ? g[i] : lerp(old[i], g[i], a.ema_take);
      g[i] += a.ema_gain * h[i];
    }
    if (frozen) keep_masked(frozen + at / 8, n, old, h);
    store(h, slot.ema, slot.ema_type, at, n, nullptr, 0);
  }
  if (a.noise != T(0)) {
    alignas(64) T z[kBlock];
    draw_normals(slot, a.address(a.normal, kGradientNoise), at, n, z);
    for (int64_t i = 0; i < n; ++i) g[i] += a.noise * z[i];
  }
  if (a.pull != T(0) && slot.mask) {
    alignas(64) uint8_t kept[kBlock];
    load_bits(slot.mask + at / 8, n, kept);
    const T pull = a.pull;
    for (int64_t i = 0; i < n; ++i) {
      const T pulled = g[i] + pull * p[i];
      g[i] = kept[i] ? g[i] : pulled;
    }
  }
  if (a.l2 != T(0))
    for (int64_t i = 0; i < n; ++i) g[i] += a.l2 * p[i];
}

// Nothing but bfloat16: converted in registers.
template <class R>
static void step_bfloat16(const Slot& slot, const Constants<R, float>& c, int64_t lo, int64_t hi) {
  const auto at = [&](void* x, int64_t i) { return static_cast<bfloat16*>(x) + i; };
  alignas(64) uint32_t w[kBlockOfDraws];
  const int64_t block = c.around.stochastic ? kBlockOfDraws : hi - lo;
  for (int64_t i = lo; i < hi; i += block) {
    const int64_t n = smaller(block, hi - i);
    bfloat16* const s[] = {at(slot.state[0], i), at(slot.state[1], i), at(slot.state[2], i)};
    const bfloat16* g = static_cast<const bfloat16*>(slot.g) + i;
    if (c.around.stochastic) {
      draw_words(slot, c.around.address(Kind::bits), i, n, w);
      update_all<Loop::random>(c.rule, c.around, n, w, {}, at(slot.p, i), g, s);
    } else {
      update_all<Loop::full>(c.rule, c.around, n, nullptr, {}, at(slot.p, i), g, s);
    }
  }
}

template <class R, class T>
static void step_with(const Slot& slot, const Shared& shared, const Constants<R, T>& c, int64_t lo, int64_t hi) {
  constexpr DType native = sizeof(T) == 8 ? DType::f64 : DType::f32;
  const Around<T>& a = c.around;
  const uint8_t* frozen = freezing(slot, a);
  const bool inside = !a.gradient && a.kick == T(0) && !slot.mask;  // all happens in the loop of the rule
  void* const memory[1 + kMaxStates] = {slot.p, slot.state[0], slot.state[1], slot.state[2]};
  const DType type[1 + kMaxStates] = {slot.p_type, slot.state_type[0], slot.state_type[1], slot.state_type[2]};
  if constexpr (sizeof(T) == 4) {
    bool bf16 = inside && slot.g_type == DType::bf16;
    for (int k = 0; k <= R::states; ++k) bf16 &= type[k] == DType::bf16;
    if (bf16) return step_bfloat16(slot, c, lo, hi);
  }
  // Arrays of the compute type are updated in place, the others pass through buffers; so do all under a mask where p is
  // kicked or anything is rounded after the rule.
  bool direct[1 + kMaxStates], all_direct = true;
  for (int k = 0; k <= R::states; ++k) all_direct &= direct[k] = type[k] == native;
  const bool late = frozen && (!all_direct || a.kick != T(0));  // the mask acts when all else is done
  if (late)
    for (int k = 0; k <= R::states; ++k) all_direct = direct[k] = false;
  const bool g_direct = slot.g_type == native && !a.gradient;
  const bool draws = a.noise != T(0) || a.kick != T(0) || a.stochastic;
  const bool in_place = all_direct && g_direct && a.kick == T(0);
  const int64_t block = in_place && inside ? hi - lo
                        : in_place         ? kMaskBlock
                        : a.std != T(0)    ? kBlock
                        : draws            ? kBlockOfDraws
                                           : kBlockWithoutDraws;
  Around<T> left = a;  // what is left to do in the loop of the rule
  if (a.gradient) left.scale = T(1), left.clip = T(__builtin_inf()), left.pull = T(0);

  alignas(64) T buffer[1 + kMaxStates][kBlock], g_buffer[kBlock], old[kBlock];
  alignas(64) uint32_t w[kBlock];
  alignas(64) uint8_t kept[kMaskBlock], all[kMaskBlock];
  __builtin_memset(all, 1, kMaskBlock);
  for (int64_t at = lo; at < hi; at += block) {
    const int64_t n = smaller(block, hi - at);
    T* x[1 + kMaxStates] = {};
    if (a.gradient) {
      const int64_t next = at + n, ahead = smaller(block, hi - next);
      for (int k = 0; k <= R::states; ++k) prefetch(memory[k], type[k], next, ahead);
      if (a.std == T(0)) prefetch(slot.g, slot.g_type, next, ahead);
      if (slot.ema) prefetch(slot.ema, slot.ema_type, next, ahead);
    }
    for (int k = 0; k <= R::states; ++k) {
      x[k] = direct[k] ? static_cast<T*>(memory[k]) + at : buffer[k];
      if (!direct[k]) load(memory[k], type[k], at, n, x[k]);
    }
    const T* g = g_direct ? static_cast<const T*>(slot.g) + at : g_buffer;
    if (!g_direct) {
      if (a.std != T(0)) load_private(slot, shared.key, a, at, n, g_buffer);
      else load(slot.g, slot.g_type, at, n, g_buffer);
      if (a.gradient) prepare(slot, a, at, n, x[0], g_buffer);
    }
    if (slot.mask) {
      load_bits(slot.mask + at / 8, n, kept);
      update_all<Loop::masked>(c.rule, left, n, nullptr, {kept, frozen && !late ? kept : all}, x[0], g, {x[1], x[2], x[3]});
    } else {
      update_all<Loop::full>(c.rule, left, n, nullptr, {}, x[0], g, {x[1], x[2], x[3]});
    }
    if (a.kick != T(0)) {
      alignas(64) T z[kBlock];
      draw_normals(slot, a.address(a.normal), at, n, z);
      T* __restrict p = x[0];
      for (int64_t i = 0; i < n; ++i) p[i] += a.kick * z[i];
    }
    if (all_direct) continue;
    if (a.stochastic) draw_words(slot, a.address(Kind::bits), at, n, w);
    for (int k = 0; k <= R::states; ++k) {
      if (direct[k]) continue;
      if (frozen) {  // a masked element keeps its bits: both roundings leave a stored value alone
        load(memory[k], type[k], at, n, old);
        keep_masked(frozen + at / 8, n, old, x[k]);
      }
      store(x[k], memory[k], type[k], at, n, a.stochastic ? w : nullptr, k);
    }
  }
}

void step_range(Rule rule, bool wide, const Slot& slot, const Shared& shared, const void* constants, int64_t lo, int64_t hi) {
  const auto run = [&]<template <class> class R, class T>() {
    step_with(slot, shared, *static_cast<const Constants<R<T>, T>*>(constants), lo, hi);
  };
  if (wide) with_rule<true>(rule, run);
  else with_rule<false>(rule, run);
}
}  // namespace dither::DITHER_ISA
