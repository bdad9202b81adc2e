#include "select.h"

#include <cmath>
#include <cstring>

#include "../common/torch.h"

namespace dither {
// A number that may live on the device: its value, or where to read it there.
static void number(const char* op, const char* name, const std::optional<Tensor>& t, const Tensor& w, double& value,
                   const float*& on_device) {
  if (t) {
    DITHER_CHECK(t->scalar_type() == ScalarType::Float && t->numel() == 1, op, ": ", name, " is ", name_of(t->scalar_type()),
                 " with ", t->numel(), " elements, expected one float32");
    const float* x = static_cast<const float*>(t->const_data_ptr());
    if (t->is_cpu() && !kEmulated) {
      value = double(*x);
    } else {
      DITHER_CHECK(device_of(*t) == device_of(w), op, ": ", name, " is on ", device_of(*t), ", expected ", device_of(w));
      on_device = x;
      return;
    }
  }
  DITHER_CHECK(std::isfinite(value), op, ": ", name, " is ", value, ", expected a finite number");
}

// Memory from which an output is too large to stay in a cache until it is used.
constexpr int64_t kStreamed = 16 << 20;

template <Device device>
static void nm_select_(const Tensor& w, const std::optional<Tensor>& factor, int64_t n, int64_t m, int64_t dim, double beta,
                       const std::optional<Tensor>& beta_tensor, const std::optional<Tensor>& out,
                       const std::optional<Tensor>& bits, const std::optional<Tensor>& keep) {
  const char* op = "nm_select_";
  Select s{};
  s.type = checked_type(op, "w", w);
  DITHER_CHECK(2 <= m && m <= kMostGroup, op, ": m is ", m, ", expected 2 <= m <= ", kMostGroup);
  DITHER_CHECK(1 <= n && n <= m, op, ": n is ", n, ", expected 1 <= n <= m = ", m);
  DITHER_CHECK(-w.dim() <= dim && dim < w.dim(), op, ": dim is ", dim, ", expected ", -w.dim(), " <= dim < ", w.dim());
  dim += dim < 0 ? w.dim() : 0;
  const int64_t size = w.size(dim);
  DITHER_CHECK(size % m == 0, op, ": w has size ", size, " in dimension ", dim, ", expected a multiple of m = ", m);
  check_dense(op, "w", w);
  if (factor) {
    const ScalarType type = s.type == DType::f64 ? ScalarType::Double : ScalarType::Float;
    DITHER_CHECK(factor->scalar_type() == type && factor->is_contiguous() && factor->numel() == size, op, ": factor is ",
                 name_of(factor->scalar_type()), " with ", factor->numel(), " elements, expected ", size, " contiguous ",
                 name_of(type));
    DITHER_CHECK(device_of(*factor) == device_of(w), op, ": factor is on ", device_of(*factor), ", expected ", device_of(w),
                 " like w");
  }
  if (out) check_like(op, "out", *out, w.scalar_type(), "w", w);
  if (keep) check_like(op, "keep", *keep, ScalarType::Bool, "w", w);
  if (bits) check_bits(op, *bits, w);
  s.beta = beta;
  number(op, "beta", beta_tensor, w, s.beta, s.beta_on_device);
  if (w.numel() == 0) return;

  s.w = w.const_data_ptr();
  s.factor = factor ? factor->const_data_ptr() : nullptr;
  s.out = data_or_null<void>(out);
  DITHER_CHECK(s.out != s.w || has_own_kernel(int(m)), op, ": out is w, expected another tensor where m is ", m,
               " (4, 8, 16 and 32 may be in place)");
  s.bits = data_or_null<uint8_t>(bits);
  s.keep = data_or_null<uint8_t>(keep);
  s.n = int(n);
  s.m = int(m);
  s.inner = w.stride(dim);
  s.panels = w.numel() / (m * s.inner);
  s.groups = size / m;
  s.stream_out = w.numel() * size_of(s.type) >= kStreamed && s.out != s.w && reinterpret_cast<uintptr_t>(s.out) % 64 == 0;
  if constexpr (device == Device::cpu) {
    if (s.bits) {  // shared bytes are or-ed into
      const bool rows_share = (in_parts(s.inner, s.m) && s.inner % 8) || s.m % 4;
      std::memset(rows_share ? s.bits : s.bits + bits->numel() - 1, 0, rows_share ? bits->numel() : 1);
    }
    const auto run = DITHER_PICK_ISA(select_units);
    parallel(units(s), w.numel() < kStreamed / 64 ? units(s) : 4, [&](int64_t lo, int64_t hi) { run(s, lo, hi); });
  } else {
    const auto guard = device_guard(w);
    std::optional<Tensor> scratch;
    if (s.bits && !s.keep && bits_need_keep(s)) {
      scratch = torch::stable::new_empty(w, {w.numel()}, ScalarType::Bool);
      s.keep = data_or_null<uint8_t>(scratch);
    }
    DITHER_CUDA_OK(op, select_cuda(s, current_stream(w)));
  }
}

template <Device device>
static void masked_blend_(const Tensor& out, const std::optional<Tensor>& a, const std::optional<Tensor>& b, const Tensor& bits,
                          double scale, const std::optional<Tensor>& scale_tensor, double lamb) {
  const char* op = "masked_blend_";
  Blend x{};
  x.type = checked_type(op, "out", out);
  check_dense(op, "out", out);
  if (a) check_like(op, "a", *a, out.scalar_type(), "out", out);
  if (b) check_like(op, "b", *b, out.scalar_type(), "out", out);
  check_bits(op, bits, out);
  x.scale = scale;
  x.lamb = lamb;
  number(op, "scale", scale_tensor, out, x.scale, x.scale_on_device);
  DITHER_CHECK(std::isfinite(lamb), op, ": lamb is ", lamb, ", expected a finite number");
  if (out.numel() == 0) return;
  x.out = out.mutable_data_ptr();
  x.a = a ? a->const_data_ptr() : x.out;
  x.b = b ? b->const_data_ptr() : nullptr;
  x.bits = static_cast<const uint8_t*>(bits.const_data_ptr());
  x.numel = out.numel();
  x.stream_out = x.numel * size_of(x.type) >= kStreamed && x.out != x.a && reinterpret_cast<uintptr_t>(x.out) % 64 == 0;
  if constexpr (device == Device::cpu) {
    const auto run = DITHER_PICK_ISA(blend_range);
    constexpr int64_t unit = 4096;
    parallel((x.numel + unit - 1) / unit, 16, [&](int64_t lo, int64_t hi) { run(x, lo * unit, std::min(x.numel, hi * unit)); });
  } else {
    const auto guard = device_guard(out);
    DITHER_CUDA_OK(op, blend_cuda(x, current_stream(out)));
  }
}
}  // namespace dither

