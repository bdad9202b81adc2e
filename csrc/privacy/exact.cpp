#include "exact.h"

#include <cmath>

#include "../common/torch.h"

namespace dither {
static void check_sum(const char* op, const Tensor& sum) {
  DITHER_CHECK(sum.scalar_type() == ScalarType::Long && sum.dim() == 1 && sum.is_contiguous(), op, ": sum is ",
               name_of(sum.scalar_type()), " of shape ", shape_of(sum), ", expected contiguous int64 of one dimension");
}

template <Device device>
static void exact_accumulate_(const Tensor& sum, const Tensor& rows, const Tensor& factor, double grid) {
  const char* op = "exact_accumulate_";
  check_sum(op, sum);
  Accumulate a{};
  a.type = checked_type(op, "rows", rows);
  DITHER_CHECK(rows.dim() == 2 && rows.size(1) == sum.numel(), op, ": rows has shape ", shape_of(rows), ", expected [any, ",
               sum.numel(), "]");
  DITHER_CHECK(rows.stride(1) == 1 || rows.size(1) <= 1, op, ": rows has stride ", rows.stride(1),
               " in its last dimension, expected 1");
  DITHER_CHECK(device_of(rows) == device_of(sum), op, ": rows is on ", device_of(rows), ", expected ", device_of(sum),
               " like sum");
  const ScalarType type = factor.scalar_type();
  DITHER_CHECK((type == ScalarType::Float || type == ScalarType::Double) && factor.is_contiguous() && factor.dim() == 1 &&
                   factor.numel() == rows.size(0),
               op, ": factor is ", name_of(type), " of shape ", shape_of(factor),
               ", expected contiguous float32 or float64 with ", rows.size(0), " elements");
  DITHER_CHECK(device_of(factor) == device_of(sum), op, ": factor is on ", device_of(factor), ", expected ", device_of(sum),
               " like sum");
  int exponent = 0;
  DITHER_CHECK(std::isfinite(grid) && grid > 0 && std::frexp(grid, &exponent) == 0.5 && std::abs(exponent) <= 500, op,
               ": grid is ", grid, ", expected a power of 2 between 2^-500 and 2^500");
  if (rows.numel() == 0) return;
  a.sum = static_cast<int64_t*>(sum.mutable_data_ptr());
  a.rows = rows.const_data_ptr();
  a.factor = factor.const_data_ptr();
  a.per_grid = 1.0 / grid;
  a.count = rows.size(0);
  a.columns = rows.size(1);
  a.pitch = rows.stride(0);
  a.wide_factor = type == ScalarType::Double;
  if constexpr (device == Device::cpu) {
    const auto run = DITHER_PICK_ISA(accumulate_range);
    const int64_t grain = std::max<int64_t>(1024, (1 << 16) / a.count);
    parallel(a.columns, grain, [&](int64_t lo, int64_t hi) { run(a, lo, hi); });
  } else {
    const auto guard = device_guard(sum);
    DITHER_CUDA_OK(op, accumulate_cuda(a, current_stream(sum)));
  }
}

template <Device device>
static void exact_noise_(const Tensor& sum, double std, const Ints& key, int64_t stream, int64_t step, int64_t start) {
  const char* op = "exact_noise_";
  check_sum(op, sum);
  DITHER_CHECK(std >= 0 && std <= 0x1p40, op, ": std is ", std, ", expected 0 <= std <= 2^40");
  DITHER_CHECK(key.size() == 4, op, ": key has ", key.size(), " integers, expected 4 (chacha20)");
  const ExactNoise x{static_cast<int64_t*>(sum.mutable_data_ptr()),
                     address(op, key, stream, step, start, sum.numel(), Kind::normal64), std, start};
  if (sum.numel() == 0) return;
  if constexpr (device == Device::cpu) {
    const auto run = DITHER_PICK_ISA(exact_noise_range);
    parallel(sum.numel(), 1 << 13, [&](int64_t lo, int64_t hi) { run(x, lo, hi); });
  } else {
    const auto guard = device_guard(sum);
    DITHER_CUDA_OK(op, exact_noise_cuda(x, sum.numel(), current_stream(sum)));
  }
}
}  // namespace dither

STABLE_TORCH_LIBRARY_FRAGMENT(DITHER_NS, m) {
  m.def("exact_accumulate_(Tensor(a!) sum, Tensor rows, Tensor factor, float grid) -> ()");
  m.def("exact_noise_(Tensor(a!) sum, float std, int[] key, SymInt stream, SymInt step, SymInt start) -> ()");
}
#if !defined(DITHER_EMULATE)
STABLE_TORCH_LIBRARY_IMPL(DITHER_NS, CPU, m) {
  m.impl("exact_accumulate_", TORCH_BOX(&dither::exact_accumulate_<dither::Device::cpu>));
  m.impl("exact_noise_", TORCH_BOX(&dither::exact_noise_<dither::Device::cpu>));
}
#endif
#if defined(DITHER_CUDA) || defined(DITHER_EMULATE)
STABLE_TORCH_LIBRARY_IMPL(DITHER_NS, DITHER_CUDA_KEY, m) {
  m.impl("exact_accumulate_", TORCH_BOX(&dither::exact_accumulate_<dither::Device::cuda>));
  m.impl("exact_noise_", TORCH_BOX(&dither::exact_noise_<dither::Device::cuda>));
}
#endif
