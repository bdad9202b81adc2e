// For each token a the most similar token b: the row maxima of a matrix product that is never stored.
//
// Tokens are normalised first, by a norm that is summed in double: element k in lane k mod 32, the lanes fold by halves.
// Products are summed by multiply_add in the order of channels. The result is the same on every device, instruction set and
// number of threads.
#pragma once
#include "../common/cpu.h"
#include "../common/dtype.h"
#include "../common/stream.h"
#include "multiply_add.h"

namespace dither {
constexpr int kNormLanes = 32;
struct Tokens {
  const void* x;  // [batch][count][channels], the last dense
  int64_t batch, count, channels;
  int64_t batch_stride, stride;  // elements
  DType type;
  bool normalize;
  const int64_t* places;  // those of x that count, or nullptr: all in turn
  DITHER_HD int64_t at(int64_t sample, int64_t token) const {
    return sample * batch_stride + (places ? places[token] : token) * stride;
  }
};
DITHER_HD double inverse_norm(double squares) { return squares > 0.0 ? 1.0 / square_root(squares) : 0.0; }

struct Match {
  Tokens a, b;
  const uint8_t* mask;  // 1 where the pair may match; or nullptr
  int64_t mask_stride[3];
  bool skip_diagonal;
  void* score;  // float, or double for double tokens
  int64_t* index;
  DITHER_HD bool allows(int64_t sample, int64_t i, int64_t j) const {
    return j < b.count && !(skip_diagonal && i == j) &&
           (!mask || mask[sample * mask_stride[0] + i * mask_stride[1] + j * mask_stride[2]]);
  }
};

// CPU. Rows: [group of row_group() tokens][token][packed_stride]; panels: [group of panel_group() tokens][channels][token].
DITHER_HD int64_t packed_stride(int64_t channels) { return (channels + 15) / 16 * 16 | 16; }  // no multiple of a page
DITHER_PER_ISA(int64_t row_group())
DITHER_PER_ISA(int64_t panel_group(DType))
DITHER_PER_ISA(int64_t rows_of_unit())
// Groups lo .. hi of all samples, the last of a sample filled with zeros. scratch: a panel's tokens, packed_stride apart.
DITHER_PER_ISA(void pack_rows(const Tokens&, int64_t lo, int64_t hi, void* rows))
DITHER_PER_ISA(void pack_panels(const Tokens&, int64_t lo, int64_t hi, void* scratch, void* panels))
DITHER_PER_ISA(void match_units(const Match&, const void* rows, const void* panels, int64_t lo, int64_t hi))

constexpr int kMatchRows = 128, kMatchColumns = 64;  // tokens of a and b that a block of threads compares at a time
// CUDA, cosines of 16-bit tokens: tensor cores, whose sums are rounded in their own way, rule out the pairs that cannot be the
// best; those that are left are compared as everywhere else. Tokens are scaled by powers of 2, to a norm between 1/2 and 1.
constexpr int64_t kFilterDepth = 32;  // channels at a time
struct Filter {
  bool on;
  int64_t width, tokens, maxima;  // channels of a scaled token; tokens of a and b; a's times splits
  DITHER_HD Filter(const Match& m, int splits)
      : on(m.a.normalize && size_of(m.a.type) == 2 && m.a.channels >= 16),
        width((m.a.channels + kFilterDepth - 1) / kFilterDepth * kFilterDepth),
        tokens(m.a.batch * (m.a.count + m.b.count)),
        maxima(m.a.batch * m.a.count * splits) {}
  int64_t bytes() const { return on ? tokens * (2 * width + 4) + maxima * 4 : 0; }
};
// Normalised tokens [batch][count][channels] of a and b in turn; scores and indices of each of `splits` ranges of b.
int match_cuda(const Match&, int splits, void* tokens, void* filter, void* scores, int64_t* indices, Stream);
}  // namespace dither
