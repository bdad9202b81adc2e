// The only header that knows torch. Stable ABI: one build runs on every torch >= 2.10.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <string>
#include <vector>

#include "address.h"
#include "dtype.h"
#include "stream.h"

// Present only in CUDA builds of torch; null on a CPU build, where no CUDA tensor can exist.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

#define DITHER_CHECK STD_TORCH_CHECK
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
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using Ints = std::vector<int64_t>;
using Floats = std::vector<double>;

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
