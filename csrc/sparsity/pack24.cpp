#include "pack24.h"
#include "select.h"

#include "../common/torch.h"

namespace dither {
static void check_dense24(const char* op, const Tensor& dense) {
  const bool half = dense.scalar_type() == ScalarType::Half || dense.scalar_type() == ScalarType::BFloat16;
  DITHER_CHECK(half, op, ": dense is ", name_of(dense.scalar_type()), ", expected bfloat16 or float16");
  DITHER_CHECK(dense.dim() == 2 && dense.is_contiguous() && dense.size(0) % 32 == 0 && dense.size(1) % 32 == 0, op,
               ": dense has shape ", shape_of(dense), dense.is_contiguous() ? "" : " and is not contiguous",
               ", expected a contiguous matrix, sizes multiples of 32");
}
static void check_packed(const char* op, const Tensor& values, const Tensor& indices, const Tensor& dense) {
  const int64_t rows = dense.size(0), columns = dense.size(1);
  DITHER_CHECK(values.scalar_type() == dense.scalar_type() && values.is_contiguous() && values.dim() == 2 &&
                   values.size(0) == rows && values.size(1) == columns / 2,
               op, ": values is ", name_of(values.scalar_type()), " of shape ", shape_of(values), ", expected contiguous ",
               name_of(dense.scalar_type()), " of shape [", rows, ", ", columns / 2, "]");
  DITHER_CHECK(indices.scalar_type() == ScalarType::Short && indices.is_contiguous() && indices.dim() == 2 &&
                   indices.size(0) == rows && indices.size(1) == columns / 16,
               op, ": indices is ", name_of(indices.scalar_type()), " of shape ", shape_of(indices),
               ", expected contiguous int16 of shape [", rows, ", ", columns / 16, "]");
  for (const Tensor* t : {&values, &indices})
    DITHER_CHECK(device_of(*t) == device_of(dense), op, ": values, indices are on ", device_of(values), ", ",
                 device_of(indices), ", expected ", device_of(dense), " like dense");
}
// body(i, place): sixteen elements and the place of their indices.
template <class Body>
static void for_each_sixteen(const Tensor& dense, const Body& body) {
  const int64_t rows = dense.size(0), across = dense.size(1) / 16;
  parallel(rows, std::max<int64_t>(1, 1024 / across), [&](int64_t lo, int64_t hi) {
    for (int64_t r = lo; r < hi; ++r) {
      const int64_t place[2] = {place_in_pair(r, 0), place_in_pair(r, 1)};
      for (int64_t c = 0; c < across; ++c) body(r * across + c, c / 2 * 2 * rows + place[c % 2]);
    }
  });
}

template <Device device>
static void pack24_(const Tensor& dense, const std::optional<Tensor>& bits, const Tensor& values, const Tensor& indices) {
  const char* op = "pack24_";
  check_dense24(op, dense);
  check_packed(op, values, indices, dense);
  if (bits) check_bits(op, *bits, dense);
  if (dense.numel() == 0) return;
  Pack24 p{static_cast<const uint16_t*>(dense.const_data_ptr()),
           bits ? static_cast<const uint8_t*>(bits->const_data_ptr()) : nullptr,
           static_cast<uint16_t*>(values.mutable_data_ptr()),
           static_cast<uint16_t*>(indices.mutable_data_ptr()),
           dense.size(0),
           dense.size(1),
           int32_t(dense.scalar_type() == ScalarType::Half ? kNan<float16> : kNan<bfloat16>)};
  if constexpr (device == Device::cpu) {
    std::vector<uint8_t> selected;
    if (!p.bits) {  // vectors select faster than this loop
      selected.resize(dense.numel() / 8);
      Select s{};
      s.w = p.dense;
      s.bits = selected.data();
      s.panels = s.groups = dense.numel() / 4;
      s.inner = 1;
      s.n = 2;
      s.m = 4;
      s.type = *float_type(dense);
      const auto run = DITHER_PICK_ISA(select_units);
      parallel(units(s), 4, [&](int64_t lo, int64_t hi) { run(s, lo, hi); });
      p.bits = selected.data();
    }
    for_each_sixteen(dense, [&](int64_t i, int64_t place) { p.indices[place] = pack16(p, i); });
  } else {
    const auto guard = device_guard(dense);
    DITHER_CUDA_OK(op, pack24_cuda(p, current_stream(dense)));
  }
}

template <Device device>
static void unpack24_(const Tensor& dense, const Tensor& values, const Tensor& indices) {
  const char* op = "unpack24_";
  check_dense24(op, dense);
  check_packed(op, values, indices, dense);
  if (dense.numel() == 0) return;
  const Unpack24 p{static_cast<const uint16_t*>(values.const_data_ptr()),
                   static_cast<const uint16_t*>(indices.const_data_ptr()), static_cast<uint16_t*>(dense.mutable_data_ptr()),
                   dense.size(0), dense.size(1)};
  if constexpr (device == Device::cpu) {
    for_each_sixteen(dense, [&](int64_t i, int64_t place) { unpack16(p, i, p.indices[place]); });
  } else {
    const auto guard = device_guard(dense);
    DITHER_CUDA_OK(op, unpack24_cuda(p, current_stream(dense)));
  }
}
}  // namespace dither

STABLE_TORCH_LIBRARY_FRAGMENT(DITHER_NS, m) {
  m.def("pack24_(Tensor dense, Tensor? bits, Tensor(a!) values, Tensor(b!) indices) -> ()");
  m.def("unpack24_(Tensor(a!) dense, Tensor values, Tensor indices) -> ()");
}
#if !defined(DITHER_EMULATE)
STABLE_TORCH_LIBRARY_IMPL(DITHER_NS, CPU, m) {
  m.impl("pack24_", TORCH_BOX(&dither::pack24_<dither::Device::cpu>));
  m.impl("unpack24_", TORCH_BOX(&dither::unpack24_<dither::Device::cpu>));
}
#endif
#if defined(DITHER_CUDA) || defined(DITHER_EMULATE)
STABLE_TORCH_LIBRARY_IMPL(DITHER_NS, DITHER_CUDA_KEY, m) {
  m.impl("pack24_", TORCH_BOX(&dither::pack24_<dither::Device::cuda>));
  m.impl("unpack24_", TORCH_BOX(&dither::unpack24_<dither::Device::cuda>));
}
#endif
