// Tiles of a matrix product: rows with panels of 128 bytes of columns. Per-instruction-set files only.
#pragma once
#include "../common/shuffle_cpu.h"
#include "multiply_add.h"

namespace dither::DITHER_ISA {
template <class T>
constexpr int kPanel = 128 / int(sizeof(T));              // columns
constexpr int kPanelVectors = 128 / DITHER_VECTOR_BYTES;  // of a row of a panel

template <class T>
static INLINE Vector<T> multiply_add(Vector<T> a, Vector<T> b, Vector<T> c) {
  if constexpr (sizeof(T) == 8) return a * b + c;
#if defined(__AVX512F__)
  else return Vector<T>(_mm512_fmadd_ps(__m512(a), __m512(b), __m512(c)));
#elif defined(__FMA__)
  else return Vector<T>(_mm256_fmadd_ps(__m256(a), __m256(b), __m256(c)));
#elif defined(__x86_64__)
  else {  // two lanes at a time, as dither::multiply_add
    const auto odd = [](__m128d a, __m128d b, __m128d c) {
      const __m128d product = a * b, sum = product + c, other = sum - product;
      const __m128d error = (product - (sum - other)) + (c - other);
      const __m128i up = __m128i(error > 0.0), inexact = up | __m128i(error < 0.0), outwards = ~(up ^ __m128i(sum > 0.0));
      const __m128i bits = __m128i(sum), even = (bits & 1) - 1;
      return _mm_cvtpd_ps(__m128d(bits + (even & inexact & (-1 - 2 * outwards))));
    };
    const auto low = [](Vector<T> x) { return _mm_cvtps_pd(__m128(x)); };
    const auto high = [](Vector<T> x) { return _mm_cvtps_pd(_mm_movehl_ps(__m128(x), __m128(x))); };
    return Vector<T>(_mm_movelh_ps(odd(low(a), low(b), low(c)), odd(high(a), high(b), high(c))));
  }
#else
  else {
    for (int l = 0; l < Lanes<T>::count; ++l) c[l] = dither::multiply_add(a[l], b[l], c[l]);
    return c;
  }
#endif
}

// sum[r][c] = sum over k < n of rows[r stride + k step] panel[k][c], in the order of k, each product added by join.
template <class T, int kRows, int kColumns, class Join>
static INLINE void tile_products(const T* rows, int64_t stride, int64_t step, const T* panel, int64_t n,
                                 Vector<T> (&sum)[kRows][kColumns], const Join& join) {
  const T* row[kRows];
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
    row[r] = rows + r * stride;
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) sum[r][c] = Vector<T>{};
  }
  for (int64_t k = 0; k < n; ++k, panel += kPanel<T>) {
    Vector<T> column[kColumns];
#pragma GCC unroll 8
    for (int c = 0; c < kColumns; ++c) column[c] = load(panel + c * Lanes<T>::count);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < kColumns; ++c) sum[r][c] = join(row[r][k * step] - Vector<T>{}, column[c], sum[r][c]);
  }
}

// A panel of n columns k, [k][token], from kPanel rows, [token][stride]; stride is a multiple of 16 and at least n.
template <class T>
static INLINE void pack_panel(const T* rows, int64_t stride, int64_t n, T* panel) {
  constexpr int L = Lanes<T>::count;
  for (int64_t k = 0; k < n; k += L)
    for (int first = 0; first < kPanel<T>; first += L) {
      Vector<T> block[L];
      for (int l = 0; l < L; ++l) block[l] = load(rows + (first + l) * stride + k);
      transpose(block);
      for (int64_t c = 0; c < smaller<int64_t>(L, n - k); ++c) store(panel + (k + c) * kPanel<T> + first, block[c]);
    }
}
}  // namespace dither::DITHER_ISA
