#include "match.h"

#include <memory>

#include "../common/torch.h"

namespace dither {
static Tokens tokens_of(const char* op, const char* name, const Tensor& t, const Tensor* places, bool normalize) {
  const DType type = checked_type(op, name, t);
  DITHER_CHECK(t.dim() == 3, op, ": ", name, " has shape ", shape_of(t), ", expected [batch, tokens, channels]");
  const int64_t* at = places ? static_cast<const int64_t*>(places->const_data_ptr()) : nullptr;
  return {t.const_data_ptr(), t.size(0), places ? places->numel() : t.size(1), t.size(2), t.stride(0), t.stride(1), type,
          normalize,          at};
}
// Tokens may lie anywhere, the channels of one together.
static Tensor rows_dense(const Tensor& t) { return t.dim() == 3 && t.stride(2) != 1 ? torch::stable::contiguous(t) : t; }

template <Device device>
static void check_places(const char* op, const char* name, const Tensor& places, const Tensor& x) {
  DITHER_CHECK(places.scalar_type() == ScalarType::Long && places.dim() == 1, op, ": ", name, " is ",
               name_of(places.scalar_type()), " of shape ", shape_of(places), ", expected int64 of one dimension");
  check_device(op, name, places, "the tokens", x);
  if constexpr (device == Device::cpu) {
    const int64_t *at = static_cast<const int64_t*>(places.const_data_ptr()), count = x.dim() == 3 ? x.size(1) : 0;
    for (int64_t i = 0; i < places.numel(); ++i)
      DITHER_CHECK(0 <= at[i] && at[i] < count, op, ": ", name, " contains ", at[i], ", expected 0 <= ", name, " < ", count);
  }
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Packed = std::unique_ptr<void, Free>;
// Memory of `groups` parts, which `pack` fills from lo to hi.
template <class Pack>
static Packed packed(const Tokens& t, int64_t group, int64_t width, const Pack& pack) {
  const int64_t groups = t.batch * ((t.count + group - 1) / group), elements = group * width;
  const int64_t bytes = groups * elements * (t.type == DType::f64 ? 8 : 4);
  Packed memory(std::aligned_alloc(64, (bytes + 64) / 64 * 64));
  DITHER_CHECK(memory, "bipartite_match_: no memory for ", bytes, " bytes");
  parallel(groups, std::max<int64_t>(1, (1 << 16) / std::max<int64_t>(1, elements)),
           [&](int64_t lo, int64_t hi) { pack(lo, hi, memory.get()); });
  return memory;
}

template <Device device>
static void bipartite_match_(const Tensor& a_tokens, const Tensor& b_tokens, const std::optional<Tensor>& a_places,
                             const std::optional<Tensor>& b_places, const std::optional<Tensor>& mask, bool normalize,
                             bool skip_diagonal, const Tensor& score, const Tensor& index) {
  const char* op = "bipartite_match_";
  const Tensor a_rows = rows_dense(a_tokens), b_rows = rows_dense(b_tokens);
  const Tensor a_at = a_places ? in_order(*a_places) : a_rows, b_at = b_places ? in_order(*b_places) : b_rows;
  if (a_places) check_places<device>(op, "a_places", a_at, a_tokens);
  if (b_places) check_places<device>(op, "b_places", b_at, b_tokens);
  Match m{tokens_of(op, "a", a_rows, a_places ? &a_at : nullptr, normalize),
          tokens_of(op, "b", b_rows, b_places ? &b_at : nullptr, normalize),
          nullptr,
          {},
          skip_diagonal,
          nullptr,
          nullptr};
  const Tokens &a = m.a, &b = m.b;
  DITHER_CHECK(b.batch == a.batch && b.channels == a.channels, op, ": b has shape ", shape_of(b_tokens), ", expected [",
               a.batch, ", tokens, ", a.channels, "] like a");
  DITHER_CHECK(b.type == a.type, op, ": b is ", name_of(b_tokens.scalar_type()), ", expected ", name_of(a_tokens.scalar_type()),
               " like a");
  check_device(op, "b", b_tokens, "a", a_tokens);
  DITHER_CHECK(b.count > 0 || a.batch * a.count == 0, op, ": b has 0 tokens, expected at least 1");
  DITHER_CHECK(b.count >> 30 == 0, op, ": b has ", b.count, " tokens, expected fewer than 2^30");
  if (mask) {
    DITHER_CHECK(mask->scalar_type() == ScalarType::Bool && mask->dim() == 3 && mask->size(0) == a.batch &&
                     mask->size(1) == a.count && mask->size(2) == b.count,
                 op, ": mask is ", name_of(mask->scalar_type()), " of shape ", shape_of(*mask), ", expected bool of shape [",
                 a.batch, ", ", a.count, ", ", b.count, "]");
    check_device(op, "mask", *mask, "a", a_tokens);
    m.mask = static_cast<const uint8_t*>(mask->const_data_ptr());
    for (int d = 0; d < 3; ++d) m.mask_stride[d] = mask->stride(d);
  }
  const ScalarType wide = a.type == DType::f64 ? ScalarType::Double : ScalarType::Float;
  check_out(op, "score", score, wide, {a.batch, a.count}, "a", a_tokens);
  check_out(op, "index", index, ScalarType::Long, {a.batch, a.count}, "a", a_tokens);
  if (a.batch * a.count == 0) return;
  m.score = score.mutable_data_ptr();
  m.index = static_cast<int64_t*>(index.mutable_data_ptr());
  if constexpr (device == Device::cpu) {
    const auto pack_a = DITHER_PICK_ISA(pack_rows);
    const auto pack_b = DITHER_PICK_ISA(pack_panels);
    const int64_t stride = packed_stride(a.channels), panel = DITHER_PICK_ISA(panel_group)(a.type);
    const Packed rows =
        packed(a, DITHER_PICK_ISA(row_group)(), stride, [&](int64_t lo, int64_t hi, void* to) { pack_a(a, lo, hi, to); });
    const Packed panels = packed(b, panel, b.channels, [&](int64_t lo, int64_t hi, void* to) {
      const std::unique_ptr<double[]> scratch(new double[panel * stride]);
      pack_b(b, lo, hi, scratch.get(), to);
    });
    const auto run = DITHER_PICK_ISA(match_units);
    const int64_t unit = DITHER_PICK_ISA(rows_of_unit)();
    const int64_t work = std::max<int64_t>(1, unit * b.count * b.channels);
    parallel(a.batch * ((a.count + unit - 1) / unit), std::max<int64_t>(1, (1 << 19) / work),
             [&](int64_t lo, int64_t hi) { run(m, rows.get(), panels.get(), lo, hi); });
  } else {
    const auto guard = device_guard(a_tokens);
    const int64_t blocks = a.batch * ((a.count + kMatchRows - 1) / kMatchRows),
                  tiles = (b.count + kMatchColumns - 1) / kMatchColumns;
    const int splits = int(std::clamp<int64_t>(2 * multiprocessor_count(a_tokens) / blocks, 1, std::min<int64_t>(tiles, 16)));
    const Tensor tokens = torch::stable::new_empty(a_tokens, {a.batch * (a.count + b.count) * a.channels}, wide);
    const Tensor scores = torch::stable::new_empty(a_tokens, {splits * a.batch * a.count}, wide);
    const Tensor indices = torch::stable::new_empty(a_tokens, {splits * a.batch * a.count}, ScalarType::Long);
    const Tensor filter = torch::stable::new_empty(a_tokens, {Filter(m, splits).bytes()}, ScalarType::Byte);
    DITHER_CUDA_OK(op, match_cuda(m, splits, tokens.mutable_data_ptr(), filter.mutable_data_ptr(), scores.mutable_data_ptr(),
                                  static_cast<int64_t*>(indices.mutable_data_ptr()), current_stream(a_tokens)));
  }
}
}  // namespace dither

STABLE_TORCH_LIBRARY_FRAGMENT(DITHER_NS, m) {
  m.def(
      "bipartite_match_(Tensor a, Tensor b, Tensor? a_places, Tensor? b_places, Tensor? mask, bool normalize, bool "
      "skip_diagonal, Tensor(a!) score, "
      "Tensor(b!) index) -> ()");
}
#if !defined(DITHER_EMULATE)
STABLE_TORCH_LIBRARY_IMPL(DITHER_NS, CPU, m) {
  m.impl("bipartite_match_", TORCH_BOX(&dither::bipartite_match_<dither::Device::cpu>));
}
#endif
#if defined(DITHER_CUDA) || defined(DITHER_EMULATE)
STABLE_TORCH_LIBRARY_IMPL(DITHER_NS, DITHER_CUDA_KEY, m) {
  m.impl("bipartite_match_", TORCH_BOX(&dither::bipartite_match_<dither::Device::cuda>));
}
#endif
