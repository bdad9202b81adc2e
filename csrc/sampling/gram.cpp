#include "gram.h"

#include "../common/torch.h"

namespace dither {
template <Device device>
static void gram_(const Tensor& out, const Tensors& inputs) {
  const char* op = "gram_";
  Gram g{};
  DITHER_CHECK(inputs.size() >= 1 && inputs.size() <= kGramInputs, op, ": inputs has ", inputs.size(),
               " tensors, expected 1 to ", kGramInputs);
  g.inputs = int(inputs.size());
  const Tensor head = inputs[0];
  const auto shape = inputs[0].sizes();
  DITHER_CHECK(!shape.empty(), op, ": inputs[0] has shape [], expected [samples, ...]");
  g.samples = shape[0];
  g.sample = 1;
  for (const int64_t size : shape.subspan(1)) g.sample *= size;
  for (int r = 0; r < g.inputs; ++r) {
    const std::string name = list("inputs", r);
    const Listed& x = inputs[r];
    g.type[r] = checked_type(op, name.c_str(), x);
    DITHER_CHECK(std::ranges::equal(x.sizes(), shape), op, ": ", name, " has shape ", shape_of(x.sizes()), ", expected ",
                 shape_of(shape), " like inputs[0]");
    DITHER_CHECK(x.is_contiguous(), op, ": ", name, " must be contiguous");
    check_device(op, name.c_str(), x, "inputs[0]", head);
    g.x[r] = x.const_data_ptr();
  }
  check_out(op, "out", out, ScalarType::Double, {g.samples, g.inputs, g.inputs + 1}, "inputs[0]", head);
  if (g.samples == 0) return;
  double* to = static_cast<double*>(out.mutable_data_ptr());
  const int sums = gram_sums(g.inputs);
  const int64_t chunks = g.chunks();
  if constexpr (device == Device::cpu) {
    const auto chunk_of = DITHER_PICK_ISA(gram_chunk);
    std::vector<double> partial(g.samples * chunks * sums);
    parallel(g.samples * chunks, 8, [&](int64_t lo, int64_t hi) {
      for (int64_t c = lo; c < hi; ++c) chunk_of(g, c / chunks, c % chunks, &partial[c * sums]);
    });
    for (int64_t b = 0; b < g.samples; ++b)
      for (int i = 0; i < sums; ++i) {
        double lane[kGramTotalLanes] = {};
        for (int64_t c = 0; c < chunks; ++c) lane[c % kGramTotalLanes] += partial[(b * chunks + c) * sums + i];
        for (int half = kGramTotalLanes / 2; half > 0; half /= 2)
          for (int k = 0; k < half; ++k) lane[k] += lane[k + half];
        put_sum(g.inputs, i, lane[0], to + b * g.inputs * (g.inputs + 1));
      }
  } else {
    DITHER_CHECK(g.samples * std::max<int64_t>(chunks, sums) >> 31 == 0, op, ": inputs[0] has ", g.samples, " samples of ",
                 g.sample, " elements, expected less than 2^31 chunks of ", kGramChunk);
    const auto guard = device_guard(head);
    const Tensor partial = torch::stable::new_empty(head, {g.samples * chunks * sums}, ScalarType::Double);
    DITHER_CUDA_OK(op, gram_cuda(g, static_cast<double*>(partial.mutable_data_ptr()), to, current_stream(head)));
  }
}
}  // namespace dither

STABLE_TORCH_LIBRARY_FRAGMENT(DITHER_NS, m) { m.def("gram_(Tensor(a!) out, Tensor[] inputs) -> ()"); }
#if !defined(DITHER_EMULATE)
STABLE_TORCH_LIBRARY_IMPL(DITHER_NS, CPU, m) { m.impl("gram_", TORCH_BOX(&dither::gram_<dither::Device::cpu>)); }
#endif
#if defined(DITHER_CUDA) || defined(DITHER_EMULATE)
STABLE_TORCH_LIBRARY_IMPL(DITHER_NS, DITHER_CUDA_KEY, m) { m.impl("gram_", TORCH_BOX(&dither::gram_<dither::Device::cuda>)); }
#endif
