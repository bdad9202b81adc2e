#include "topk.h"

#include "../common/torch.h"

namespace dither {
// Digit by digit from the top: which key is the k-th, and how many equal to it are taken.
template <class Key>
static std::pair<Key, int64_t> threshold(const std::vector<Key>& keys, int64_t k) {
  constexpr int kDigit = 11, kBits = 8 * sizeof(Key);
  Key prefix = 0, known = 0;  // known: the bits that are settled
  for (int shift = kBits - kDigit;; shift = std::max(0, shift - kDigit)) {
    int32_t histogram[1 << kDigit] = {};
    const Key digit = Key((1 << kDigit) - 1) << shift & ~known;
    for (const Key key : keys)
      if ((key & known) == prefix) ++histogram[(key & digit) >> shift];
    int64_t at = (digit >> shift);
    for (; histogram[at] < k; --at) k -= histogram[at];
    prefix |= Key(at) << shift;
    known |= digit;
    if (shift == 0) return {prefix, k};
  }
}

template <class S>
static void topk_row(const TopK& t, int64_t row, std::vector<OrderKey<S>>& keys) {
  for (int64_t i = 0; i < t.count; ++i) keys[i] = key_at<S>(t, row, i);
  auto [least, ties] = threshold(keys, t.k);
  int64_t* out = t.indices + row * t.k;
  for (int64_t i = 0, n = 0; n < t.k; ++i) {
    const bool tie = keys[i] == least && ties > 0;
    out[n] = i;
    n += keys[i] > least || tie;
    ties -= tie;
  }
}

template <Device device>
static void topk_tokens_(const Tensor& scores, int64_t protect, const std::optional<Tensor>& mask, const Tensor& indices) {
  const char* op = "topk_tokens_";
  const DType type = checked_type(op, "scores", scores);
  DITHER_CHECK(scores.dim() == 2, op, ": scores has shape ", shape_of(scores), ", expected [batch, tokens]");
  const int64_t batch = scores.size(0), count = scores.size(1), k = indices.dim() == 2 ? indices.size(1) : 0;
  check_out(op, "indices", indices, ScalarType::Long, {batch, k}, "scores", scores);
  DITHER_CHECK(k <= count, op, ": k is ", k, ", expected at most ", count, ", the number of tokens");
  DITHER_CHECK(0 <= protect && protect <= k, op, ": protect is ", protect, ", expected 0 <= protect <= k = ", k);
  DITHER_CHECK(count >> 30 == 0, op, ": scores has ", count, " tokens, expected fewer than 2^30");
  const Tensor dense = in_order(scores);
  TopK t{dense.const_data_ptr(), nullptr, {}, batch, count, k, protect, nullptr, type};
  if (mask) {
    DITHER_CHECK(
        mask->scalar_type() == ScalarType::Bool && mask->dim() == 2 && mask->size(0) == batch && mask->size(1) == count, op,
        ": mask is ", name_of(mask->scalar_type()), " of shape ", shape_of(*mask), ", expected bool of shape [", batch, ", ",
        count, "]");
    check_device(op, "mask", *mask, "scores", scores);
    t.mask = static_cast<const uint8_t*>(mask->const_data_ptr());
    for (int d = 0; d < 2; ++d) t.mask_stride[d] = mask->stride(d);
  }
  if (batch * k == 0) return;
  t.indices = static_cast<int64_t*>(indices.mutable_data_ptr());
  if constexpr (device == Device::cpu) {
    with_type(type, [&]<class S>(S) {
      parallel(batch, std::max<int64_t>(1, (1 << 14) / count), [&](int64_t lo, int64_t hi) {
        std::vector<OrderKey<S>> keys(count);
        for (int64_t row = lo; row < hi; ++row) topk_row<S>(t, row, keys);
      });
    });
  } else {
    const auto guard = device_guard(scores);
    DITHER_CUDA_OK(op, topk_cuda(t, current_stream(scores)));
  }
}
}  // namespace dither

STABLE_TORCH_LIBRARY_FRAGMENT(DITHER_NS, m) {
  m.def("topk_tokens_(Tensor scores, int protect, Tensor? mask, Tensor(a!) indices) -> ()");
}
#if !defined(DITHER_EMULATE)
STABLE_TORCH_LIBRARY_IMPL(DITHER_NS, CPU, m) { m.impl("topk_tokens_", TORCH_BOX(&dither::topk_tokens_<dither::Device::cpu>)); }
#endif
#if defined(DITHER_CUDA) || defined(DITHER_EMULATE)
STABLE_TORCH_LIBRARY_IMPL(DITHER_NS, DITHER_CUDA_KEY, m) {
  m.impl("topk_tokens_", TORCH_BOX(&dither::topk_tokens_<dither::Device::cuda>));
}
#endif
