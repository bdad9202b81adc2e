#include "quantile.h"

#include "../common/torch.h"

namespace dither {
// Digit by digit from the top. What shares the highest digit is set aside: the later digits see only that.
template <class S>
static Computed<S> quantile(const Quantile& q, int64_t sample, std::vector<Key<S>>& aside) {
  using K = Key<S>;
  using T = Computed<S>;
  constexpr int top = Magnitude<T>::bits - kDigitBits, ways = 4;  // neighbours are alike: they count apart
  const S* x = static_cast<const S*>(q.x) + sample * q.sample;
  int64_t rank = q.below;
  const auto digit_of = [&](const auto& counts) {
    K digit = 0;
    for (; rank >= counts(digit); ++digit) rank -= counts(digit);
    return digit;
  };
  K largest = 0;
  int64_t count[ways][kDigits] = {};
  for (int64_t i = 0; i < q.sample; ++i) {
    const K key = magnitude(x[i]);
    largest = key > largest ? key : largest;
    ++count[i % ways][key >> top];
  }
  const K first = digit_of([&](K k) { return count[0][k] + count[1][k] + count[2][k] + count[3][k]; });
  aside.clear();
  for (int64_t i = 0; i < q.sample; ++i)
    if (const K key = magnitude(x[i]); key >> top == first) aside.push_back(key);

  K prefix = first;
  int64_t equal = 0;
  for (int known = top; known > 0;) {
    const int shift = known > kDigitBits ? known - kDigitBits : 0;
    const K digits = (K(1) << (known - shift)) - 1;
    int64_t found[kDigits] = {};
    for (const K key : aside) found[key >> shift & digits] += key >> known == prefix;
    const K digit = digit_of([&](K k) { return found[k]; });
    equal = found[digit];
    prefix = prefix << (known - shift) | digit;
    known = shift;
  }
  K above = prefix;
  if (q.above != q.below && rank + 1 >= equal) {
    above = ~K(0);
    const auto see = [&](K key) { above = key > prefix && key < above ? key : above; };
    for (const K key : aside) see(key);
    if (above == ~K(0))
      for (int64_t i = 0; i < q.sample; ++i) see(magnitude(x[i]));
  }
  return quantile_of<T>(prefix, above, largest, q.weight);
}

template <Device device>
static void quantile_(const Tensor& out, const Tensor& x, double level) {
  const char* op = "quantile_";
  Quantile q{};
  q.type = checked_type(op, "x", x);
  DITHER_CHECK(x.dim() > 0, op, ": x has shape [], expected [samples, ...]");
  DITHER_CHECK(x.is_contiguous(), op, ": x must be contiguous");
  DITHER_CHECK(level >= 0 && level <= 1, op, ": q is ", level, ", expected 0 <= q <= 1");
  q.samples = x.size(0);
  const bool wide = q.type == DType::f64;
  check_out(op, "out", out, wide ? ScalarType::Double : ScalarType::Float, {q.samples}, "x", x);
  if (q.samples == 0) return;
  q.sample = x.numel() / q.samples;
  DITHER_CHECK(q.sample > 0, op, ": x has shape ", shape_of(x), ", expected at least one element in a sample");
  // The place as torch.quantile finds it, in the type of x, where that has enough digits.
  const double last = double(q.sample - 1);
  const double place = wide || last > 0x1p24 ? level * last : double(float(level) * float(last));
  q.below = std::min(int64_t(place), q.sample - 1);
  q.weight = place - double(q.below);
  q.above = q.weight > 0 ? std::min(q.below + 1, q.sample - 1) : q.below;
  q.x = x.const_data_ptr();
  q.out = out.mutable_data_ptr();
  if constexpr (device == Device::cpu) {
    parallel(q.samples, std::max<int64_t>(1, (1 << 14) / q.sample), [&](int64_t lo, int64_t hi) {
      with_type(q.type, [&]<class S>(S) {
        std::vector<Key<S>> aside;
        for (int64_t b = lo; b < hi; ++b) static_cast<Computed<S>*>(q.out)[b] = quantile<S>(q, b, aside);
      });
    });
  } else {
    DITHER_CHECK(q.sample >> 31 == 0 && q.samples >> 31 == 0, op, ": x has ", q.samples, " samples of ", q.sample,
                 " elements, expected less than 2^31 of each");
    const auto guard = device_guard(x);
    DITHER_CUDA_OK(op, quantile_cuda(q, current_stream(x)));
  }
}
}  // namespace dither

STABLE_TORCH_LIBRARY_FRAGMENT(DITHER_NS, m) { m.def("quantile_(Tensor(a!) out, Tensor x, float q) -> ()"); }
#if !defined(DITHER_EMULATE)
STABLE_TORCH_LIBRARY_IMPL(DITHER_NS, CPU, m) { m.impl("quantile_", TORCH_BOX(&dither::quantile_<dither::Device::cpu>)); }
#endif
#if defined(DITHER_CUDA) || defined(DITHER_EMULATE)
STABLE_TORCH_LIBRARY_IMPL(DITHER_NS, DITHER_CUDA_KEY, m) {
  m.impl("quantile_", TORCH_BOX(&dither::quantile_<dither::Device::cuda>));
}
#endif
