// One optimizer step over many tensors. What happens to an element, in this order: unscale, private noise, clip, Grokfast,
// gradient noise, pull, decay, rule, parameter noise, mask, rounding. All but the rule are run-time branches on the constants
// derived here.
#pragma once
#include "../common/address.h"
#include "../common/cpu.h"
#include "../common/dtype.h"
#include "../common/stream.h"
#include "rules.h"

namespace dither {

// Gradient noise has streams of its own, so that it never meets the noise of the rule (SGLD).
constexpr uint32_t kGradientNoise = 0x80000000u;

// The key of private noise: in no state and in no memory of the device, it travels with the arguments of the kernels.
struct PrivateKey {
  uint32_t words[8];
  bool chacha;
};

// Constants around the rule, for one tensor at one step.
template <class T>
struct Around {
  T scale;               // g *= scale: unscaling, sign of maximize, global-norm clip
  T std, gain;           // g = (g + std z) gain: private noise on a sum of clipped gradients (Abadi et al. 2016), algorithm 1
  T clip;                // |g| <= clip, or infinity
  T ema_take, ema_gain;  // h += ema_take (g - h), g += ema_gain h: Grokfast (Lee et al. 2024), eq. 4
  T noise;               // g += noise z: annealed gradient noise (Neelakantan et al. 2015), variance eta / (1 + t)^gamma
  T pull;                // g += pull p where the mask is 0: SR-STE (Zhou et al. 2021), eq. 9; then masks do not freeze
  T l2;                  // g += l2 p
  T keep;                // p *= keep
  T kick;                // p += kick z after the rule
  uint32_t seed[2], stream, time, release;
  bool skip, first, stochastic;
  bool gradient;  // more than scale, clip and pull happens to g before the rule

  static constexpr Kind normal = sizeof(T) == 8 ? Kind::normal64 : Kind::normal32;
  DITHER_HD Address address(Kind kind, uint32_t use = 0) const { return {{seed[0], seed[1]}, stream | use, time, kind}; }
  DITHER_HD Address address(const PrivateKey& key) const {
    Address a{{}, stream, release, normal};
    for (int i = 0; i < 8; ++i) a.key[i] = key.words[i];
    return a;
  }
};

template <class R, class T>
struct Constants {
  R rule;
  Around<T> around;
};

template <class T>
DITHER_HD T clamp(T x, T bound) {  // NaN stays
  return x < -bound ? -bound : (x > bound ? bound : x);
}

// What all tensors of a call have in common, scalars that may live on the device among it.
struct Shared {
  const double* sum_of_squares;  // of all gradients, still scaled; nullptr: no global clip, no finite check
  const float *grad_scale, *found_inf;
  const double* releases;  // the number of this release, the time of private noise; nullptr: there is none
  PrivateKey key;
};
// One tensor's clock and hyperparameters.
struct Clock {
  Hyper hyper;
  const float* lr;  // overrides hyper.lr
  void* step;       // float or double, counts completed steps; updated unless the step is skipped
  void* product;    // NAdam's product of momenta, or nullptr
  bool wide;
  uint32_t seed[2], stream;

