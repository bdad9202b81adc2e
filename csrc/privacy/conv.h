// The gradient of a convolution's weight, one for each sample.
//
// In a fixed order on every device: the places of a gradient are cut into chunks, whole rows or parts of one; the products of a
// chunk are summed place by place, the chunks' sums one by one. The padding counts: 0 times g is added.
#pragma once
#include "../common/cpu.h"
#include "../common/dtype.h"
#include "../common/stream.h"

namespace dither {
constexpr int64_t kConvPlaces = 256;  // of a chunk, at most
constexpr int64_t kConvOutputs = 32;  // channels that a unit of work computes

struct ConvAxis {
  int64_t size, places, kernel, stride, padding, dilation;  // size: of x; places: of g
  DITHER_HD int64_t at(int64_t place, int64_t tap) const { return place * stride + tap * dilation - padding; }  // in x
  DITHER_HD int64_t padded() const { return size + 2 * padding; }
};

struct ConvGrads {
  const void *x, *g;  // [batch][groups][channels][y.size][x.size], [batch][groups][outputs][y.places][x.places]
  void* out;          // [batch][groups][outputs][channels][y.kernel][x.kernel]
  int64_t batch, groups, channels, outputs;
  ConvAxis rows, columns;
  DType type, out_type;
  bool stream_out;  // past the caches: rows of whole lines
  bool mixed;       // on the host: output channels of several groups are lanes, each with inputs of its own
  DITHER_HD int64_t weights() const { return channels * rows.kernel * columns.kernel; }  // of an output channel
  DITHER_HD int64_t places() const { return rows.places * columns.places; }
  DITHER_HD int64_t together() const { return mixed ? groups : 1; }  // groups of a unit
  DITHER_HD int64_t tiles() const { return (together() * outputs + kConvOutputs - 1) / kConvOutputs; }
  DITHER_HD int64_t units() const { return batch * groups / together() * tiles(); }
};

// n split evenly into parts of at most `most`: the size of a part.
DITHER_HD int64_t even_part(int64_t n, int64_t most) {
  const int64_t parts = (n + most - 1) / most;
  return parts > 0 ? (n + parts - 1) / parts : 1;
}
// A chunk has this many rows and columns of places.
DITHER_HD int64_t chunk_columns(const ConvGrads& c) { return even_part(c.columns.places, kConvPlaces); }
DITHER_HD int64_t chunk_rows(const ConvGrads& c) {
  return even_part(c.rows.places, larger<int64_t>(1, kConvPlaces / larger<int64_t>(1, c.columns.places)));
}

// Rows of padded x that rows of places read, and numbers from the first to the last that a walk reads.
DITHER_HD int64_t rows_read(const ConvAxis& y, int64_t places) {
  return y.dilation * (y.kernel - 1) + y.stride * (places - 1) + 1;
}
DITHER_HD int64_t span(const ConvGrads& c, int64_t rows, int64_t columns) {
  return (rows_read(c.rows, rows) - 1) * c.columns.padded() + rows_read(c.columns, columns);
}
// Numbers of room that conv_units needs: a padded copy of the channels of a group, or of a chunk of a channel for each lane and
// the same transposed; a transposed chunk of g; sums.
inline int64_t conv_scratch(const ConvGrads& c) {
  const int64_t weights = (c.weights() + 15) / 16 * 16, rows = chunk_rows(c);
  const int64_t x = c.mixed ? (rows_read(c.rows, rows) * c.columns.padded() + span(c, rows, chunk_columns(c))) * kConvOutputs
                            : c.channels * c.rows.padded() * c.columns.padded();
  return x + (kConvPlaces + weights) * kConvOutputs + c.weights() + 64;
}
// Units lo .. hi: a unit is kConvOutputs output channels of a sample, of one group unless mixed. scratch: zeros.
DITHER_PER_ISA(void conv_units(const ConvGrads&, int64_t lo, int64_t hi, void* scratch))
int conv_cuda(const ConvGrads&, Stream);
}  // namespace dither
