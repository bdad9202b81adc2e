// Tiles of a matrix product: rows with panels of 128 bytes of columns. Per-instruction-set files only.
#pragma once
#include "../common/shuffle_cpu.h"
#include "multiply_add.h"

namespace dither::DITHER_ISA {
template <class T>
using Vec = typename Lanes<T>::type;
template <class T>
constexpr int kPanel = 128 / int(sizeof(T));                                                  // columns
constexpr int kPanelVectors = 128 / DITHER_VECTOR_BYTES;                                      // of a row of a panel
constexpr int kTileRows = DITHER_VECTOR_BYTES == 64 ? 8 : DITHER_VECTOR_BYTES == 32 ? 3 : 1;  // whose sums fit the registers
template <class T>
using TileSums = Vec<T>[kTileRows][kPanelVectors];

template <class T>
static INLINE Vec<T> multiply_add(Vec<T> a, Vec<T> b, Vec<T> c) {
  if constexpr (sizeof(T) == 8) return a * b + c;
#if defined(__AVX512F__)
  else return Vec<T>(_mm512_fmadd_ps(__m512(a), __m512(b), __m512(c)));
#elif defined(__FMA__)
  else return Vec<T>(_mm256_fmadd_ps(__m256(a), __m256(b), __m256(c)));
#else
  else {
    for (int l = 0; l < Lanes<T>::count; ++l) c[l] = dither::multiply_add(a[l], b[l], c[l]);
    return c;
  }
#endif
}

// sum[r][p] = sum over k < n of rows[r stride + k] panel[k][p], in the order of k.
template <class T>
static INLINE void tile_products(const T* rows, int64_t stride, const T* panel, int64_t n, TileSums<T>& sum) {
  const T* row[kTileRows];
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r) {
    row[r] = rows + r * stride;
#pragma GCC unroll 8
    for (int p = 0; p < kPanelVectors; ++p) sum[r][p] = Vec<T>{};
  }
  for (int64_t k = 0; k < n; ++k, panel += kPanel<T>) {
    Vec<T> column[kPanelVectors];
    __builtin_memcpy(column, panel, sizeof column);
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r)
#pragma GCC unroll 8
      for (int p = 0; p < kPanelVectors; ++p) sum[r][p] = multiply_add<T>(row[r][k] - Vec<T>{}, column[p], sum[r][p]);
  }
}

// A panel of n columns k, [k][token], from kPanel rows, [token][stride]; stride is a multiple of 16 and at least n.
template <class T>
static INLINE void pack_panel(const T* rows, int64_t stride, int64_t n, T* panel) {
  constexpr int L = Lanes<T>::count;
  for (int64_t k = 0; k < n; k += L)
    for (int first = 0; first < kPanel<T>; first += L) {
      Vec<T> block[L];
      for (int l = 0; l < L; ++l) __builtin_memcpy(&block[l], rows + (first + l) * stride + k, sizeof(Vec<T>));
      transpose(block);
      for (int64_t c = 0; c < smaller<int64_t>(L, n - k); ++c)
        __builtin_memcpy(panel + (k + c) * kPanel<T> + first, &block[c], sizeof(Vec<T>));
    }
}
}  // namespace dither::DITHER_ISA
