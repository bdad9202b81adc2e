#include "step.h"
#include "../common/generator_cpu.h"

namespace dither::DITHER_ISA {
constexpr int64_t kBlock = 512;  // elements converted at a time: every buffer stays in L1

template <class R, class T, class... State>
static inline void update(R rule, T keep, int64_t n, T* __restrict p, const T* __restrict g, State* __restrict... s) {
  for (int64_t i = 0; i < n; ++i) {
    T q = p[i] * keep;
    rule(q, g[i], s[i]...);
    p[i] = q;
  }
}
template <class R, class T>
static inline void update_all(const Constants<R, T>& c, int64_t n, T* p, const T* g, T* const (&s)[kMaxStates]) {
  if constexpr (R::states == 0) update(c.rule, c.around.keep, n, p, g);
  else if constexpr (R::states == 1) update(c.rule, c.around.keep, n, p, g, s[0]);
  else if constexpr (R::states == 2) update(c.rule, c.around.keep, n, p, g, s[0], s[1]);
  else update(c.rule, c.around.keep, n, p, g, s[0], s[1], s[2]);
}

template <class T>
static void load(const void* from, DType type, int64_t at, int64_t n, T* __restrict to) {
  with_type(type, [&]<class S>(S) {
    const S* __restrict x = static_cast<const S*>(from) + at;
    for (int64_t i = 0; i < n; ++i) to[i] = T(widen(x[i]));
  });
}
template <class T>
static void store(const T* __restrict from, void* to, DType type, int64_t at, int64_t n, const uint32_t* __restrict w, int slot) {
  with_type(type, [&]<class S>(S) {
    S* __restrict y = static_cast<S*>(to) + at;
    if constexpr (sizeof(T) == 8 && sizeof(S) == 2) {
      for (int64_t i = 0; i < n; ++i) narrow(float(from[i]), y[i]);
    } else {
      if (w)
        for (int64_t i = 0; i < n; ++i) narrow(from[i], rounding_bits(w[i], slot), y[i]);
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
      alignas(64) T buffer[4096 / sizeof(T)];
      normals(w, whole, buffer);
      __builtin_memcpy(z + offset + (from - element), buffer + (from - first), size_t(part) * sizeof(T));
    });
  });
}
static void draw_words(const Slot& slot, const Address& a, int64_t at, int64_t n, uint32_t* __restrict out) {
  for_each_address(slot, at, n, [&](int64_t element, int64_t offset, int64_t count) {
    for_each_run<1>(Philox{}, a, element, element + count,
                    [&](const uint32_t* w, int64_t first, int64_t, int64_t from, int64_t part) {
      __builtin_memcpy(out + offset + (from - element), w + (from - first), size_t(part) * 4);
    });
  });
}

template <class T>
static void keep_masked(const uint8_t* mask, int64_t n, const T* __restrict old, T* __restrict x) {
  for (int64_t i = 0; i < n; ++i) x[i] = mask[i >> 3] >> (i & 7) & 1 ? x[i] : old[i];
}

// Everything before the rule, on a block of the gradient in its buffer.
template <class T>
static void prepare(const Slot& slot, const Around<T>& a, int64_t at, int64_t n, const T* __restrict p, T* __restrict g) {
  for (int64_t i = 0; i < n; ++i) {
    const T x = g[i] * a.scale;
    g[i] = x < -a.clip ? -a.clip : (x > a.clip ? a.clip : x);
  }
  if (slot.ema) {
    alignas(64) T h[kBlock], old[kBlock];
    load(slot.ema, slot.ema_type, at, n, old);
    for (int64_t i = 0; i < n; ++i) {
      h[i] = a.first ? g[i] : lerp(old[i], g[i], a.ema_take);
      g[i] += a.ema_gain * h[i];
    }
    if (slot.mask) keep_masked(slot.mask + at / 8, n, old, h);
    store(h, slot.ema, slot.ema_type, at, n, nullptr, 0);
  }
  if (a.noise != T(0)) {
    alignas(64) T z[kBlock];
    draw_normals(slot, a.address(sizeof(T) == 8 ? Kind::normal64 : Kind::normal32, kGradientNoise), at, n, z);
    for (int64_t i = 0; i < n; ++i) g[i] += a.noise * z[i];
  }
  if (a.l2 != T(0))
    for (int64_t i = 0; i < n; ++i) g[i] += a.l2 * p[i];
}

template <class R, class T>
static void step_with(const Slot& slot, const Constants<R, T>& c, int64_t lo, int64_t hi) {
  constexpr DType native = sizeof(T) == 8 ? DType::f64 : DType::f32;
  const Around<T>& a = c.around;
  bool direct = slot.p_type == native && !slot.mask;
  for (int k = 0; k < R::states; ++k) direct = direct && slot.state_type[k] == native;
  const bool plain = direct && slot.g_type == native && !a.gradient && a.kick == T(0);
  const int64_t block = plain ? hi - lo : kBlock;

  alignas(64) T p_buffer[kBlock], g_buffer[kBlock], s_buffer[kMaxStates][kBlock], old[kBlock];
  alignas(64) uint32_t w[kBlock];
  for (int64_t at = lo; at < hi; at += block) {
    const int64_t n = smaller(block, hi - at);
    T *p = p_buffer, *s[kMaxStates] = {s_buffer[0], s_buffer[1], s_buffer[2]};
    const T* g = g_buffer;
    if (direct) {
      p = static_cast<T*>(slot.p) + at;
      for (int k = 0; k < R::states; ++k) s[k] = static_cast<T*>(slot.state[k]) + at;
    } else {
      load(slot.p, slot.p_type, at, n, p);
      for (int k = 0; k < R::states; ++k) load(slot.state[k], slot.state_type[k], at, n, s[k]);
    }
    if (slot.g_type == native && !a.gradient) {
      g = static_cast<const T*>(slot.g) + at;
    } else {
      load(slot.g, slot.g_type, at, n, g_buffer);
      if (a.gradient) prepare(slot, a, at, n, p, g_buffer);
    }
    update_all(c, n, p, g, s);
    if (a.kick != T(0)) {
      alignas(64) T z[kBlock];
      draw_normals(slot, a.address(sizeof(T) == 8 ? Kind::normal64 : Kind::normal32), at, n, z);
      for (int64_t i = 0; i < n; ++i) p[i] += a.kick * z[i];
    }
    if (direct) continue;
    const uint8_t* mask = slot.mask ? slot.mask + at / 8 : nullptr;
    const uint32_t* words = nullptr;
    if (a.stochastic) {
      draw_words(slot, a.address(Kind::bits), at, n, w);
      words = w;
    }
    const auto write = [&](T* x, void* to, DType type, int index) {
      if (!mask) return store(x, to, type, at, n, words, index);
      // A masked element keeps its stored bits: what is stored widens to a value that both roundings leave alone.
      load(to, type, at, n, old);
      keep_masked(mask, n, old, x);
      store(x, to, type, at, n, words, index);
    };
    write(p, slot.p, slot.p_type, 0);
    for (int k = 0; k < R::states; ++k) write(s[k], slot.state[k], slot.state_type[k], k + 1);
  }
}

void step_range(Rule rule, bool wide, const Slot& slot, const void* constants, int64_t lo, int64_t hi) {
  const auto run = [&]<template <class> class R, class T>() {
    step_with(slot, *static_cast<const Constants<R<T>, T>*>(constants), lo, hi);
  };
  if (wide) with_rule<true>(rule, run);
  else with_rule<false>(rule, run);
}
}  // namespace dither::DITHER_ISA
