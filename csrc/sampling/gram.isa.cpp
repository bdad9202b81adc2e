#include "gram.h"
#include "../common/vector_cpu.h"

namespace dither::DITHER_ISA {
constexpr int kPiece = 16 * kGramLanes;  // elements that pass through L1 as doubles
using V __attribute__((vector_size(DITHER_VECTOR_BYTES))) = double;

// sums[which][lane] += the products of 16 rows
template <int R>
static void add_piece(const double (*x)[kPiece], double (*sums)[kGramLanes]) {
  for (int lane = 0; lane < kGramLanes; lane += sizeof(V) / 8) {
    V sum[gram_sums(R)], v[R];
    for (int i = 0; i < gram_sums(R); ++i) __builtin_memcpy(&sum[i], &sums[i][lane], sizeof(V));
    for (int row = 0; row < kPiece; row += kGramLanes) {
      for (int r = 0; r < R; ++r) __builtin_memcpy(&v[r], &x[r][row + lane], sizeof(V));
      int i = 0;
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int s = r; s < R; ++s) sum[i++] += v[r] * v[s];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sum[i++] += v[r];
    }
    for (int i = 0; i < gram_sums(R); ++i) __builtin_memcpy(&sums[i][lane], &sum[i], sizeof(V));
  }
}

void gram_chunk(const Gram& g, int64_t sample, int64_t chunk, double* out) {
  alignas(64) double x[kGramInputs][kPiece], sums[kGramSums][kGramLanes] = {};
  const int64_t begin = chunk * kGramChunk, end = smaller(g.sample, begin + kGramChunk);
  for (int64_t at = begin; at < end; at += kPiece) {
    const int64_t n = smaller<int64_t>(kPiece, end - at);
    for (int r = 0; r < g.inputs; ++r) {
      with_type(g.type[r], [&]<class S>(S) {
        const S* __restrict from = static_cast<const S*>(g.x[r]) + sample * g.sample + at;
        double* __restrict to = x[r];
        for (int64_t k = 0; k < n; ++k) to[k] = double(widen(from[k]));
      });
      for (int64_t k = n; k < kPiece; ++k) x[r][k] = 0.0;
    }
    if (g.inputs == 1) add_piece<1>(x, sums);
    else if (g.inputs == 2) add_piece<2>(x, sums);
    else if (g.inputs == 3) add_piece<3>(x, sums);
    else add_piece<4>(x, sums);
  }
  for (int i = 0; i < gram_sums(g.inputs); ++i) {
    for (int half = kGramLanes / 2; half > 0; half /= 2)
      for (int k = 0; k < half; ++k) sums[i][k] += sums[i][k + half];
    out[i] = sums[i][0];
  }
}
}  // namespace dither::DITHER_ISA