  DITHER_HD double read(const void* x) const {
    return wide ? *static_cast<const double*>(x) : double(*static_cast<const float*>(x));
  }
  DITHER_HD void write(void* x, double y) const {
    if (wide) *static_cast<double*>(x) = y;
    else *static_cast<float*>(x) = float(y);
  }
  DITHER_HD double done() const { return read(step); }
  DITHER_HD void advance() const { write(step, done() + 1); }
};

template <template <class> class R, class T>
DITHER_HD Constants<R<T>, T> derive(const Clock& clock, const Shared& shared) {
  Hyper h = clock.hyper;
  if (clock.lr) h.lr = double(*clock.lr);
  double product = clock.product ? clock.read(clock.product) : 1.0;
  const int64_t t = int64_t(clock.done()) + 1;

  bool skip = shared.found_inf && *shared.found_inf != 0.0f;
  double scale = shared.grad_scale ? 1.0 / double(*shared.grad_scale) : 1.0;
  if (shared.sum_of_squares) {
    const double sum = *shared.sum_of_squares;
    if (h.skip_nonfinite != 0 && !(sum - sum == 0)) skip = true;
    if (h.max_norm > 0) {  // torch.nn.utils.clip_grad_norm_
      const double norm = square_root(sum) * scale, factor = h.max_norm / (norm + 1e-6);
      scale *= factor < 1 ? factor : (factor >= 1 ? 1 : factor);
    }
  }
  if (h.maximize != 0) scale = -scale;
  const bool noised = shared.releases && h.private_std > 0;
  if (!noised) scale *= h.private_scale;

  Around<T> a{};
  a.scale = T(scale);
  if (noised) {  // a time that would repeat hides nothing: then everything becomes NaN
    const double release = *shared.releases;
    const bool valid = release >= 0 && release < 0x1p32;
    a.std = valid ? T(h.private_std) : T(__builtin_nan(""));
    a.gain = T(h.private_scale);
    a.release = valid ? uint32_t(release) : 0;
  }
  a.clip = h.clip_value > 0 ? T(h.clip_value) : T(__builtin_inf());
  a.first = t == 1;
  a.ema_take = T(1 - h.grokfast_alpha);
  a.ema_gain = T(h.grokfast_lamb);
  a.noise = h.noise_eta > 0 ? T(square_root(h.noise_eta * real_power(double(t), -h.noise_gamma))) : T(0);
  a.pull = T(h.srste);
  const bool coupled = h.decoupled == 0;
  a.l2 = coupled ? T(h.weight_decay / (h.temperature > 0 ? h.data_size : 1)) : T(0);
  a.keep = coupled || (KeepsPAtFirst<R<T>> && t == 1) ? T(1) : T(1 - h.lr * h.weight_decay);
  a.kick = h.temperature > 0 ? T(square_root(h.lr * h.temperature)) : T(0);
  a.seed[0] = clock.seed[0];
  a.seed[1] = clock.seed[1];
  a.stream = clock.stream;
  a.time = uint32_t(t - 1);
  a.skip = skip;
  a.stochastic = h.stochastic_rounding != 0;
  a.gradient = noised || h.grokfast_lamb != 0 || a.noise != T(0) || a.l2 != T(0);
  Constants<R<T>, T> constants{R<T>(h, t, product), a};
  if (!skip) {
    clock.advance();
    if (clock.product) clock.write(clock.product, product);
  }
  return constants;
}

// One tensor's memory. All pointers walk the same element order.
struct Slot {
  void* p;
  const void* g;
  void* state[kMaxStates];
  void* ema;            // Grokfast, or nullptr
  const uint8_t* mask;  // bit 1 = kept, or nullptr
  int64_t numel;
  int64_t start, run, pitch;  // element i has address start + i / run * pitch + i % run
  DType p_type, g_type, state_type[kMaxStates], ema_type;

  DITHER_HD uint64_t element(int64_t i) const { return uint64_t(run >= numel ? start + i : start + i / run * pitch + i % run); }
};

constexpr int64_t kUnit = 4096;           // elements that a CPU thread takes at least; a multiple of 8 for the mask
constexpr int64_t kConstantsBytes = 256;  // room for any Constants<R, T>

DITHER_PER_ISA(void step_range(Rule rule, bool wide, const Slot& slot, const Shared& shared, const void* constants, int64_t lo,
                               int64_t hi))
// constants: device memory for count * kConstantsBytes
int step_cuda(Rule rule, bool wide, const Slot* slots, const Clock* clocks, int64_t count, const Shared& shared,
              void* constants, int multiprocessors, Stream stream);

template <bool kWide, class F>
inline auto with_rule(Rule rule, F&& f) {
  using T = typename ComputeType<kWide>::type;
  switch (rule) {
#define X(name, type) \
  case Rule::name: return f.template operator()<type, T>();
    DITHER_RULES(X)
#undef X
  }
  return f.template operator()<Sgd, T>();
}
}  // namespace dither
