// A step of a diffusion sampler: a small matrix product at every element, with noise that is drawn on the way.
//
//   d = clamp(sum_r P[r] in[r]),   out[j] = sum_r W[j][r] in[r] + W[j][R] d + W[j][R + 1] z
//
// Terms are added in the order of columns; one whose coefficient is 0 is left out, so that what it multiplies need not be
// finite. Sums begin at -0, to which adding changes nothing.
#pragma once
#include "../common/address.h"
#include "../common/cpu.h"
#include "../common/dtype.h"
#include "../common/stream.h"

namespace dither {
constexpr int kMaxInputs = 8, kMaxOutputs = 3, kMaxColumns = kMaxInputs + 2, kMaxRows = kMaxOutputs + 2;
constexpr uint32_t kSamplerNoise = 0x73616d70u;  // the stream of z, "samp"

enum class By : int8_t { step, run, element };  // what has coefficients of its own

// Rows: P, those of the outputs, and A where there is a mask. Columns: the inputs, d, z.
struct Rows {
  const void* in[kMaxInputs];
  void* out[kMaxOutputs];
  DType in_type[kMaxInputs], out_type[kMaxOutputs];
  int inputs, outputs;
  By by;
  bool wide_table, wide_limit, divide;
  bool staged;                           // an output is an input that a later row still reads
  bool samples;                          // something depends on the sample
  double table[kMaxRows * kMaxColumns];  // by step: [rows][columns]
  const void* coefficients;              // by run: [runs][rows][columns]; by element: [rows][columns][sample]
  int64_t numel, sample, run;            // elements: all, of a sample, of a run
  const int64_t* seeds;                  // of the samples, or nullptr: no z
  uint32_t draw;
  const void* limit;
  int64_t limit_stride;
  const float* mask;
  bool mask_of_sample;  // one mask for all samples

  DITHER_HD int rows() const { return 1 + outputs + (mask ? 1 : 0); }
  DITHER_HD int columns() const { return inputs + 2; }
  DITHER_HD Address address(int64_t b, bool wide) const {
    return {
        {uint32_t(seeds[b]), uint32_t(uint64_t(seeds[b]) >> 32)}, kSamplerNoise, draw, wide ? Kind::normal64 : Kind::normal32};
  }
  template <class T>
  DITHER_HD T limit_of(int64_t b) const {
    const int64_t i = b * limit_stride;
    return wide_limit ? T(static_cast<const double*>(limit)[i]) : T(static_cast<const float*>(limit)[i]);
  }
};

template <class T>
DITHER_HD T with_term(T sum, T w, T x) {
  const T more = sum + w * x;
  return w != T(0) ? more : sum;
}
template <class T>
DITHER_HD T limited(T d, T limit, bool divide) {
  d = d > limit ? limit : d;
  d = d < -limit ? -limit : d;
  return divide ? d / limit : d;
}
// Where the mask is 0 or 1, what it hides need not be finite.
template <class T>
DITHER_HD T blended(T m, T a, T b) {
  const T mixed = m * a + (T(1) - m) * b;
  return m == T(1) ? a : m == T(0) ? b : mixed;
}
template <class T, class S>
DITHER_HD void put(T x, S& y) {
  if constexpr (sizeof(S) == 2) narrow(float(x), y);
  else narrow(x, y);
}

DITHER_PER_ISA(void rows_range(const Rows&, bool wide, int64_t lo, int64_t hi))  // of [numel]
void rows_cpu(const Rows&, bool wide);                                           // all, on torch's threads
int rows_cuda(const Rows&, bool wide, int multiprocessors, Stream);
}  // namespace dither
