#include "lazy.h"
#include "../common/generator_cpu.h"

namespace dither::DITHER_ISA {
// Normals by address. Words come by tiles, which rows side by side share; only the normals that are wanted are computed.
template <class Generator, class T>
struct Window {
  static constexpr int64_t per_element = sizeof(T) / 4, tile = 16 * Generator::words / per_element, most = 1024 / per_element;
  alignas(64) uint32_t w[1024];
  alignas(64) T z[most];
  int64_t first = 0, last = 0, ready = 0, end_ready = 0;
  uint32_t step = 0;

  // Those of elements at, at + 1, ...; end: behind the last one known.
  const T* from(const Address& a, int64_t at, int64_t until, int64_t& end) {
    if (at < first || at >= last || a.step != step) {
      first = at / tile * tile;
      last = smaller(first + most, (until + tile - 1) / tile * tile);
      step = a.step;
      words(Generator{}, a, uint64_t(first / tile), (last - first) / tile, w);
      ready = end_ready = 0;
    }
    if (at < ready || at >= end_ready) {
      ready = at / 32 * 32;
      end_ready = smaller(last, (until + 31) / 32 * 32);
      normals(w + (ready - first) * per_element, end_ready - ready, z + (ready - first));
    }
    end = smaller(end_ready, until);
    return z + (at - first);
  }
};

template <bool kMomentum, class T>
static void move_all(const Move<T>& a, int64_t n, const T* __restrict z, const T* __restrict y, const T* __restrict g,
                     T* __restrict w, T* __restrict m) {
  T unused = 0;
  for (int64_t c = 0; c < n; ++c) move_one<kMomentum>(a, z[c], y[c], g[c], w[c], kMomentum ? m[c] : unused);
}

template <class Generator, bool kMomentum, class T>
static void lazy_with(const LazyRows& l, int64_t lo, int64_t hi) {
  constexpr int64_t ahead = 4, line = 64 / sizeof(T);
  Window<Generator, T> z, y;
  Missed missed;
  for (int64_t i = lo; i < hi; ++i) {
    const int64_t row = l.ids ? l.ids[i] : i;
    if (l.ids && i + 2 * ahead < hi) {
      __builtin_prefetch(l.last + l.ids[i + 2 * ahead], 1);
      const int64_t next = l.ids[i + ahead] * l.columns;
      for (int64_t c = 0; c < smaller<int64_t>(l.columns, 8 * line); c += line) {
        __builtin_prefetch(static_cast<T*>(l.weight) + next + c, 1);
        if constexpr (kMomentum) __builtin_prefetch(static_cast<T*>(l.momentum) + next + c, 1);
      }
    }
    const int64_t from = __atomic_exchange_n(l.last + row, int32_t(l.steps), __ATOMIC_RELAXED);
    if (from >= l.steps) continue;  // repeated, or not behind
    for_each_move<T>(l, i, from, missed, [&](const Move<T>& a, uint32_t step, const T* gradient) {
      Address address = l.address;
      address.step = step;
      const int64_t begin = row * l.columns, end = begin + l.columns;
      for (int64_t at = begin, next = 0; at < end; at = next) {
        const T* const normal = z.from(address, at, end, next);
        const T* other = normal;  // with a factor of 0
        if (kMomentum && a.rw != T(0)) {
          other = y.from(address, at + l.second, next + l.second, next);
          next -= l.second;
        }
        T* const w = static_cast<T*>(l.weight) + at;
        T* const m = kMomentum ? static_cast<T*>(l.momentum) + at : nullptr;
        move_all<kMomentum>(a, next - at, normal, other, gradient ? gradient + (at - begin) : normal, w, m);
      }
    });
  }
}
template <class Generator>
static void lazy_with(Generator, const LazyRows& l, int64_t lo, int64_t hi) {
  if (l.wide && l.momentum) lazy_with<Generator, true, double>(l, lo, hi);
  else if (l.wide) lazy_with<Generator, false, double>(l, lo, hi);
  else if (l.momentum) lazy_with<Generator, true, float>(l, lo, hi);
  else lazy_with<Generator, false, float>(l, lo, hi);
}

void lazy_range(const LazyRows& l, int64_t lo, int64_t hi) {
  if (l.chacha) lazy_with(ChaCha20{}, l, lo, hi);
  else lazy_with(Philox{}, l, lo, hi);
}
}  // namespace dither::DITHER_ISA
