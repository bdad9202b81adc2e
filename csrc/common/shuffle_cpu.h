// Vectors whose lanes trade places. Per-instruction-set files only.
#pragma once
#include "vector_cpu.h"

namespace dither::DITHER_ISA {
#define INLINE inline __attribute__((always_inline))
template <class T>
struct Lanes {
  using type __attribute__((vector_size(DITHER_VECTOR_BYTES))) = T;
  static constexpr int count = DITHER_VECTOR_BYTES / sizeof(T);
};
template <class T>
using Vector = typename Lanes<T>::type;
template <class T>
static INLINE Vector<T> load(const T* x) {
  Vector<T> v;
  __builtin_memcpy(&v, x, sizeof v);
  return v;
}
template <class T>
static INLINE void store(T* to, Vector<T> v) {
  __builtin_memcpy(to, &v, sizeof v);
}

template <class V>
constexpr int kLanes = sizeof(V) / sizeof(V{}[0]);
// Lane i becomes lane at(i) of a and b in a row.
template <class V, class At, int... i>
static INLINE V shuffle(V a, V b, At at, Indices<i...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, at(i)...);
#else
  return __builtin_shuffle(a, b, decltype(a > b){at(i)...});
#endif
}
template <class V, class At>
static INLINE V shuffle(V a, V b, At at) {
  return shuffle(a, b, at, typename CountTo<kLanes<V>>::type{});
}
template <class V>
static INLINE V even(V a, V b) {
  return shuffle(a, b, [](int i) { return 2 * i; });
}
template <class V>
static INLINE V odd(V a, V b) {
  return shuffle(a, b, [](int i) { return 2 * i + 1; });
}

// [lanes][M] -> [M][lanes]: each of log2 M steps rotates the bits of an element's address by one.
template <int M, class V>
static INLINE void transpose(V (&x)[M]) {
#pragma GCC unroll 5
  for (int step = 1; step < M; step *= 2) {
    V y[M];
#pragma GCC unroll 16
    for (int p = 0; p < M / 2; ++p) {
      y[p] = even(x[2 * p], x[2 * p + 1]);
      y[M / 2 + p] = odd(x[2 * p], x[2 * p + 1]);
    }
#pragma GCC unroll 32
    for (int p = 0; p < M; ++p) x[p] = y[p];
  }
}
}  // namespace dither::DITHER_ISA
