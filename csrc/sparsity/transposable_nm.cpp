#include "transposable_nm.h"

#include "../common/torch.h"

namespace dither {
template <Device device>
static void transposable_nm_(const Tensor& w, int64_t n, int64_t m, int64_t iterations, const Tensor& keep) {
  const char* op = "transposable_nm_";
  TransposableNM t{};
  t.type = checked_type(op, "w", w);
  DITHER_CHECK(1 <= n && n <= m && m <= kMostSide, op, ": n:m is ", n, ":", m, ", expected 1 <= n <= m <= ", kMostSide);
  DITHER_CHECK(0 <= iterations && iterations < int64_t(1) << 31, op, ": iterations is ", iterations, ", expected 0 or more");
  DITHER_CHECK(w.dim() == 2 && w.is_contiguous() && w.size(0) % m == 0 && w.size(1) % m == 0, op, ": w has shape ", shape_of(w),
               w.is_contiguous() ? "" : " and is not contiguous", ", expected a contiguous matrix of multiples of ", m);
  check_like(op, "keep", keep, ScalarType::Bool, "w", w);
  if (w.numel() == 0) return;
  t.w = w.const_data_ptr();
  t.keep = static_cast<uint8_t*>(keep.mutable_data_ptr());
  t.rows = w.size(0);
  t.columns = w.size(1);
  t.n = int(n);
  t.m = int(m);
  t.iterations = int(iterations);
  if constexpr (device == Device::cpu) {
    const auto run = DITHER_PICK_ISA(transposable_nm_range);
    constexpr int64_t kGroup = 16;  // tiles that fill vectors
    parallel((t.tiles() + kGroup - 1) / kGroup, 1,
             [&](int64_t lo, int64_t hi) { run(t, lo * kGroup, std::min(hi * kGroup, t.tiles())); });
  } else {
    const auto guard = device_guard(w);
    DITHER_CUDA_OK(op, transposable_nm_cuda(t, current_stream(w)));
  }
}
}  // namespace dither

STABLE_TORCH_LIBRARY_FRAGMENT(DITHER_NS, m) {
  m.def("transposable_nm_(Tensor w, int n, int m, int iterations, Tensor(a!) keep) -> ()");
}
#if !defined(DITHER_EMULATE)
STABLE_TORCH_LIBRARY_IMPL(DITHER_NS, CPU, m) {
  m.impl("transposable_nm_", TORCH_BOX(&dither::transposable_nm_<dither::Device::cpu>));
}
#endif
#if defined(DITHER_CUDA) || defined(DITHER_EMULATE)
STABLE_TORCH_LIBRARY_IMPL(DITHER_NS, DITHER_CUDA_KEY, m) {
  m.impl("transposable_nm_", TORCH_BOX(&dither::transposable_nm_<dither::Device::cuda>));
}
#endif
