#include "merge.h"

#include <cstring>

#include "../common/torch.h"

namespace dither {
constexpr int64_t kWorthThreads = 1 << 16;  // bytes
static int64_t grain(int64_t bytes) { return std::max<int64_t>(1, kWorthThreads / std::max<int64_t>(1, bytes)); }
static const int64_t* ints(const Tensor& t) { return static_cast<const int64_t*>(t.const_data_ptr()); }
static int64_t* ints_of(const Tensor& t) { return static_cast<int64_t*>(t.mutable_data_ptr()); }

static void check_index(const char* op, const char* name, const Tensor& index, const Ints& shape, const char* other,
                        const Tensor& like) {
  const auto sizes = index.sizes();
  DITHER_CHECK(index.scalar_type() == ScalarType::Long && std::equal(shape.begin(), shape.end(), sizes.begin(), sizes.end()),
               op, ": ", name, " is ", name_of(index.scalar_type()), " of shape ", shape_of(index),
               ", expected int64 of shape ", shape_of(shape));
  check_device(op, name, index, other, like);
}
static void check_range(const char* op, const char* name, const Tensor& index, int64_t count) {
  const int64_t* i = ints(index);
  for (int64_t k = 0; k < index.numel(); ++k)
    DITHER_CHECK(0 <= i[k] && i[k] < count, op, ": ", name, " contains ", i[k], ", expected 0 <= ", name, " < ", count);
}

template <Device device>
static void gather_tokens_(const Tensor& x, const Tensor& index, const Tensor& out) {
  const char* op = "gather_tokens_";
  DITHER_CHECK(x.dim() == 3, op, ": x has shape ", shape_of(x), ", expected [batch, tokens, channels]");
  const int64_t taken = index.dim() == 2 ? index.size(1) : 0;
  check_index(op, "index", index, {x.size(0), taken}, "x", x);
  check_out(op, "out", out, x.scalar_type(), {x.size(0), taken, x.size(2)}, "x", x);
  if (out.numel() == 0) return;
  const Tensor rows = in_order(x), places = in_order(index);
  const Gather g{rows.const_data_ptr(),
                 ints(places),
                 out.mutable_data_ptr(),
                 x.size(0),
                 x.size(1),
                 taken,
                 x.size(2) * int64_t(x.element_size())};
  if constexpr (device == Device::cpu) {
    check_range(op, "index", places, g.count);
    parallel(g.batch * taken, grain(g.bytes), [&](int64_t lo, int64_t hi) {
      for (int64_t j = lo; j < hi; ++j)
        std::memcpy(static_cast<char*>(g.out) + j * g.bytes,
                    static_cast<const char*>(g.x) + (j / taken * g.count + g.index[j]) * g.bytes, g.bytes);
    });
  } else {
    const auto guard = device_guard(x);
    DITHER_CUDA_OK(op, gather_cuda(g, current_stream(x)));
  }
}

template <Device device>
static void token_segments_(const Tensor& index, const Tensor& order, const Tensor& start) {
  const char* op = "token_segments_";
  DITHER_CHECK(index.scalar_type() == ScalarType::Long && index.dim() == 2, op, ": index is ", name_of(index.scalar_type()),
               " of shape ", shape_of(index), ", expected int64 of shape [batch, tokens]");
  const int64_t batch = index.size(0), count = index.size(1), ends = start.dim() == 2 ? start.size(1) : 0;
  check_out(op, "order", order, ScalarType::Long, {batch, count}, "index", index);
  check_out(op, "start", start, ScalarType::Long, {batch, std::max<int64_t>(1, ends)}, "index", index);
  if (batch == 0) return;
  const Tensor places = in_order(index);
  const Segments s{ints(places), ints_of(order), ints_of(start), batch, count, ends - 1};
  if constexpr (device == Device::cpu) {
    check_range(op, "index", places, s.places);
    parallel(batch, grain(32 * count), [&](int64_t lo, int64_t hi) {
      for (int64_t b = lo; b < hi; ++b) {
        const int64_t* at = s.index + b * count;
        int64_t *begin = s.start + b * ends, *to = s.order + b * count;
        std::fill(begin, begin + ends, 0);
        for (int64_t i = 0; i < count; ++i) ++begin[at[i] + 1];
        for (int64_t j = 1; j < ends; ++j) begin[j] += begin[j - 1];
        for (int64_t i = 0; i < count; ++i) to[begin[at[i]]++] = i;
        for (int64_t j = ends - 1; j > 0; --j) begin[j] = begin[j - 1];
        begin[0] = 0;
      }
    });
  } else {
    const auto guard = device_guard(index);
    DITHER_CUDA_OK(op, segments_cuda(s, current_stream(index)));
  }
}

template <Device device>
static void merge_tokens_(const Tensor& x, const Tensor& order, const Tensor& start, const std::optional<Tensor>& size,
                          std::string name, const Tensor& out) {
  const char* op = "merge_tokens_";
  const DType type = checked_type(op, "x", x);
  DITHER_CHECK(x.dim() == 3, op, ": x has shape ", shape_of(x), ", expected [batch, tokens, channels]");
  const int64_t batch = x.size(0), count = x.size(1), ends = start.dim() == 2 ? std::max<int64_t>(1, start.size(1)) : 1;
  check_index(op, "order", order, {batch, count}, "x", x);
  check_index(op, "start", start, {batch, ends}, "x", x);
  check_out(op, "out", out, x.scalar_type(), {batch, ends - 1, x.size(2)}, "x", x);
  constexpr const char* kModes[] = {"sum", "mean", "amax", "amin"};
  const auto mode = std::find(std::begin(kModes), std::end(kModes), name) - std::begin(kModes);
  DITHER_CHECK(mode < 4, op, ": reduce is ", name, ", expected sum, mean, amax or amin");
  if (size) {
    const ScalarType wide = type == DType::f64 ? ScalarType::Double : ScalarType::Float;
    DITHER_CHECK(size->scalar_type() == wide && size->dim() == 2 && size->size(0) == batch && size->size(1) == count, op,
                 ": size is ", name_of(size->scalar_type()), " of shape ", shape_of(*size), ", expected ", name_of(wide),
                 " of shape [", batch, ", ", count, "]");
    check_device(op, "size", *size, "x", x);
  }
  if (out.numel() == 0) return;
  const Tensor rows = in_order(x), places = in_order(order), begins = in_order(start);
  const Tensor sizes = size ? in_order(*size) : rows;
  const Merge m{rows.const_data_ptr(),
                ints(places),
                ints(begins),
                size ? sizes.const_data_ptr() : nullptr,
                out.mutable_data_ptr(),
                batch,
                count,
                ends - 1,
                x.size(2),
                MergeMode(mode),
                type};
  if constexpr (device == Device::cpu) {
    check_range(op, "order", places, count);
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t j = 0; j < ends - 1; ++j) {
        const int64_t from = m.start[b * ends + j], to = m.start[b * ends + j + 1];
        DITHER_CHECK(0 <= from && from <= to && to <= count, op, ": start contains ", from, " before ", to,
                     ", expected rising numbers from 0 to ", count);
      }
    const auto run = DITHER_PICK_ISA(merge_rows);
    parallel(batch * m.places, grain(m.channels * size_of(type)), [&](int64_t lo, int64_t hi) { run(m, lo, hi); });
  } else {
    const auto guard = device_guard(x);
    DITHER_CUDA_OK(op, merge_cuda(m, current_stream(x)));
  }
}

