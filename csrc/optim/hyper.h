// The hyperparameters of one param group, as the host passes them: one row of doubles, in this order.
#pragma once

// clang-format off
#define DITHER_HYPER(X)                                                                                        \
  X(lr) X(beta1) X(beta2) X(eps) X(weight_decay) X(decoupled) X(maximize) X(momentum) X(dampening) X(nesterov) \
  X(lr_decay) X(momentum_decay) X(rectify) X(data_size) X(temperature) X(max_norm) X(clip_value) X(noise_eta)  \
  X(noise_gamma) X(grokfast_alpha) X(grokfast_lamb) X(stochastic_rounding) X(skip_nonfinite) X(srste)          \
  X(private_std) X(private_scale)
// clang-format on

namespace dither {
struct Hyper {
#define X(name) double name;
  DITHER_HYPER(X)
#undef X
};
#define X(name) +1
constexpr int kHyper = 0 DITHER_HYPER(X);
#undef X
static_assert(sizeof(Hyper) == kHyper * sizeof(double));
}  // namespace dither
