// The only header that knows torch. Stable ABI: one build runs on every torch >= 2.10.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <span>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "address.h"
#include "dtype.h"
#include "stream.h"

// Python's lock, where there is a Python.
extern "C" __attribute__((weak)) int Py_IsInitialized(void);
extern "C" __attribute__((weak)) int PyGILState_Ensure(void);
extern "C" __attribute__((weak)) void PyGILState_Release(int);

// Present only in CUDA builds of torch; null on a CPU build, where no CUDA tensor can exist.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

// A RuntimeError of just this text: STD_TORCH_CHECK would put the path of the build before it.
#define DITHER_CHECK(condition, ...)                                         \
  do {                                                                       \
    if (!(condition)) throw std::runtime_error(::dither::text(__VA_ARGS__)); \
  } while (0)
#define DITHER_CUDA_OK(op, call)                            \
  do {                                                      \
    const int error_ = (call);                              \
    DITHER_CHECK(error_ == 0, op, ": CUDA error ", error_); \
  } while (0)

// The same CUDA sources, run on CPU fibers under another namespace, serve the tests.
#if defined(DITHER_EMULATE)
#define DITHER_NS dither_emu
#define DITHER_CUDA_KEY CPU
#else
#define DITHER_NS dither
#define DITHER_CUDA_KEY CUDA
#endif

namespace dither {
template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Ints = std::vector<int64_t>;
using Floats = std::vector<double>;

// A tensor of an argument list. A torch::stable::Tensor allocates and asks several questions where torch is asked one here:
// with a thousand small tensors that is half the time of a step.
class Listed {
 public:
  explicit Listed(AtenTensorHandle handle) : handle_(handle) {}
  operator Tensor() const {
    AtenTensorHandle copy;
    TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(handle_, &copy));
    return Tensor(copy);
  }
  AtenTensorHandle get() const { return handle_; }
  std::span<const int64_t> sizes() const { return {ask<int64_t*>(aoti_torch_get_sizes), size_t(dim())}; }
  std::span<const int64_t> strides() const { return {ask<int64_t*>(aoti_torch_get_strides), size_t(dim())}; }
  int64_t dim() const { return ask<int64_t>(aoti_torch_get_dim); }
  int64_t numel() const { return ask<int64_t>(aoti_torch_get_numel); }
  bool is_contiguous() const { return ask<bool>(aoti_torch_is_contiguous); }
  bool is_cuda() const {
    static const int32_t cuda = aoti_torch_device_type_cuda();
    return ask<int32_t>(aoti_torch_get_device_type) == cuda;
  }
  int32_t get_device_index() const { return ask<int32_t>(aoti_torch_get_device_index); }
  ScalarType scalar_type() const {
    static const int32_t f32 = aoti_torch_dtype_float32();
    const int32_t type = ask<int32_t>(aoti_torch_get_dtype);
    return type == f32 ? ScalarType::Float : torch::stable::detail::to<ScalarType>(torch::stable::detail::from(type));
  }
  int64_t element_size() const { return Tensor(*this).element_size(); }
  const void* const_data_ptr() const { return ask<const void*>(torch_get_const_data_ptr); }
  void* mutable_data_ptr() const { return ask<void*>(torch_get_mutable_data_ptr); }

 private:
  template <class T, class Question>
  T ask(Question question) const {
    T answer;
    TORCH_ERROR_CODE_CHECK(question(handle_, &answer));
    return answer;
  }
  AtenTensorHandle handle_;
};

class Tensors {  // an argument list
 public:
  explicit Tensors(StableListHandle list) {
    try {
      size_t count = 0;
      TORCH_ERROR_CODE_CHECK(torch_list_size(list, &count));
      tensors_.reserve(count);
      for (size_t i = 0; i < count; ++i) {
        StableIValue item;
        TORCH_ERROR_CODE_CHECK(torch_list_get_item(list, i, &item));
        tensors_.push_back(Listed(torch::stable::detail::to<AtenTensorHandle>(item)));
      }
    } catch (...) {
      torch_delete_list(list);
      clear();
      throw;
    }
    TORCH_ERROR_CODE_CHECK(torch_delete_list(list));
  }
  Tensors(Tensors&& other) noexcept : tensors_(std::move(other.tensors_)) { other.tensors_.clear(); }
  Tensors& operator=(Tensors&&) = delete;
  ~Tensors() { clear(); }
  size_t size() const { return tensors_.size(); }
  bool empty() const { return tensors_.empty(); }
  const Listed& operator[](size_t i) const { return tensors_[i]; }

 private:
  // A tensor that is back in the hands of Python alone takes Python's lock to say so: better once a list than once a tensor.
  void clear() {
    const bool lock = tensors_.size() > 8 && Py_IsInitialized && PyGILState_Ensure && Py_IsInitialized();
    const int state = lock ? PyGILState_Ensure() : 0;
    for (const Listed& t : tensors_) aoti_torch_delete_tensor_object(t.get());
    tensors_.clear();
    if (lock) PyGILState_Release(state);
  }
  std::vector<Listed> tensors_;
};