template <Device device>
static void merge_plan_(const Tensor& top, const Tensor& match, const Tensor& a_places, const Tensor& b_places,
                        const Tensor& kept, const Tensor& src, const Tensor& dst, const Tensor& index) {
  const char* op = "merge_plan_";
  DITHER_CHECK(match.dim() == 2 && match.scalar_type() == ScalarType::Long, op, ": match is ", name_of(match.scalar_type()),
               " of shape ", shape_of(match), ", expected int64 of shape [batch, a]");
  const int64_t batch = match.size(0), merged = top.dim() == 2 ? top.size(1) : 0, count = index.dim() == 2 ? index.size(1) : 0;
  check_index(op, "top", top, {batch, merged}, "match", match);
  check_index(op, "a_places", a_places, {match.size(1)}, "match", match);
  check_index(op, "b_places", b_places, {b_places.numel()}, "match", match);
  check_out(op, "index", index, ScalarType::Long, {batch, count}, "match", match);
  DITHER_CHECK(merged <= count, op, ": top has ", merged, " tokens, expected at most ", count);
  check_out(op, "kept", kept, ScalarType::Long, {batch, count - merged}, "match", match);
  check_out(op, "src", src, ScalarType::Long, {batch, merged}, "match", match);
  check_out(op, "dst", dst, ScalarType::Long, {batch, merged}, "match", match);
  if (batch * count == 0) return;
  const Tensor chosen = in_order(top), matches = in_order(match), a = in_order(a_places), b = in_order(b_places);
  const Plan p{ints(chosen), ints(matches), ints(a),       ints(b),      batch,        merged,        match.size(1),
               b.numel(),    count,         ints_of(kept), ints_of(src), ints_of(dst), ints_of(index)};
  if constexpr (device == Device::cpu) {
    check_range(op, "top", chosen, p.a_count);
    if (merged) check_range(op, "match", matches, p.b_count);
    check_range(op, "a_places", a, count);
    check_range(op, "b_places", b, count);
    parallel(batch, grain(16 * count), [&](int64_t lo, int64_t hi) {
      for (int64_t s = lo; s < hi; ++s) {
        const int64_t *first = p.top + s * merged, *to = p.match + s * p.a_count;
        int64_t *at = p.index + s * count, *kept_at = p.kept + s * (count - merged), n = 0;
        std::fill(at, at + count, 0);
        for (int64_t t = 0; t < merged; ++t) at[p.src[s * merged + t] = p.a_places[first[t]]] = -1;
        for (int64_t i = 0; i < count; ++i)
          if (at[i] == 0 && n < count - merged) {
            kept_at[n] = i;
            at[i] = n++;
          }
        for (int64_t t = 0; t < merged; ++t) at[p.src[s * merged + t]] = p.dst[s * merged + t] = at[p.b_places[to[first[t]]]];
      }
    });
  } else {
    const auto guard = device_guard(match);
    DITHER_CUDA_OK(op, plan_cuda(p, current_stream(match)));
  }
}
}  // namespace dither