STABLE_TORCH_LIBRARY_FRAGMENT(DITHER_NS, m) {
  m.def(
      "nm_select_(Tensor w, Tensor? factor, int n, int m, int dim, float beta, Tensor? beta_tensor, Tensor(a!)? out, "
      "Tensor(b!)? bits, Tensor(c!)? keep) -> ()");
  m.def(
      "masked_blend_(Tensor(a!) out, Tensor? a, Tensor? b, Tensor bits, float scale, Tensor? scale_tensor, float lamb) -> ()");
}
#if !defined(DITHER_EMULATE)
STABLE_TORCH_LIBRARY_IMPL(DITHER_NS, CPU, m) {
  m.impl("nm_select_", TORCH_BOX(&dither::nm_select_<dither::Device::cpu>));
  m.impl("masked_blend_", TORCH_BOX(&dither::masked_blend_<dither::Device::cpu>));
}
#endif
#if defined(DITHER_CUDA) || defined(DITHER_EMULATE)
STABLE_TORCH_LIBRARY_IMPL(DITHER_NS, DITHER_CUDA_KEY, m) {
  m.impl("nm_select_", TORCH_BOX(&dither::nm_select_<dither::Device::cuda>));
  m.impl("masked_blend_", TORCH_BOX(&dither::masked_blend_<dither::Device::cuda>));
}
#endif
