#include "lazy.h"

#include <cmath>

#include "../common/torch.h"

namespace dither {
static int checked_history(const char* op, const Tensor& history, int64_t steps) {
  DITHER_CHECK(history.scalar_type() == ScalarType::Double && history.dim() == 2 && history.is_contiguous() &&
                   (history.size(1) == 2 || history.size(1) == 7),
               op, ": history is ", name_of(history.scalar_type()), " of shape ", shape_of(history),
               ", expected contiguous float64 with 2 columns, or with momentum 7");
  DITHER_CHECK(0 <= steps && 2 * steps <= history.size(0), op, ": history has ", history.size(0), " rows, expected at least ",
               2 * steps, " for ", steps, " steps");
  return int(history.size(1));
}

template <Device device>
static void lazy_append_(const Tensor& history, int64_t at, const Floats& step) {
  const char* op = "lazy_append_";
  DITHER_CHECK(at >= 0, op, ": at is ", at, ", expected at least 0");
  const int width = checked_history(op, history, at + 1);
  DITHER_CHECK(step.size() == size_t(width), op, ": step has ", step.size(), " numbers, expected ", width,
               " like a row of history");
  Steps s{step[0], 0, 0, 0, step[1], 0, 0};
  if (width == 7) s = {step[0], step[1], step[2], step[3], step[4], step[5], step[6]};
  double* p = static_cast<double*>(history.mutable_data_ptr());
  if constexpr (device == Device::cpu) {
    append_steps(p, width, at, s);
  } else {
    const auto guard = device_guard(history);
    DITHER_CUDA_OK(op, append_cuda(p, width, at, s, current_stream(history)));
  }
}

template <Device device>
static void lazy_rows_(const Tensor& weight, const std::optional<Tensor>& momentum, const Tensor& last,
                       const std::optional<Tensor>& ids, const std::optional<Tensor>& gradient, const Floats& pull,
                       const Tensor& history, int64_t first, int64_t steps, bool every, const Ints& key, int64_t stream) {
  const char* op = "lazy_rows_";
  const ScalarType type = weight.scalar_type();
  LazyRows l{};
  DITHER_CHECK(type == ScalarType::Float || type == ScalarType::Double, op, ": weight is ", name_of(type),
               ", expected float32 or float64");
  DITHER_CHECK(weight.dim() == 2 && weight.is_contiguous(), op, ": weight has shape ", shape_of(weight),
               ", expected contiguous [rows, columns]");
  l.rows = weight.size(0);
  l.columns = weight.size(1);
  if (momentum) check_like(op, "momentum", *momentum, type, "weight", weight);
  const auto on_device = [&](const char* name, const Tensor& t) {
    DITHER_CHECK(device_of(t) == device_of(weight), op, ": ", name, " is on ", device_of(t), ", expected ", device_of(weight),
                 " like weight");
  };
  DITHER_CHECK(last.scalar_type() == ScalarType::Int && last.is_contiguous() && last.numel() == l.rows, op, ": last is ",
               name_of(last.scalar_type()), " with ", last.numel(), " elements, expected ", l.rows, " contiguous int32");
  on_device("last", last);
  if (ids) {
    DITHER_CHECK(ids->scalar_type() == ScalarType::Long && ids->dim() == 1 && ids->is_contiguous(), op, ": ids is ",
                 name_of(ids->scalar_type()), " of shape ", shape_of(*ids), ", expected contiguous int64 of one dimension");
    on_device("ids", *ids);
  }
  l.count = ids ? ids->numel() : l.rows;
  if (gradient) {
    DITHER_CHECK(gradient->scalar_type() == type && gradient->is_contiguous() && gradient->dim() == 2 &&
                     gradient->size(0) == l.count && gradient->size(1) == l.columns,
                 op, ": gradient is ", name_of(gradient->scalar_type()), " of shape ", shape_of(*gradient),
                 ", expected contiguous ", name_of(type), " [", l.count, ", ", l.columns, "]");
    on_device("gradient", *gradient);
  }
  DITHER_CHECK(pull.size() == 2 && std::isfinite(pull[0]) && std::isfinite(pull[1]), op, ": pull has ", pull.size(),
               " numbers, expected 2, finite");
  DITHER_CHECK(0 <= first && first <= steps && steps < (int64_t(1) << 31), op, ": first, steps are ", first, ", ", steps,
               ", expected 0 <= first <= steps < 2^31");
  DITHER_CHECK(!gradient || first < steps, op, ": a gradient needs a step, but first, steps are ", first, ", ", steps);
  l.width = checked_history(op, history, steps - first);
  DITHER_CHECK(l.width == (momentum ? 7 : 2), op, ": history has ", l.width, " columns, expected ", momentum ? 7 : 2,
               momentum ? " with momentum" : " without momentum");
  on_device("history", history);
  const int64_t numel = weight.numel();
  l.second = (numel + 255) / 256 * 256;
  l.wide = type == ScalarType::Double;
  l.address = address(op, key, stream, steps, 0, 2 * l.second, l.wide ? Kind::normal64 : Kind::normal32);
  if (l.count == 0 || l.columns == 0) return;
  l.ids = ids ? static_cast<const int64_t*>(ids->const_data_ptr()) : nullptr;
  if constexpr (device == Device::cpu)
    for (int64_t i = 0; l.ids && i < l.count; ++i)
      DITHER_CHECK(0 <= l.ids[i] && l.ids[i] < l.rows, op, ": ids[", i, "] is ", l.ids[i], ", expected 0 <= id < ", l.rows);
  l.weight = weight.mutable_data_ptr();
  l.momentum = data_or_null<void>(momentum);
  l.last = static_cast<int32_t*>(last.mutable_data_ptr());
  l.gradient = gradient ? gradient->const_data_ptr() : nullptr;
  l.history = static_cast<const double*>(history.const_data_ptr());
  l.first = first;
  l.steps = steps;
  l.pull_w = pull[0];
  l.pull_m = pull[1];
  l.chacha = key.size() == 4;
  l.every = every;
  if constexpr (device == Device::cpu) {
    const auto run = DITHER_PICK_ISA(lazy_range);
    const int64_t grain = std::max<int64_t>(1, (1 << 14) / l.columns);
    parallel(l.count, grain, [&](int64_t lo, int64_t hi) { run(l, lo, hi); });
  } else {
    const auto guard = device_guard(weight);
    DITHER_CUDA_OK(op, lazy_cuda(l, current_stream(weight)));
  }
}
}  // namespace dither