STABLE_TORCH_LIBRARY_FRAGMENT(DITHER_NS, m) {
  m.def("gather_tokens_(Tensor x, Tensor index, Tensor(a!) out) -> ()");
  m.def("token_segments_(Tensor index, Tensor(a!) order, Tensor(b!) start) -> ()");
  m.def("merge_tokens_(Tensor x, Tensor order, Tensor start, Tensor? size, str reduce, Tensor(a!) out) -> ()");
  m.def(
      "merge_plan_(Tensor top, Tensor match, Tensor a_places, Tensor b_places, Tensor(a!) kept, Tensor(b!) src, "
      "Tensor(c!) dst, Tensor(d!) index) -> ()");
}
#if !defined(DITHER_EMULATE)
STABLE_TORCH_LIBRARY_IMPL(DITHER_NS, CPU, m) {
  m.impl("gather_tokens_", TORCH_BOX(&dither::gather_tokens_<dither::Device::cpu>));
  m.impl("token_segments_", TORCH_BOX(&dither::token_segments_<dither::Device::cpu>));
  m.impl("merge_tokens_", TORCH_BOX(&dither::merge_tokens_<dither::Device::cpu>));
  m.impl("merge_plan_", TORCH_BOX(&dither::merge_plan_<dither::Device::cpu>));
}
#endif
#if defined(DITHER_CUDA) || defined(DITHER_EMULATE)
STABLE_TORCH_LIBRARY_IMPL(DITHER_NS, DITHER_CUDA_KEY, m) {
  m.impl("gather_tokens_", TORCH_BOX(&dither::gather_tokens_<dither::Device::cuda>));
  m.impl("token_segments_", TORCH_BOX(&dither::token_segments_<dither::Device::cuda>));
  m.impl("merge_tokens_", TORCH_BOX(&dither::merge_tokens_<dither::Device::cuda>));
  m.impl("merge_plan_", TORCH_BOX(&dither::merge_plan_<dither::Device::cuda>));
}
#endif
