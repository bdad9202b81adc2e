#include "conv.h"

#include <memory>

#include "../common/torch.h"

namespace dither {
constexpr int64_t kWorthThreads = 1 << 17;  // products
constexpr int64_t kStreamed = 16 << 20;     // bytes that are too many to stay in a cache until they are used

static ConvAxis axis(const char* op, int64_t d, const Tensor& x, const Tensor& g, const Tensor& out, const Ints& stride,
                     const Ints& padding, const Ints& dilation) {
  DITHER_CHECK(stride[d] >= 1, op, ": stride is ", stride[d], " in dimension ", d, ", expected at least 1");
  DITHER_CHECK(padding[d] >= 0, op, ": padding is ", padding[d], " in dimension ", d, ", expected at least 0");
  DITHER_CHECK(dilation[d] >= 1, op, ": dilation is ", dilation[d], " in dimension ", d, ", expected at least 1");
  const ConvAxis a{x.size(2 + d), g.size(2 + d), out.size(3 + d), stride[d], padding[d], dilation[d]};
  DITHER_CHECK(a.kernel >= 1, op, ": out has shape ", shape_of(out), ", expected a kernel of at least 1 x 1");
  const int64_t room = a.padded() - a.dilation * (a.kernel - 1) - 1, places = room < 0 ? 0 : room / a.stride + 1;
  DITHER_CHECK(a.places == places, op, ": g has size ", a.places, " in dimension ", 2 + d, ", expected ", places,
               " of x and a kernel of ", a.kernel);
  return a;
}

template <Device device>
static void conv_sample_grads_(const Tensor& x, const Tensor& g, const Ints& stride, const Ints& padding, const Ints& dilation,
                               int64_t groups, const Tensor& out) {
  const char* op = "conv_sample_grads_";
  ConvGrads c{};
  c.type = checked_type(op, "x", x);
  DITHER_CHECK(x.dim() == 4, op, ": x has shape ", shape_of(x), ", expected [batch, channels, height, width]");
  DITHER_CHECK(g.scalar_type() == x.scalar_type(), op, ": g is ", name_of(g.scalar_type()), ", expected ",
               name_of(x.scalar_type()), " like x");
  DITHER_CHECK(g.dim() == 4 && g.size(0) == x.size(0), op, ": g has shape ", shape_of(g), ", expected [", x.size(0),
               ", outputs, rows, columns]");
  for (const auto& [name, values] : {std::pair{"stride", &stride}, {"padding", &padding}, {"dilation", &dilation}})
    DITHER_CHECK(values->size() == 2, op, ": ", name, " has ", values->size(), " integers, expected 2");
  DITHER_CHECK(groups >= 1 && x.size(1) % groups == 0 && g.size(1) % groups == 0, op, ": groups is ", groups,
               ", expected a divisor of ", x.size(1), " channels and of ", g.size(1), " outputs");
  DITHER_CHECK(out.scalar_type() == x.scalar_type() || (size_of(c.type) == 2 && out.scalar_type() == ScalarType::Float), op,
               ": out is ", name_of(out.scalar_type()), ", expected ", name_of(x.scalar_type()), " like x",
               size_of(c.type) == 2 ? " or float32" : "");
  DITHER_CHECK(out.dim() == 5 && out.size(0) == x.size(0) && out.size(1) == g.size(1) && out.size(2) == x.size(1) / groups &&
                   out.is_contiguous(),
               op, ": out has shape ", shape_of(out), out.is_contiguous() ? "" : " and is not contiguous",
               ", expected contiguous [", x.size(0), ", ", g.size(1), ", ", x.size(1) / groups, ", height, width]");
  for (const auto& [name, t] : {std::pair{"g", &g}, {"out", &out}})
    DITHER_CHECK(device_of(*t) == device_of(x), op, ": ", name, " is on ", device_of(*t), ", expected ", device_of(x),
                 " like x");
  c.rows = axis(op, 0, x, g, out, stride, padding, dilation);
  c.columns = axis(op, 1, x, g, out, stride, padding, dilation);
  if (out.numel() == 0) return;
  if (g.numel() == 0) {
    torch::stable::fill_(const_cast<Tensor&>(out), 0.0);
    return;
  }
  const Tensor inputs = x.is_contiguous() ? x : torch::stable::contiguous(x);
  const Tensor grads = g.is_contiguous() ? g : torch::stable::contiguous(g);
  c.x = inputs.const_data_ptr();
  c.g = grads.const_data_ptr();
  c.out = out.mutable_data_ptr();
  c.batch = x.size(0);
  c.groups = groups;
  c.channels = x.size(1) / groups;
  c.outputs = g.size(1) / groups;
  c.out_type = *float_type(out);
  c.stream_out = out.numel() * size_of(c.out_type) >= kStreamed && reinterpret_cast<uintptr_t>(c.out) % 64 == 0 &&
                 c.weights() * size_of(c.out_type) % 64 == 0;
  if constexpr (device == Device::cpu) {
    const auto run = DITHER_PICK_ISA(conv_units);
    const int64_t lanes = 4 << int(capability());
    c.mixed = groups > 1 && 4 * c.outputs <= lanes;  // few of a group leave most lanes empty
    const int64_t work = c.weights() * std::min(kConvOutputs, c.together() * c.outputs) * c.places();
    parallel(c.units(), std::max<int64_t>(1, kWorthThreads / work), [&](int64_t lo, int64_t hi) {
      const std::unique_ptr<double[]> scratch(new double[conv_scratch(c)]());
      run(c, lo, hi, scratch.get());
    });
  } else {
    const auto guard = device_guard(x);
    DITHER_CUDA_OK(op, conv_cuda(c, current_stream(x)));
  }
}
}  // namespace dither

STABLE_TORCH_LIBRARY_FRAGMENT(DITHER_NS, m) {
  m.def(
      "conv_sample_grads_(Tensor x, Tensor g, int[] stride, int[] padding, int[] dilation, int groups, Tensor(a!) out) -> ()");
}
#if !defined(DITHER_EMULATE)
STABLE_TORCH_LIBRARY_IMPL(DITHER_NS, CPU, m) {
  m.impl("conv_sample_grads_", TORCH_BOX(&dither::conv_sample_grads_<dither::Device::cpu>));
}
#endif
#if defined(DITHER_CUDA) || defined(DITHER_EMULATE)
STABLE_TORCH_LIBRARY_IMPL(DITHER_NS, DITHER_CUDA_KEY, m) {
  m.impl("conv_sample_grads_", TORCH_BOX(&dither::conv_sample_grads_<dither::Device::cuda>));
}
#endif