// Whether elements fill their memory, in whatever order of dimensions.
enum class Memory { dense, gaps, overlap };
inline Memory memory_of(std::span<const int64_t> sizes, std::span<const int64_t> strides) {
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
  for (size_t d = 0; d < sizes.size(); ++d)
    if (sizes[d] > 1) dims.emplace_back(strides[d], sizes[d]);
  std::sort(dims.begin(), dims.end());
  int64_t span = 1;  // elements from the first to the last of the dimensions seen
  Memory m = Memory::dense;
  for (const auto& [stride, size] : dims) {
    if (stride < span) return Memory::overlap;
    if (stride > span) m = Memory::gaps;
    span = stride * (size - 1) + span;
  }
  return m;
}

// Where an operator runs; the emulator's tensors live on the CPU.
enum class Device { cpu, cuda };
#if defined(DITHER_EMULATE)
constexpr bool kEmulated = true;
#else
constexpr bool kEmulated = false;
#endif

inline Stream current_stream(const Tensor& t) {
  void* s = nullptr;
  if (t.is_cuda()) TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &s));
  return static_cast<Stream>(s);
}
// The launch must happen on the tensors' device, which need not be the current one.
inline std::optional<torch::stable::accelerator::DeviceGuard> device_guard(const Tensor& t) {
  if (!t.is_cuda()) return std::nullopt;
  return std::optional<torch::stable::accelerator::DeviceGuard>(std::in_place, t.get_device_index());
}
#if defined(DITHER_CUDA)
int multiprocessor_count(int device);  // device.cu
inline int multiprocessor_count(const Tensor& t) { return multiprocessor_count(t.get_device_index()); }
#else
inline int multiprocessor_count(const Tensor&) { return 1; }
#endif
template <class Body>
inline void parallel(int64_t n, int64_t grain, const Body& body) {
  if (n > 0) torch::stable::parallel_for(0, n, grain, body);
}

inline const char* name_of(ScalarType t) {
  switch (t) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Bool: return "bool";
    case ScalarType::Byte: return "uint8";
    case ScalarType::Char: return "int8";
    case ScalarType::Short: return "int16";
    case ScalarType::Int: return "int32";
    case ScalarType::Long: return "int64";
    default: return "another dtype";
  }
}
inline std::string device_of(const Tensor& t) {
  if (t.is_cpu()) return "cpu";
  return (t.is_cuda() ? "cuda:" : "device ") + std::to_string(t.get_device_index());
}
inline std::optional<DType> float_type(ScalarType t) {
  switch (t) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Double: return DType::f64;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default: return std::nullopt;
  }
}
inline std::optional<DType> float_type(const Tensor& t) { return float_type(t.scalar_type()); }

// Checks that operators share.
inline std::string list(const char* name, size_t i) { return std::string(name) + "[" + std::to_string(i) + "]"; }
inline std::string shape_of(std::span<const int64_t> sizes) {
  std::string s = "[";
  for (const int64_t& size : sizes) s += (&size != sizes.data() ? ", " : "") + std::to_string(size);
  return s + "]";
}
inline std::string shape_of(const Tensor& t) {
  const auto sizes = t.sizes();
  return shape_of({sizes.data(), sizes.size()});
}
inline DType checked_type(const char* op, const char* name, const Tensor& t) {
  const auto type = float_type(t);
  DITHER_CHECK(type, op, ": ", name, " is ", name_of(t.scalar_type()), ", expected float32, float64, bfloat16 or float16");
  return *type;
}
inline void check_device(const char* op, const char* name, const Tensor& t, const char* other, const Tensor& like) {
  DITHER_CHECK(device_of(t) == device_of(like), op, ": ", name, " is on ", device_of(t), ", expected ", device_of(like),
               " like ", other);
}
// A tensor that is written whole.
inline void check_out(const char* op, const char* name, const Tensor& out, ScalarType type, const Ints& shape,
                      const char* other, const Tensor& like) {
  const auto sizes = out.sizes();
  DITHER_CHECK(
      out.scalar_type() == type && std::equal(shape.begin(), shape.end(), sizes.begin(), sizes.end()) && out.is_contiguous(),
      op, ": ", name, " is ", name_of(out.scalar_type()), " of shape ", shape_of(out), ", expected contiguous ", name_of(type),
      " of shape ", shape_of(shape));
  check_device(op, name, out, other, like);
}
inline Tensor in_order(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }
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

// key: one int64 for Philox, four for ChaCha20.
inline Address address(const std::string& op, const Ints& key, int64_t stream, int64_t step, int64_t start, int64_t n,
                       Kind kind) {
  DITHER_CHECK(key.size() == 1 || key.size() == 4, op, ": key has ", key.size(),
               " integers, expected 1 (philox) or 4 (chacha20)");
  DITHER_CHECK(stream >= 0 && stream >> 32 == 0, op, ": stream is ", stream, ", expected 0 <= stream < 2^32");
  DITHER_CHECK(step >= 0 && step >> 32 == 0, op, ": step is ", step, ", expected 0 <= step < 2^32");
  DITHER_CHECK(start >= 0 && start <= kMaxElement - n, op, ": start is ", start,
               ", expected 0 <= start and start + numel <= 2^60");
  Address a{{}, uint32_t(stream), uint32_t(step), kind};
  for (size_t i = 0; i < key.size(); ++i) {
    a.key[2 * i] = uint32_t(key[i]);
    a.key[2 * i + 1] = uint32_t(uint64_t(key[i]) >> 32);
  }
  return a;
}
}  // namespace dither

template <>
struct torch::stable::detail::ToImpl<dither::Tensors> {
  static dither::Tensors call(StableIValue value, uint64_t, bool) { return dither::Tensors(to<StableListHandle>(value)); }
};
