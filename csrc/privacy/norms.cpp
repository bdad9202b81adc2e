#include "norms.h"

#include <memory>

#include "../common/torch.h"

namespace dither {
constexpr int64_t kWorthThreads = 1 << 16;  // elements
static int64_t grain(int64_t elements) { return std::max<int64_t>(1, kWorthThreads / std::max<int64_t>(1, elements)); }

static void check_out(const char* op, const Tensor& out, int64_t batch, const char* other, const Tensor& like) {
  check_out(op, "out", out, ScalarType::Double, {batch}, other, like);
}
static void check_rounding(const char* op, double rounding) {
  DITHER_CHECK(rounding >= 0.0, op, ": rounding is ", rounding, ", expected at least 0");
}
// Whether each sample is one piece of memory, in whatever order of dimensions.
static bool samples_are_dense(const Tensor& x) {
  if (x.is_contiguous()) return true;
  const auto sizes = x.sizes(), strides = x.strides();
  return x.size(0) > 0 && (x.size(0) == 1 || x.stride(0) == x.numel() / x.size(0)) &&
         memory_of({sizes.data(), sizes.size()}, {strides.data(), strides.size()}) == Memory::dense;
}
static Tensor scratch_on(const Tensor& like, int64_t numel) {
  return torch::stable::new_empty(like, {std::max<int64_t>(1, numel)}, ScalarType::Double);
}
static double* doubles(const Tensor& t) { return static_cast<double*>(t.mutable_data_ptr()); }

// The sums of squares of rows.
static std::vector<double> row_squares(const SampleRows& s) {
  const int64_t chunks = norm_chunks(s.columns), width = std::min(s.columns, kNormChunk), item = size_of(s.type);
  std::vector<double> partial(s.rows * chunks);
  const auto chunk = DITHER_PICK_ISA(square_chunk);
  parallel(s.rows * chunks, grain(width), [&](int64_t lo, int64_t hi) {
    for (int64_t unit = lo; unit < hi; ++unit) {
      const int64_t begin = unit % chunks * kNormChunk, n = std::min(kNormChunk, s.columns - begin);
      partial[unit] = chunk(static_cast<const char*>(s.x) + (unit / chunks * s.columns + begin) * item, n, s.type);
    }
  });
  if (chunks > 1) {
    const auto sum = DITHER_PICK_ISA(sum_lanes);
    for (int64_t row = 0; row < s.rows; ++row) partial[row] = sum(&partial[row * chunks], chunks);
  }
  return partial;
}

template <Device device>
static void sample_squares_(const Tensor& x, const Tensor& out) {
  const char* op = "sample_squares_";
  const DType type = checked_type(op, "x", x);
  DITHER_CHECK(x.dim() >= 1, op, ": x has shape ", shape_of(x), ", expected a dimension of samples");
  check_out(op, out, x.size(0), "x", x);
  if (x.numel() == 0) return;
  const Tensor dense = samples_are_dense(x) ? x : torch::stable::contiguous(x);
  const SampleRows s{dense.const_data_ptr(), x.size(0), x.numel() / x.size(0), type};
  if constexpr (device == Device::cpu) {
    const std::vector<double> sums = row_squares(s);
    for (int64_t b = 0; b < s.rows; ++b) doubles(out)[b] += sums[b];
  } else {
    const auto guard = device_guard(x);
    const Tensor partial = scratch_on(out, s.rows * norm_chunks(s.columns));
    DITHER_CUDA_OK(op, row_squares_cuda(s, doubles(partial), s, nullptr, 0.0, doubles(out), current_stream(x)));
  }
}

template <Device device>
static void ghost_norm_(const Tensor& a, const Tensor& g, bool bias, const Tensor& out, double rounding) {
  const char* op = "ghost_norm_";
  const DType a_type = checked_type(op, "a", a), g_type = checked_type(op, "g", g);
  DITHER_CHECK(a.dim() == 3, op, ": a has shape ", shape_of(a), ", expected [batch, steps, inputs]");
  DITHER_CHECK(g.dim() == 3 && g.size(0) == a.size(0) && g.size(1) == a.size(1), op, ": g has shape ", shape_of(g),
               ", expected [", a.size(0), ", ", a.size(1), ", outputs] like a");
  check_device(op, "g", g, "a", a);
  check_out(op, out, a.size(0), "a", a);
  check_rounding(op, rounding);
  if (g.numel() == 0) return;
  const Tensor inputs = in_order(a), grads = in_order(g);
  const GhostNorm s{{inputs.const_data_ptr(), a.size(0) * a.size(1), a.size(2), a_type},
                    {grads.const_data_ptr(), a.size(0) * a.size(1), g.size(2), g_type},
                    a.size(0),
                    a.size(1),
                    bias ? 1.0 : 0.0,
                    rounding};
  if constexpr (device == Device::cpu) {
    double* to = doubles(out);
    if (s.steps == 1) {
      const std::vector<double> of_a = row_squares(s.a), of_g = row_squares(s.g);
      for (int64_t b = 0; b < s.batch; ++b) to[b] += of_g[b] * (of_a[b] + s.bias);
      return;
    }
    const int64_t blocks = s.blocks(), room = ghost_scratch(s);
    std::vector<double> partial(s.batch * blocks);
    const auto run = DITHER_PICK_ISA(ghost_blocks);
    const int64_t work = kGhostBlock * s.steps * (s.a.columns + s.g.columns) / 16;
    parallel(s.batch * blocks, grain(work), [&](int64_t lo, int64_t hi) {
      const std::unique_ptr<double[]> scratch(new double[room]);
      run(s, lo, hi, scratch.get(), partial.data());
    });
    for (int64_t b = 0; b < s.batch; ++b) {
      double norm = 0.0;
      for (int64_t k = 0; k < blocks; ++k) norm += partial[b * blocks + k];
      to[b] += not_negative(norm);
    }
  } else {
    const auto guard = device_guard(a);
    if (s.steps == 1) {
      const int64_t of_a = s.batch * norm_chunks(s.a.columns), of_g = s.batch * norm_chunks(s.g.columns);
      const Tensor partial = scratch_on(out, of_a + of_g);
      DITHER_CUDA_OK(
          op, row_squares_cuda(s.g, doubles(partial), s.a, doubles(partial) + of_g, s.bias, doubles(out), current_stream(a)));
    } else {
      const Tensor partial = scratch_on(out, s.batch * s.blocks());
      DITHER_CUDA_OK(op, ghost_norm_cuda(s, doubles(partial), doubles(out), current_stream(a)));
    }
  }
}

// The steps of a sample by ids: those with one id are a run of `order`, in rising order.
class Runs {
 public:
  struct Run {
    int32_t begin, count;
  };
  explicit Runs(int64_t steps) : order(steps), next_(steps), first_(steps) {
    while ((int64_t(1) << bits_) < 2 * steps) ++bits_;
    table_.resize(size_t(1) << bits_);
  }
  void build(const int64_t* ids, int64_t padding) {
    std::fill(table_.begin(), table_.end(), -1);
    const int32_t steps = int32_t(order.size());
    for (int32_t t = steps - 1; t >= 0; --t) {
      size_t slot = size_t(uint64_t(ids[t]) * 0x9e3779b97f4a7c15u >> (64 - bits_));
      while (table_[slot] >= 0 && ids[table_[slot]] != ids[t]) slot = (slot + 1) & (table_.size() - 1);
      next_[t] = table_[slot];
      first_[t] = padding < 0 || ids[t] != padding;
      if (next_[t] >= 0) first_[next_[t]] = false;
      table_[slot] = t;
    }
    runs.clear();
    used = 0;
    for (int32_t t = 0; t < steps; ++t) {
      if (!first_[t]) continue;
      const int32_t begin = used;
      for (int32_t s = t; s >= 0; s = next_[s]) order[used++] = s;
      runs.push_back({begin, used - begin});
    }
  }
  std::vector<int32_t> order;
  std::vector<Run> runs;
  int32_t used = 0;  // of order

