// What the operators of this family ask of their tensors.
#pragma once
#include "../common/torch.h"

namespace dither {
inline std::string shape_of(const Tensor& t) {
  std::string s = "[";
  for (int64_t d = 0; d < t.dim(); ++d) s += (d ? ", " : "") + std::to_string(t.size(d));
  return s + "]";
}
inline DType checked_type(const char* op, const char* name, const Tensor& t) {
  const auto type = float_type(t);
  DITHER_CHECK(type, op, ": ", name, " is ", name_of(t.scalar_type()), ", expected float32, float64, bfloat16 or float16");
  return *type;
}
inline void check_dense(const char* op, const char* name, const Tensor& t) {
  const auto sizes = t.sizes(), strides = t.strides();
  DITHER_CHECK(t.is_contiguous() || memory_of({sizes.data(), sizes.size()}, {strides.data(), strides.size()}) == Memory::dense,
               op, ": ", name, " leaves gaps in its memory or overlaps itself, expected a dense tensor");
}
// Of the shape, device and strides of w.
inline void check_like(const char* op, const char* name, const Tensor& t, ScalarType type, const char* other, const Tensor& w) {
  DITHER_CHECK(t.scalar_type() == type, op, ": ", name, " is ", name_of(t.scalar_type()), ", expected ", name_of(type));
  DITHER_CHECK(device_of(t) == device_of(w), op, ": ", name, " is on ", device_of(t), ", expected ", device_of(w), " like ",
               other);
  bool same = t.dim() == w.dim();
  for (int64_t d = 0; same && d < w.dim(); ++d) same = t.size(d) == w.size(d);
  DITHER_CHECK(same, op, ": ", name, " has shape ", shape_of(t), ", expected ", shape_of(w), " like ", other);
  for (int64_t d = 0; same && d < w.dim(); ++d) same = w.size(d) <= 1 || t.stride(d) == w.stride(d);
  DITHER_CHECK(same || w.numel() <= 1, op, ": ", name, " has other strides than ", other, ", expected the same");
}
inline void check_bits(const char* op, const Tensor& bits, const Tensor& w) {
  const int64_t size = (w.numel() + 7) / 8;
  DITHER_CHECK(bits.scalar_type() == ScalarType::Byte && bits.is_contiguous() && bits.numel() == size, op, ": bits is ",
               name_of(bits.scalar_type()), " with ", bits.numel(), " elements, expected ", size,
               " contiguous uint8, one bit per element");
  DITHER_CHECK(device_of(bits) == device_of(w), op, ": bits is on ", device_of(bits), ", expected ", device_of(w));
}
template <class T>
T* data_or_null(const std::optional<Tensor>& t) {
  return t ? static_cast<T*>(t->mutable_data_ptr()) : nullptr;
}
}  // namespace dither
