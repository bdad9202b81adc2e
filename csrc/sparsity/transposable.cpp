#include "transposable.h"

#include <cstring>

#include "../common/torch.h"

namespace dither {
template <Device device>
static void transposable_(const Tensor& w, bool exact, const std::optional<Tensor>& bits, const std::optional<Tensor>& keep) {
  const char* op = "transposable_";
  Transposable t{};
  t.type = checked_type(op, "w", w);
  DITHER_CHECK(w.dim() == 2 && w.is_contiguous() && w.size(0) % 4 == 0 && w.size(1) % 4 == 0, op, ": w has shape ", shape_of(w),
               w.is_contiguous() ? "" : " and is not contiguous", ", expected a contiguous matrix of multiples of 4");
  if (bits) check_bits(op, *bits, w);
  if (keep) check_like(op, "keep", *keep, ScalarType::Bool, "w", w);
  if (w.numel() == 0) return;
  t.w = w.const_data_ptr();
  t.bits = data_or_null<uint8_t>(bits);
  t.keep = data_or_null<uint8_t>(keep);
  t.rows = w.size(0);
  t.columns = w.size(1);
  t.exact = exact;
  if constexpr (device == Device::cpu) {
    if (t.bits && t.columns % 8) std::memset(t.bits, 0, bits->numel());
    const auto run = DITHER_PICK_ISA(transposable_range);
    parallel(t.rows / 4, std::max<int64_t>(1, 16384 / t.columns), [&](int64_t lo, int64_t hi) { run(t, lo, hi); });
  } else {
    const auto guard = device_guard(w);
    std::optional<Tensor> scratch;
    if (t.bits && !t.keep && t.columns % 8) {
      scratch = torch::stable::new_empty(w, {w.numel()}, ScalarType::Bool);
      t.keep = data_or_null<uint8_t>(scratch);
    }
    DITHER_CUDA_OK(op, transposable_cuda(t, current_stream(w)));
  }
}
}  // namespace dither

STABLE_TORCH_LIBRARY_FRAGMENT(DITHER_NS, m) {
  m.def("transposable_(Tensor w, bool exact, Tensor(a!)? bits, Tensor(b!)? keep) -> ()");
}
#if !defined(DITHER_EMULATE)
STABLE_TORCH_LIBRARY_IMPL(DITHER_NS, CPU, m) {
  m.impl("transposable_", TORCH_BOX(&dither::transposable_<dither::Device::cpu>));
}
#endif
#if defined(DITHER_CUDA) || defined(DITHER_EMULATE)
STABLE_TORCH_LIBRARY_IMPL(DITHER_NS, DITHER_CUDA_KEY, m) {
  m.impl("transposable_", TORCH_BOX(&dither::transposable_<dither::Device::cuda>));
}
#endif
