#include "draw.h"

#include <cmath>

#include "../common/torch.h"

namespace dither {
static std::optional<Stored> stored_type(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Stored::f32;
    case ScalarType::Double: return Stored::f64;
    case ScalarType::BFloat16: return Stored::bf16;
    case ScalarType::Half: return Stored::f16;
    case ScalarType::Bool:
    case ScalarType::Byte: return Stored::u8;
    case ScalarType::Char: return Stored::i8;
    case ScalarType::Short: return Stored::i16;
    case ScalarType::Int: return Stored::i32;
    case ScalarType::Long: return Stored::i64;
    default: return std::nullopt;
  }
}

static constexpr struct {
  const char* name;
  Distribution value;
  size_t parameters, bounds;
} kDistributions[] = {
    {"normal", Distribution::normal, 2, 0},       {"uniform", Distribution::uniform, 2, 0},
    {"laplace", Distribution::laplace, 2, 0},     {"rademacher", Distribution::rademacher, 0, 0},
    {"bernoulli", Distribution::bernoulli, 1, 0}, {"randint", Distribution::randint, 0, 2},
    {"bits", Distribution::bits, 0, 1},  // bounds: the kind
};

static Draw checked(const Tensor& out, const std::string& name, const Floats& parameters, const Ints& bounds, const Ints& key,
                    int64_t stream, int64_t step, int64_t start, bool add) {
  const std::string op = name + "_";
  Draw d{};
  bool known = false;
  for (const auto& each : kDistributions)
    if (name == each.name) {
      known = true;
      d.distribution = each.value;
      DITHER_CHECK(parameters.size() == each.parameters && bounds.size() == each.bounds, op, ": got ", parameters.size(),
                   " parameters and ", bounds.size(), " bounds, expected ", each.parameters, " and ", each.bounds);
    }
  DITHER_CHECK(known, "draw_: distribution is '", name,
               "', expected normal, uniform, laplace, rademacher, bernoulli, randint or bits");
  const auto stored = stored_type(out);
  const bool is_float = float_type(out).has_value();
  const bool allowed = d.distribution == Distribution::bits      ? out.scalar_type() == ScalarType::Int
                       : d.distribution == Distribution::randint ? stored && !is_float && out.scalar_type() != ScalarType::Bool
                       : d.distribution == Distribution::bernoulli ? stored.has_value()
                                                                   : is_float;
  DITHER_CHECK(allowed, op, ": out is ", name_of(out.scalar_type()), ", expected ",
               d.distribution == Distribution::bits        ? "int32"
               : d.distribution == Distribution::randint   ? "uint8, int8, int16, int32 or int64"
               : d.distribution == Distribution::bernoulli ? "bool, an integer or a floating point type"
                                                           : "float32, float64, bfloat16 or float16");
  DITHER_CHECK(!add || is_float, op, ": out is ", name_of(out.scalar_type()), ", adding noise needs a floating point tensor");
  DITHER_CHECK(out.is_contiguous(), op, ": out must be contiguous");
  d.stored = *stored;
  d.add = add;
  d.a = parameters.size() > 0 ? parameters[0] : 0.0;
  d.b = parameters.size() > 1 ? parameters[1] : 0.0;
  Kind kind = Kind::bits;
  switch (d.distribution) {
    case Distribution::normal:
      DITHER_CHECK(std::isfinite(d.a) && std::isfinite(d.b) && d.b >= 0, op, ": mean, std are ", d.a, ", ", d.b,
                   ", expected finite and std >= 0");
      kind = d.stored == Stored::f64 ? Kind::normal64 : Kind::normal32;
      break;
    case Distribution::uniform:
      DITHER_CHECK(std::isfinite(d.a) && std::isfinite(d.b) && d.a <= d.b, op, ": low, high are ", d.a, ", ", d.b,
                   ", expected finite and low <= high");
      break;
    case Distribution::laplace:
      DITHER_CHECK(std::isfinite(d.a) && std::isfinite(d.b) && d.b >= 0, op, ": loc, scale are ", d.a, ", ", d.b,
                   ", expected finite and scale >= 0");
      break;
    case Distribution::bernoulli: DITHER_CHECK(d.a >= 0 && d.a <= 1, op, ": p is ", d.a, ", expected 0 <= p <= 1"); break;
    case Distribution::randint: {
      DITHER_CHECK(bounds[0] < bounds[1], op, ": low, high are ", bounds[0], ", ", bounds[1], ", expected low < high");
      const int bits = out.scalar_type() == ScalarType::Byte || out.scalar_type() == ScalarType::Char ? 8
                       : out.scalar_type() == ScalarType::Short                                       ? 16
                       : out.scalar_type() == ScalarType::Int                                         ? 32
                                                                                                      : 64;
      if (bits < 64) {
        const bool is_signed = out.scalar_type() != ScalarType::Byte;
        const int64_t least = is_signed ? -(int64_t(1) << (bits - 1)) : 0, most = least + (int64_t(1) << bits);
        DITHER_CHECK(bounds[0] >= least && bounds[1] <= most, op, ": low, high are ", bounds[0], ", ", bounds[1], ", expected ",
                     least, " <= low and high <= ", most, " for ", name_of(out.scalar_type()));
      }
      d.low = bounds[0];
      d.range = uint64_t(bounds[1]) - uint64_t(bounds[0]);
      break;
    }
    case Distribution::bits:
      DITHER_CHECK(bounds[0] >= 0 && bounds[0] < 16, op, ": kind is ", bounds[0], ", expected 0 <= kind < 16");
      kind = Kind(bounds[0]);
      break;
    default: break;
  }
  d.address = address(op, key, stream, step, start, out.numel(), kind);
  d.chacha = key.size() == 4;
  d.start = start;
  return d;
}