 private:
  std::vector<int32_t> next_;
  std::vector<char> first_;
  int bits_ = 1;
  std::vector<int32_t> table_;
};

template <Device device>
static void embedding_norm_(const Tensor& ids, const Tensor& g, int64_t padding_idx, const Tensor& out, double rounding) {
  const char* op = "embedding_norm_";
  DITHER_CHECK(ids.scalar_type() == ScalarType::Long && ids.dim() == 2, op, ": ids is ", name_of(ids.scalar_type()),
               " of shape ", shape_of(ids), ", expected int64 of shape [batch, steps]");
  const DType type = checked_type(op, "g", g);
  DITHER_CHECK(g.dim() == 3 && g.size(0) == ids.size(0) && g.size(1) == ids.size(1), op, ": g has shape ", shape_of(g),
               ", expected [", ids.size(0), ", ", ids.size(1), ", columns] like ids");
  DITHER_CHECK(padding_idx >= -1, op, ": padding_idx is ", padding_idx, ", expected an index or -1, none");
  DITHER_CHECK(ids.size(1) >> 30 == 0, op, ": ids has ", ids.size(1), " steps, expected fewer than 2^30");
  check_device(op, "g", g, "ids", ids);
  check_out(op, out, ids.size(0), "ids", ids);
  check_rounding(op, rounding);
  if (g.numel() == 0) return;
  const Tensor indices = in_order(ids), grads = in_order(g);
  const EmbeddingNorm s{static_cast<const int64_t*>(indices.const_data_ptr()),
                        grads.const_data_ptr(),
                        ids.size(0),
                        ids.size(1),
                        g.size(2),
                        padding_idx,
                        type,
                        rounding};
  if constexpr (device == Device::cpu) {
    const auto norm = DITHER_PICK_ISA(norm_of_rows);
    const auto sum = DITHER_PICK_ISA(sum_lanes);
    double* to = doubles(out);
    parallel(s.batch, grain(s.steps * s.columns), [&](int64_t lo, int64_t hi) {
      Runs ids_of(s.steps);
      std::vector<double> norms(s.steps);
      for (int64_t b = lo; b < hi; ++b) {
        ids_of.build(s.ids + b * s.steps, padding_idx);
        std::fill(norms.begin(), norms.end(), 0.0);
        for (const auto& [begin, count] : ids_of.runs)
          norms[ids_of.order[begin]] = norm(s, b, &ids_of.order[begin], count, ids_of.used - begin - count);
        to[b] += sum(norms.data(), s.steps);
      }
    });
  } else {
    const auto guard = device_guard(g);
    const Tensor partial = scratch_on(out, s.batch * s.steps);
    DITHER_CUDA_OK(op, embedding_norm_cuda(s, doubles(partial), doubles(out), current_stream(g)));
  }
}

template <Device device>
static void scale_rows_(const Tensor& x, const Tensor& factor) {
  const char* op = "scale_rows_";
  const DType type = checked_type(op, "x", x);
  DITHER_CHECK(x.dim() >= 1, op, ": x has shape ", shape_of(x), ", expected a dimension of samples");
  DITHER_CHECK(x.numel() == 0 || samples_are_dense(x), op, ": x has strides of another order or with gaps, expected dense ",
               "samples, one after the other");
  const bool known = factor.scalar_type() == ScalarType::Float || factor.scalar_type() == ScalarType::Double;
  DITHER_CHECK(known && factor.dim() == 1 && factor.size(0) == x.size(0), op, ": factor is ", name_of(factor.scalar_type()),
               " of shape ", shape_of(factor), ", expected float32 or float64 of shape [", x.size(0), "]");
  check_device(op, "factor", factor, "x", x);
  if (x.numel() == 0) return;
  const Tensor factors = in_order(factor);
  const ScaleRows s{x.mutable_data_ptr(), factors.const_data_ptr(), x.size(0), x.numel() / x.size(0), type,
                    *float_type(factor)};
  if constexpr (device == Device::cpu) {
    const auto run = DITHER_PICK_ISA(scale_range);
    const int64_t chunks = norm_chunks(s.columns), width = std::min(s.columns, kNormChunk), item = size_of(type);
    parallel(s.rows * chunks, grain(width), [&](int64_t lo, int64_t hi) {
      for (int64_t unit = lo; unit < hi; ++unit) {
        const double f = s.factor_of(unit / chunks);
        const int64_t begin = unit % chunks * kNormChunk, n = std::min(kNormChunk, s.columns - begin);
        if (f != 1.0) run(static_cast<char*>(s.x) + (unit / chunks * s.columns + begin) * item, n, f, type);
      }
    });
  } else {
    const auto guard = device_guard(x);
    DITHER_CUDA_OK(op, scale_rows_cuda(s, current_stream(x)));
  }
}

template <Device device>
static void affine_sample_grads_(const Tensor& x, const Tensor& g, const std::optional<Tensor>& mean, const Tensor& scale,
                                 const Tensor& out) {
  const char* op = "affine_sample_grads_";
  const DType type = checked_type(op, "x", x);
  DITHER_CHECK(x.dim() == 3, op, ": x has shape ", shape_of(x), ", expected [batch, steps, columns]");
  DITHER_CHECK(g.scalar_type() == x.scalar_type(), op, ": g is ", name_of(g.scalar_type()), ", expected ",
               name_of(x.scalar_type()), " like x");
  DITHER_CHECK(g.dim() == 3 && g.size(0) == x.size(0) && g.size(1) == x.size(1) && g.size(2) == x.size(2), op, ": g has shape ",
               shape_of(g), ", expected ", shape_of(x), " like x");
  const auto check_steps = [&](const char* name, const Tensor& t) {
    DITHER_CHECK(t.scalar_type() == ScalarType::Double && t.dim() == 2 && t.size(0) == x.size(0) && t.size(1) == x.size(1), op,
                 ": ", name, " is ", name_of(t.scalar_type()), " of shape ", shape_of(t), ", expected float64 of shape [",
                 x.size(0), ", ", x.size(1), "]");
    check_device(op, name, t, "x", x);
  };
  if (mean) check_steps("mean", *mean);
  check_steps("scale", scale);
  const ScalarType wide = type == DType::f64 ? ScalarType::Double : ScalarType::Float;
  DITHER_CHECK(out.scalar_type() == wide, op, ": out is ", name_of(out.scalar_type()), ", expected ", name_of(wide));
  DITHER_CHECK(out.dim() == 3 && (out.size(0) == 1 || out.size(0) == 2) && out.size(1) == x.size(0) &&
                   out.size(2) == x.size(2) && out.is_contiguous(),
               op, ": out has shape ", shape_of(out), out.is_contiguous() ? "" : " and is not contiguous",
               ", expected contiguous [1 or 2, ", x.size(0), ", ", x.size(2), "]");
  check_device(op, "g", g, "x", x);
  check_device(op, "out", out, "x", x);
  if (out.numel() == 0) return;
  const Tensor inputs = in_order(x), grads = in_order(g), scales = in_order(scale), means = in_order(mean ? *mean : scale);
  const AffineGrads s{inputs.const_data_ptr(),
                      grads.const_data_ptr(),
                      mean ? static_cast<const double*>(means.const_data_ptr()) : nullptr,
                      static_cast<const double*>(scales.const_data_ptr()),
                      out.mutable_data_ptr(),
                      x.size(0),
                      x.size(1),
                      x.size(2),
                      type,
                      out.size(0) == 2};
  if constexpr (device == Device::cpu) {
    const auto run = DITHER_PICK_ISA(affine_samples);
    parallel(s.batch, grain(s.steps * s.columns), [&](int64_t lo, int64_t hi) { run(s, lo, hi); });
  } else {
    const auto guard = device_guard(x);
    DITHER_CUDA_OK(op, affine_grads_cuda(s, current_stream(x)));
  }
}
}  // namespace dither

