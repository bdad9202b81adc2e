#include "rows.h"

#include <cstring>

#include "../common/torch.h"

namespace dither {
struct Span {
  uintptr_t begin, end;
  DType type;
  Span() = default;
  Span(const void* x, int64_t numel, DType type)
      : begin(reinterpret_cast<uintptr_t>(x)), end(begin + uintptr_t(numel * size_of(type))), type(type) {}
  bool overlaps(const Span& other) const { return begin < other.end && other.begin < end; }
  bool is(const Span& other) const { return begin == other.begin && type == other.type; }
};

static DType real_type(const char* op, const char* name, const Tensor& t) {
  const auto type = float_type(t);
  DITHER_CHECK(type == DType::f32 || type == DType::f64, op, ": ", name, " is ", name_of(t.scalar_type()),
               ", expected float32 or float64");
  return *type;
}
static void check_contiguous(const char* op, const char* name, const Tensor& t) {
  DITHER_CHECK(t.is_contiguous(), op, ": ", name, " must be contiguous");
}

#if !defined(DITHER_EMULATE)
void rows_cpu(const Rows& p, bool wide) {
  const auto run = DITHER_PICK_ISA(rows_range);
  parallel(p.numel, p.seeds ? 1 << 15 : 1 << 16, [&](int64_t lo, int64_t hi) { run(p, wide, lo, hi); });
}
#endif

template <Device device>
static void rows_(const Tensors& out, const Tensors& inputs, const Tensor& coefficients, int64_t at, int64_t by,
                  const std::optional<Tensor>& seeds, int64_t draw, const std::optional<Tensor>& limit, bool divide,
                  const std::optional<Tensor>& mask) {
  const char* op = "rows_";
  Rows p{};
  DITHER_CHECK(out.size() >= 1 && out.size() <= kMaxOutputs, op, ": out has ", out.size(), " tensors, expected 1 to ",
               kMaxOutputs);
  DITHER_CHECK(inputs.size() >= 1 && inputs.size() <= kMaxInputs, op, ": inputs has ", inputs.size(),
               " tensors, expected 1 to ", kMaxInputs);
  DITHER_CHECK(by >= 0 && by <= 2, op, ": by is ", by, ", expected 0, 1 or 2");
  DITHER_CHECK(draw >= 0 && draw >> 32 == 0, op, ": draw is ", draw, ", expected 0 <= draw < 2^32");
  DITHER_CHECK(!divide || limit, op, ": limit is None, expected what to divide by");
  p.inputs = int(inputs.size());
  p.outputs = int(out.size());
  p.by = By(by);
  p.draw = uint32_t(draw);
  p.divide = divide;

  const Listed& head = inputs[0];
  const auto shape = head.sizes();
  DITHER_CHECK(!shape.empty(), op, ": inputs[0] has shape [], expected [samples, ...]");
  p.numel = head.numel();
  p.sample = shape[0] > 0 ? p.numel / shape[0] : 0;
  const int64_t samples = shape[0];
  const bool cuda = head.is_cuda();
  const int32_t home = cuda ? head.get_device_index() : 0;
  bool wide = false;
  const auto seen = [&](const Listed& t, const char* name, size_t i, const void* x) {
    const ScalarType scalar = t.scalar_type();
    const auto type = float_type(scalar);
    DITHER_CHECK(type, op, ": ", list(name, i), " is ", name_of(scalar), ", expected float32, float64, bfloat16 or float16");
    DITHER_CHECK(std::ranges::equal(t.sizes(), shape), op, ": ", list(name, i), " has shape ", shape_of(t.sizes()),
                 ", expected ", shape_of(shape), " like inputs[0]");
    DITHER_CHECK(t.is_contiguous(), op, ": ", list(name, i), " must be contiguous");
    const bool there = t.is_cuda();
    DITHER_CHECK(there == cuda && (!cuda || t.get_device_index() == home), op, ": ", list(name, i), " is on ", device_of(t),
                 ", expected ", device_of(head), " like inputs[0]");
    wide = wide || *type == DType::f64;
    return Span(x, p.numel, *type);
  };
  Span reads[kMaxInputs + 1], writes[kMaxOutputs];
  for (int r = 0; r < p.inputs; ++r) {
    p.in[r] = inputs[r].const_data_ptr();
    reads[r] = seen(inputs[r], "inputs", r, p.in[r]);
    p.in_type[r] = reads[r].type;
  }
  for (int j = 0; j < p.outputs; ++j) {
    p.out[j] = out[j].mutable_data_ptr();
    writes[j] = seen(out[j], "out", j, p.out[j]);
    p.out_type[j] = writes[j].type;
  }

  if (mask) {
    check_device(op, "mask", *mask, "inputs[0]", head);
    check_contiguous(op, "mask", *mask);
    const int64_t numel = mask->numel();
    DITHER_CHECK(mask->scalar_type() == ScalarType::Float && (numel == p.numel || numel == p.sample), op, ": mask is ",
                 name_of(mask->scalar_type()), " with ", numel, " elements, expected float32 with ", p.numel, " or ", p.sample);
    p.mask = static_cast<const float*>(mask->const_data_ptr());
    p.mask_of_sample = numel != p.numel;
  }
  const bool masked = mask.has_value();
  const int rows = 1 + p.outputs + masked, columns = p.inputs + 2;
  check_contiguous(op, "coefficients", coefficients);
  if (p.by == By::element) {
    DITHER_CHECK(coefficients.dim() == 3 && coefficients.size(0) == rows && coefficients.size(1) == columns &&
                     coefficients.size(2) == p.sample,
                 op, ": coefficients has shape ", shape_of(coefficients), ", expected [", rows, ", ", columns, ", ", p.sample,
                 "]");
  } else {
    DITHER_CHECK(coefficients.dim() == 3 && coefficients.size(1) == rows && coefficients.size(2) == columns, op,
                 ": coefficients has shape ", shape_of(coefficients), ", expected [", p.by == By::step ? "steps" : "runs", ", ",
                 rows, ", ", columns, "]");
  }
  if (p.by == By::step) {
    DITHER_CHECK(coefficients.is_cpu() && coefficients.scalar_type() == ScalarType::Double, op, ": coefficients is ",
                 name_of(coefficients.scalar_type()), " on ", device_of(coefficients), ", expected float64 on cpu");
    DITHER_CHECK(at >= 0 && at < coefficients.size(0), op, ": at is ", at, ", expected 0 <= at < ", coefficients.size(0));
    std::memcpy(p.table, static_cast<const double*>(coefficients.const_data_ptr()) + at * rows * columns,
                sizeof(double) * rows * columns);
    for (int j = 1; j < rows && !seeds; ++j)
      DITHER_CHECK(p.table[j * columns + columns - 1] == 0, op, ": seeds is None, expected seeds where coefficients[", at, ", ",
                   j, ", ", columns - 1, "] is ", p.table[j * columns + columns - 1]);
  } else {
    check_device(op, "coefficients", coefficients, "inputs[0]", head);
    p.wide_table = real_type(op, "coefficients", coefficients) == DType::f64;
    p.coefficients = coefficients.const_data_ptr();
    const int64_t runs = coefficients.size(0);
    if (p.by == By::run)
      DITHER_CHECK(p.numel == 0 || (runs > 0 && p.numel % runs == 0), op, ": coefficients has ", runs,
                   " runs, expected a divisor of the ", p.numel, " elements");
    p.run = p.by == By::run && p.numel > 0 ? p.numel / runs : 1;
  }
  if (seeds) {
    check_device(op, "seeds", *seeds, "inputs[0]", head);
    check_contiguous(op, "seeds", *seeds);
    DITHER_CHECK(seeds->scalar_type() == ScalarType::Long && seeds->numel() == samples, op, ": seeds is ",
                 name_of(seeds->scalar_type()), " with ", seeds->numel(), " elements, expected int64 with ", samples);
    p.seeds = static_cast<const int64_t*>(seeds->const_data_ptr());
    bool drawn = p.by != By::step;
    for (int j = 1; j < rows; ++j) drawn = drawn || p.table[j * columns + columns - 1] != 0;
    if (!drawn) p.seeds = nullptr;
  }
  if (limit) {
    check_device(op, "limit", *limit, "inputs[0]", head);
    check_contiguous(op, "limit", *limit);
    p.wide_limit = real_type(op, "limit", *limit) == DType::f64;
    const int64_t numel = limit->numel();
    DITHER_CHECK(numel == 1 || numel == samples, op, ": limit has ", numel, " elements, expected 1 or ", samples);
    p.limit = limit->const_data_ptr();
    p.limit_stride = numel == 1 ? 0 : 1;
  }
  if (p.numel == 0) return;

  const int others = p.inputs + masked;
  if (masked) reads[p.inputs] = Span(p.mask, p.mask_of_sample ? p.sample : p.numel, DType::f32);
  for (int j = 0; j < p.outputs; ++j) {
    for (int k = 0; k < j; ++k)
      DITHER_CHECK(!writes[j].overlaps(writes[k]), op, ": out[", j, "] shares memory with out[", k,
                   "], expected disjoint tensors");
    for (int r = 0; r < others; ++r) {
      if (!writes[j].overlaps(reads[r])) continue;
      DITHER_CHECK(r < p.inputs && writes[j].is(reads[r]), op, ": out[", j, "] shares memory with ",
                   r < p.inputs ? list("inputs", r) : "mask", ", expected ",
                   r < p.inputs ? "the same tensor or a disjoint one" : "a disjoint tensor");
      p.staged = p.outputs > 1;
    }
  }
  p.samples = p.seeds || p.limit_stride || p.mask_of_sample || p.by == By::element;
  if constexpr (device == Device::cpu) {
    rows_cpu(p, wide);
  } else {
    const auto guard = device_guard(head);
    DITHER_CUDA_OK(op, rows_cuda(p, wide, multiprocessor_count(head), current_stream(head)));
  }
}
}  // namespace dither

STABLE_TORCH_LIBRARY_FRAGMENT(DITHER_NS, m) {
  m.def(
      "rows_(Tensor(a!)[] out, Tensor[] inputs, Tensor coefficients, SymInt at, int by, Tensor? seeds, SymInt draw, Tensor? "
      "limit, bool divide, Tensor? mask) -> ()");
}
#if !defined(DITHER_EMULATE)
STABLE_TORCH_LIBRARY_IMPL(DITHER_NS, CPU, m) { m.impl("rows_", TORCH_BOX(&dither::rows_<dither::Device::cpu>)); }
#endif
#if defined(DITHER_CUDA) || defined(DITHER_EMULATE)
STABLE_TORCH_LIBRARY_IMPL(DITHER_NS, DITHER_CUDA_KEY, m) { m.impl("rows_", TORCH_BOX(&dither::rows_<dither::Device::cuda>)); }
#endif
