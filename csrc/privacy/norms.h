// Norms of what each sample adds to a gradient, without the gradient of a sample; the scaling of samples; gradients of norms.
//
// Sums are taken in double and in a fixed order, the same on every device, instruction set and number of threads:
// - A row is cut into chunks of kNormChunk elements. Element k of a chunk goes to lane k mod 32, the lanes fold by halves; the
//   chunks' sums are reduced by 32 lanes again.
// - A number of a Gram matrix is summed by 8 lanes, which fold by halves. Of the matrix, blocks of 16 x 16 on and below the
//   diagonal are computed; each of a block's 256 places is summed over the blocks of its 16 rows, the places fold by halves.
#pragma once
#include "../common/cpu.h"
#include "../common/dtype.h"
#include "../common/stream.h"

namespace dither {
constexpr int kNormLanes = 32;
constexpr int64_t kNormChunk = 4096;
inline int64_t norm_chunks(int64_t columns) { return columns > kNormChunk ? (columns + kNormChunk - 1) / kNormChunk : 1; }

// a b + c. The product of two numbers that were float32 is exact in double, so that the fused operation rounds as the two do.
template <class S>
DITHER_HD double add_product(double a, double b, double c) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(S) < 8) return __fma_rn(a, b, c);
#endif
  return a * b + c;
}

// What rounding has made of a sum of squares that is not negative: 0 of a negative number, infinity of its overflow.
DITHER_HD double not_negative(double x) { return x < 0.0 ? (x >= -0x1.fffffffffffffp1023 ? 0.0 : -x) : x; }

struct SampleRows {
  const void* x;  // [rows][columns]
  int64_t rows, columns;
  DType type;
};

constexpr int kGhostLanes = 8, kGhostTile = 4, kGhostBlock = 16;
struct GhostNorm {
  SampleRows a, g;  // columns of one of the `steps` rows of a sample
  int64_t batch, steps;
  double bias;
  double rounding;  // how much more a number on the diagonal counts
  DITHER_HD int64_t blocks() const { return (steps + kGhostBlock - 1) / kGhostBlock; }
  // How often a number of the Gram matrices counts, those above the diagonal included.
  DITHER_HD double weight(int64_t i, int64_t j) const {
    const int64_t row = i / kGhostTile, column = j / kGhostTile;
    return i < steps && j < steps && row >= column ? (row > column ? 2.0 : 1.0) : 0.0;
  }
};

struct EmbeddingNorm {
  const int64_t* ids;  // [batch][steps]
  const void* g;       // [batch][steps][columns]
  int64_t batch, steps, columns, padding;
  DType type;
  double rounding;  // how much the squares of rows count that are added to others
};

template <class S>
constexpr double kLargest = 0x1.FFFFFFFFFFFFFp1023;
template <>
constexpr double kLargest<float> = 0x1.FFFFFEp127;
template <>
constexpr double kLargest<bfloat16> = 0x1.FEp127;
template <>
constexpr double kLargest<float16> = 65504;

// f x, at most the largest finite number: infinity times a gradient of 0 would be nan in the sum of all samples.
template <class S, class T>
DITHER_HD T scaled_within(T f, T x) {
  constexpr T most = T(kLargest<S>);
  const T y = f * x;
  return y > most ? most : y < -most ? -most : y;
}

struct ScaleRows {
  void* x;             // [rows][columns]
  const void* factor;  // float or double, one a row
  int64_t rows, columns;
  DType type, factor_type;
  DITHER_HD double factor_of(int64_t row) const {
    return factor_type == DType::f64 ? static_cast<const double*>(factor)[row] : double(static_cast<const float*>(factor)[row]);
  }
};

// The gradients of weight and bias of a norm, one of each for a sample: sums over its steps, one by one and in double, of
// g (x - mean) scale and of g.
struct AffineGrads {
  const void *x, *g;           // [batch][steps][columns]
  const double *mean, *scale;  // [batch][steps]; no mean: 0
  void* out;                   // float, or double of doubles: [batch][columns] of the weight, then, if `bias`, of the bias
  int64_t batch, steps, columns;
  DType type;
  bool bias;
  DITHER_HD double mean_of(int64_t row) const { return mean ? mean[row] : 0.0; }
};
template <class V>  // double, or a vector of them
DITHER_HD V affine_product(const V& g, const V& x, const V& mean, const V& scale) {
  return g * ((x - mean) * scale);
}

// n <= kNormChunk elements
DITHER_PER_ISA(double square_chunk(const void* x, int64_t n, DType type))
DITHER_PER_ISA(double sum_lanes(const double* x, int64_t n))
// Blocks of 16 rows lo .. hi of all samples, a number each.
DITHER_PER_ISA(void ghost_blocks(const GhostNorm&, int64_t lo, int64_t hi, double* scratch, double* partial))
// Room for ghost_blocks: 32 rows of both tensors.
inline int64_t ghost_scratch(const GhostNorm& s) { return 2 * kGhostBlock * (s.a.columns + s.g.columns + 2 * kGhostLanes); }
// The norm of the sum of `count` rows of a sample; `ahead` more steps follow in the list, whose rows are fetched.
DITHER_PER_ISA(double norm_of_rows(const EmbeddingNorm&, int64_t sample, const int32_t* steps, int64_t count, int64_t ahead))
DITHER_PER_ISA(void scale_range(void* x, int64_t n, double factor, DType type))
DITHER_PER_ISA(void affine_samples(const AffineGrads&, int64_t lo, int64_t hi))

// CUDA. partial: a number for every chunk of every row (and likewise for a, or nullptr); out[row] += g (a + bias), or g.
int row_squares_cuda(const SampleRows& g, double* g_partial, const SampleRows& a, double* a_partial, double bias, double* out,
                     Stream);
int ghost_norm_cuda(const GhostNorm&, double* partial, double* out, Stream);          // partial: batch * blocks()
int embedding_norm_cuda(const EmbeddingNorm&, double* partial, double* out, Stream);  // partial: batch * steps
int scale_rows_cuda(const ScaleRows&, Stream);
int affine_grads_cuda(const AffineGrads&, Stream);
}  // namespace dither