STABLE_TORCH_LIBRARY_FRAGMENT(DITHER_NS, m) {
  m.def("ghost_norm_(Tensor a, Tensor g, bool bias, Tensor(a!) out, float rounding=0.0) -> ()");
  m.def("sample_squares_(Tensor x, Tensor(a!) out) -> ()");
  m.def("embedding_norm_(Tensor ids, Tensor g, int padding_idx, Tensor(a!) out, float rounding=0.0) -> ()");
  m.def("scale_rows_(Tensor(a!) x, Tensor factor) -> ()");
  m.def("affine_sample_grads_(Tensor x, Tensor g, Tensor? mean, Tensor scale, Tensor(a!) out) -> ()");
}
#if !defined(DITHER_EMULATE)
STABLE_TORCH_LIBRARY_IMPL(DITHER_NS, CPU, m) {
  m.impl("ghost_norm_", TORCH_BOX(&dither::ghost_norm_<dither::Device::cpu>));
  m.impl("sample_squares_", TORCH_BOX(&dither::sample_squares_<dither::Device::cpu>));
  m.impl("embedding_norm_", TORCH_BOX(&dither::embedding_norm_<dither::Device::cpu>));
  m.impl("scale_rows_", TORCH_BOX(&dither::scale_rows_<dither::Device::cpu>));
  m.impl("affine_sample_grads_", TORCH_BOX(&dither::affine_sample_grads_<dither::Device::cpu>));
}
#endif
#if defined(DITHER_CUDA) || defined(DITHER_EMULATE)
STABLE_TORCH_LIBRARY_IMPL(DITHER_NS, DITHER_CUDA_KEY, m) {
  m.impl("ghost_norm_", TORCH_BOX(&dither::ghost_norm_<dither::Device::cuda>));
  m.impl("sample_squares_", TORCH_BOX(&dither::sample_squares_<dither::Device::cuda>));
  m.impl("embedding_norm_", TORCH_BOX(&dither::embedding_norm_<dither::Device::cuda>));
  m.impl("scale_rows_", TORCH_BOX(&dither::scale_rows_<dither::Device::cuda>));
  m.impl("affine_sample_grads_", TORCH_BOX(&dither::affine_sample_grads_<dither::Device::cuda>));
}
#endif