template <Device device>
static void draw_(Tensor out, std::string distribution, Floats parameters, Ints bounds, Ints key, int64_t stream, int64_t step,
                  int64_t start, bool add) {
  const Draw d = checked(out, distribution, parameters, bounds, key, stream, step, start, add);
  void* p = out.mutable_data_ptr();
  if constexpr (device == Device::cpu) {
    const auto run = DITHER_PICK_ISA(draw_range);
    parallel(out.numel(), 1 << 14, [&](int64_t lo, int64_t hi) { run(d, p, lo, hi); });
  } else {
    const auto guard = device_guard(out);
    DITHER_CUDA_OK(distribution, draw_cuda(d, p, out.numel(), current_stream(out)));
  }
}

template <Device device>
static void stochastic_round_(Tensor out, Tensor x, Ints key, int64_t stream, int64_t step, int64_t start) {
  const char* op = "stochastic_round_";
  const auto from = float_type(x), to = float_type(out);
  DITHER_CHECK(from && *from != DType::f64, op, ": x is ", name_of(x.scalar_type()), ", expected float32, bfloat16 or float16");
  DITHER_CHECK(to == DType::bf16 || to == DType::f16, op, ": out is ", name_of(out.scalar_type()),
               ", expected bfloat16 or float16");
  DITHER_CHECK(x.is_contiguous() && out.is_contiguous(), op, ": x and out must be contiguous");
  DITHER_CHECK(x.numel() == out.numel(), op, ": out has ", out.numel(), " elements, expected ", x.numel(), " like x");
  DITHER_CHECK(device_of(x) == device_of(out), op, ": out is on ", device_of(out), ", expected ", device_of(x), " like x");
  DITHER_CHECK(key.size() == 1, op, ": key has ", key.size(), " integers, expected 1 (philox)");
  const Rounding r{address(op, key, stream, step, start, x.numel(), Kind::bits), *from, *to, start};
  const void* p = x.const_data_ptr();
  void* q = out.mutable_data_ptr();
  if constexpr (device == Device::cpu) {
    const auto run = DITHER_PICK_ISA(round_range);
    parallel(out.numel(), 1 << 14, [&](int64_t lo, int64_t hi) { run(r, p, q, lo, hi); });
  } else {
    const auto guard = device_guard(out);
    DITHER_CUDA_OK(op, round_cuda(r, p, q, out.numel(), current_stream(out)));
  }
}
}  // namespace dither

STABLE_TORCH_LIBRARY_FRAGMENT(DITHER_NS, m) {
  m.def(
      "draw_(Tensor(a!) out, str distribution, float[] parameters, int[] bounds, int[] key, SymInt stream, SymInt step, SymInt "
      "start, bool add) -> ()");
  m.def("stochastic_round_(Tensor(a!) out, Tensor x, int[] key, SymInt stream, SymInt step, SymInt start) -> ()");
}
#if !defined(DITHER_EMULATE)
STABLE_TORCH_LIBRARY_IMPL(DITHER_NS, CPU, m) {
  m.impl("draw_", TORCH_BOX(&dither::draw_<dither::Device::cpu>));
  m.impl("stochastic_round_", TORCH_BOX(&dither::stochastic_round_<dither::Device::cpu>));
}
#endif
#if defined(DITHER_CUDA) || defined(DITHER_EMULATE)
STABLE_TORCH_LIBRARY_IMPL(DITHER_NS, DITHER_CUDA_KEY, m) {
  m.impl("draw_", TORCH_BOX(&dither::draw_<dither::Device::cuda>));
  m.impl("stochastic_round_", TORCH_BOX(&dither::stochastic_round_<dither::Device::cuda>));
}
#endif