STABLE_TORCH_LIBRARY_FRAGMENT(DITHER_NS, m) {
  m.def(
      "lazy_rows_(Tensor(a!) weight, Tensor(b!)? momentum, Tensor(c!) last, Tensor? ids, Tensor? gradient, float[] pull, "
      "Tensor history, SymInt first, SymInt steps, bool every, int[] key, SymInt stream) -> ()");
  m.def("lazy_append_(Tensor(a!) history, SymInt at, float[] step) -> ()");
}
#if !defined(DITHER_EMULATE)
STABLE_TORCH_LIBRARY_IMPL(DITHER_NS, CPU, m) {
  m.impl("lazy_rows_", TORCH_BOX(&dither::lazy_rows_<dither::Device::cpu>));
  m.impl("lazy_append_", TORCH_BOX(&dither::lazy_append_<dither::Device::cpu>));
}
#endif
#if defined(DITHER_CUDA) || defined(DITHER_EMULATE)
STABLE_TORCH_LIBRARY_IMPL(DITHER_NS, DITHER_CUDA_KEY, m) {
  m.impl("lazy_rows_", TORCH_BOX(&dither::lazy_rows_<dither::Device::cuda>));
  m.impl("lazy_append_", TORCH_BOX(&dither::lazy_append_<dither::Device::cuda>));
}
#endif
