#include "attention.h"

#include <cmath>
#include <new>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../common/torch.h"

namespace dither {
constexpr int64_t kWorthThreads = 1 << 18;  // products
constexpr int64_t kMaxDim = 256;

static std::string list(std::initializer_list<int64_t> sizes) { return shape_of({sizes.begin(), sizes.size()}); }
static bool has_shape(const Tensor& t, std::initializer_list<int64_t> sizes) {
  const auto own = t.sizes();
  return std::equal(own.begin(), own.end(), sizes.begin(), sizes.end());
}
static HeadRows strides_of(const Tensor& t) { return {t.stride(0), t.stride(1), t.stride(2)}; }
static Tensor rows_in_order(const Tensor& t) { return t.size(3) <= 1 || t.stride(3) == 1 ? t : torch::stable::contiguous(t); }
static void check(const char* op, const char* name, const Tensor& t, ScalarType type, std::initializer_list<int64_t> shape,
                  const Tensor& q, bool in_order) {
  DITHER_CHECK(t.scalar_type() == type, op, ": ", name, " is ", name_of(t.scalar_type()), ", expected ", name_of(type));
  DITHER_CHECK(has_shape(t, shape) && (!in_order || t.is_contiguous()), op, ": ", name, " has shape ", shape_of(t),
               in_order && !t.is_contiguous() ? " and is not contiguous" : "", ", expected ", in_order ? "contiguous " : "",
               list(shape));
  DITHER_CHECK(device_of(t) == device_of(q), op, ": ", name, " is on ", device_of(t), ", expected ", device_of(q), " like q");
}

// All but set_data, of tensors that the caller holds.
static Attention checked(const char* op, const Tensor& q, const Tensor& k, const std::optional<Tensor>& mask, bool causal,
                         double scale) {
  Attention a{};
  a.type = checked_type(op, "q", q);
  DITHER_CHECK(q.dim() == 4 && q.size(3) <= kMaxDim, op, ": q has shape ", shape_of(q),
               ", expected [batch, heads, queries, dim] with dim <= ", kMaxDim);
  DITHER_CHECK(k.scalar_type() == q.scalar_type(), op, ": k is ", name_of(k.scalar_type()), ", expected ",
               name_of(q.scalar_type()), " like q");
  DITHER_CHECK(k.dim() == 4 && k.size(0) == q.size(0) && k.size(3) == q.size(3), op, ": k has shape ", shape_of(k),
               ", expected [", q.size(0), ", heads, keys, ", q.size(3), "] like q");
  DITHER_CHECK(k.size(1) == q.size(1) || (k.size(1) > 0 && q.size(1) % k.size(1) == 0), op, ": k has ", k.size(1),
               " heads, expected a divisor of the ", q.size(1), " of q");
  DITHER_CHECK(device_of(k) == device_of(q), op, ": k is on ", device_of(k), ", expected ", device_of(q), " like q");
  a.batch = q.size(0);
  a.heads = q.size(1);
  a.group = k.size(1) > 0 ? q.size(1) / k.size(1) : 1;
  a.queries = q.size(2);
  a.keys = k.size(2);
  a.dim = q.size(3);
  a.scale = scale * kLog2e;
  a.causal = causal;
  if (mask) {
    check(op, "attn_mask", *mask, ScalarType::Bool, {a.batch, a.heads, a.queries, a.keys}, q, false);
    a.mask = static_cast<const uint8_t*>(mask->const_data_ptr());
    a.mask_at = strides_of(*mask);
    a.mask_column = mask->stride(3);
  }
  return a;
}
static void set_data(Attention& a, const Tensor& q, const Tensor& k) {
  a.q = q.const_data_ptr();
  a.k = k.const_data_ptr();
  a.q_at = strides_of(q);
  a.k_at = strides_of(k);
}
static ScalarType type_of_sums(const Attention& a) { return a.type == DType::f64 ? ScalarType::Double : ScalarType::Float; }

class Scratch {  // whole cache lines
 public:
  explicit Scratch(int64_t bytes) : data_(::operator new(size_t(bytes), kLine)) {
#if defined(__linux__)  // large pages, if the system grants them: the first touch of small ones would take as long as the work
    constexpr uintptr_t kPage = 1 << 16, kLarge = 1 << 22;
    const auto first = (reinterpret_cast<uintptr_t>(data_) + kPage - 1) / kPage * kPage;
    if (uintptr_t(bytes) >= kLarge) madvise(reinterpret_cast<void*>(first), size_t(bytes) - kPage, MADV_HUGEPAGE);
#endif
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { ::operator delete(data_, kLine); }
  void* get() const { return data_; }

 private:
  static constexpr std::align_val_t kLine{64};
  void* data_;
};

template <class T>
static void add_runs(const Attention& a, T* partial) {
  const int64_t runs = query_chunks(a).runs(), pitch = whole_panels(a.keys, sizeof(T));
  parallel(a.pairs(), std::max<int64_t>(1, kWorthThreads / (runs * pitch + 1)), [&](int64_t lo, int64_t hi) {
    for (int64_t pair = lo; pair < hi; ++pair) {
      T* sums = partial + pair * runs * pitch;
      for (int64_t step = 1; step < runs; step *= 2)
        for (int64_t run = 0; run + step < runs; run += 2 * step)
          for (int64_t j = 0; j < a.keys; ++j) sums[run * pitch + j] += sums[(run + step) * pitch + j];
      std::copy_n(sums, a.keys, static_cast<T*>(a.sums) + pair * a.keys);
    }
  });
}

static void on_cpu(const Attention& a) {
  const int64_t item = a.type == DType::f64 ? 8 : 4;
  const bool by_rows = a.lse == nullptr;
  const Chunks chunks = query_chunks(a);
  const Blocks blocks = key_blocks(a);
  const int64_t units = by_rows ? chunks.runs() : blocks.count;
  const int64_t bytes = by_rows ? rows_scratch(a, item) : columns_scratch(a, item);
  const int64_t pairs = by_rows ? chunks.size * chunks.run * a.keys : blocks.size * a.queries;
  const int64_t grain = std::max<int64_t>(1, kWorthThreads / std::max<int64_t>(1, pairs * (a.dim + 16)));
  std::optional<Scratch> partial;
  if (by_rows && a.sums) partial.emplace(a.pairs() * units * whole_panels(a.keys, item) * item);
  const auto rows = DITHER_PICK_ISA(attention_rows);
  const auto columns = DITHER_PICK_ISA(attention_columns);
  parallel(a.pairs() * units, grain, [&](int64_t lo, int64_t hi) {
    const Scratch scratch(bytes);
    if (by_rows) rows(a, lo, hi, scratch.get(), partial ? partial->get() : nullptr);
    else columns(a, lo, hi, scratch.get());
  });
  if (!partial) return;
  if (item == 8) add_runs(a, static_cast<double*>(partial->get()));
  else add_runs(a, static_cast<float*>(partial->get()));
}

template <Device device>
static void attention_lse_(const Tensor& q, const Tensor& k, const std::optional<Tensor>& attn_mask, bool is_causal,
                           double scale, const Tensor& out) {
  const char* op = "attention_lse_";
  Attention a = checked(op, q, k, attn_mask, is_causal, scale);
  check(op, "out", out, type_of_sums(a), {a.batch, a.heads, a.queries}, q, true);
  if (out.numel() == 0) return;
  if (a.keys == 0) {
    torch::stable::fill_(const_cast<Tensor&>(out), -INFINITY);
    return;
  }
  const Tensor queries = rows_in_order(q), keys = rows_in_order(k);
  set_data(a, queries, keys);
  a.lse_out = out.mutable_data_ptr();
  if constexpr (device == Device::cpu) {
    on_cpu(a);
  } else {
    const auto guard = device_guard(q);
    DITHER_CUDA_OK(op, attention_lse_cuda(a, current_stream(q)));
  }
}

template <Device device>
static void attention_colsum_(const Tensor& q, const Tensor& k, const std::optional<Tensor>& weight,
                              const std::optional<Tensor>& lse, const std::optional<Tensor>& attn_mask, bool is_causal,
                              double scale, const std::optional<Tensor>& lse_out, const Tensor& out) {
  const char* op = "attention_colsum_";
  Attention a = checked(op, q, k, attn_mask, is_causal, scale);
  const ScalarType type = type_of_sums(a);
  if (weight) check(op, "weight", *weight, type, {a.batch, a.heads, a.queries}, q, false);
  if (lse) check(op, "lse", *lse, type, {a.batch, a.heads, a.queries}, q, true);
  DITHER_CHECK(!lse || !lse_out, op, ": lse_out is a tensor, expected None with a given lse");
  if (lse_out) check(op, "lse_out", *lse_out, type, {a.batch, a.heads, a.queries}, q, true);
  check(op, "out", out, type, {a.batch, a.heads, a.keys}, q, true);
  if (a.queries == 0 || out.numel() == 0) {
    torch::stable::fill_(const_cast<Tensor&>(out), 0.0);
    if (lse_out) torch::stable::fill_(const_cast<Tensor&>(*lse_out), -INFINITY);
    return;
  }
  const Tensor queries = rows_in_order(q), keys = rows_in_order(k);
  set_data(a, queries, keys);
  a.sums = out.mutable_data_ptr();
  if (weight) {
    a.weight = weight->const_data_ptr();
    a.weight_at = strides_of(*weight);
  }
  if constexpr (device == Device::cpu) {
    if (lse) a.lse = lse->const_data_ptr();
    if (lse_out) a.lse_out = lse_out->mutable_data_ptr();
    on_cpu(a);
  } else {
    const auto guard = device_guard(q);
    const Tensor known = lse ? *lse : lse_out ? *lse_out : torch::stable::new_empty(q, {a.batch, a.heads, a.queries}, type);
    if (!lse) {
      a.lse_out = known.mutable_data_ptr();
      DITHER_CUDA_OK(op, attention_lse_cuda(a, current_stream(q)));
    }
    a.lse = known.const_data_ptr();
    DITHER_CUDA_OK(op, attention_colsum_cuda(a, current_stream(q)));
  }
}

// CPU alone: CUDA computes scores again, faster than it would read them.
[[maybe_unused]] static void attention_pagerank_(const Tensor& q, const Tensor& k, const Tensor& init,
                                                 const std::optional<Tensor>& attn_mask, bool is_causal, double scale,
                                                 int64_t iterations, double tol, const Tensor& out) {
  const char* op = "attention_pagerank_";
  Attention a = checked(op, q, k, attn_mask, is_causal, scale);
  const ScalarType type = type_of_sums(a);
  DITHER_CHECK(a.keys == a.queries, op, ": k has ", a.keys, " keys, expected ", a.queries, ", as many as q has queries");
  check(op, "init", init, type, {a.batch, a.heads, a.queries}, q, false);
  DITHER_CHECK(iterations >= 1, op, ": iterations is ", iterations, ", expected at least 1");
  check(op, "out", out, type, {a.batch, a.heads, a.keys}, q, true);
  if (out.numel() == 0) return;
  const Tensor queries = rows_in_order(q), keys = rows_in_order(k);
  set_data(a, queries, keys);
  a.weight = init.const_data_ptr();
  a.weight_at = strides_of(init);
  a.sums = out.mutable_data_ptr();
  const int64_t item = a.type == DType::f64 ? 8 : 4, bytes = pagerank_scratch(a, item);
  const int64_t work = a.keys * a.queries * (a.dim + 16);
  const auto heads = DITHER_PICK_ISA(attention_pagerank);
  parallel(a.pairs(), std::max<int64_t>(1, kWorthThreads / work), [&](int64_t lo, int64_t hi) {
    const Scratch scratch(bytes);
    heads(a, lo, hi, scratch.get(), iterations, tol);
  });
}
}  // namespace dither

STABLE_TORCH_LIBRARY_FRAGMENT(DITHER_NS, m) {
  m.def("attention_lse_(Tensor q, Tensor k, Tensor? attn_mask, bool is_causal, float scale, Tensor(a!) out) -> ()");
  m.def(
      "attention_colsum_(Tensor q, Tensor k, Tensor? weight, Tensor? lse, Tensor? attn_mask, bool is_causal, float scale, "
      "Tensor(a!)? lse_out, Tensor(b!) out) -> ()");
  m.def(
      "attention_pagerank_(Tensor q, Tensor k, Tensor init, Tensor? attn_mask, bool is_causal, float scale, int iterations, "
      "float tol, Tensor(a!) out) -> ()");
}
#if !defined(DITHER_EMULATE)
STABLE_TORCH_LIBRARY_IMPL(DITHER_NS, CPU, m) {
  m.impl("attention_lse_", TORCH_BOX(&dither::attention_lse_<dither::Device::cpu>));
  m.impl("attention_colsum_", TORCH_BOX(&dither::attention_colsum_<dither::Device::cpu>));
  m.impl("attention_pagerank_", TORCH_BOX(&dither::attention_pagerank_));
}
#endif
#if defined(DITHER_CUDA) || defined(DITHER_EMULATE)
STABLE_TORCH_LIBRARY_IMPL(DITHER_NS, DITHER_CUDA_KEY, m) {
  m.impl("attention_lse_", TORCH_BOX(&dither::attention_lse_<dither::Device::cuda>));
  m.impl("attention_colsum_", TORCH_BOX(&dither::attention_colsum_<dither::Device::cuda>));
}
#endif
