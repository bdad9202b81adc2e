// Every optimizer's update, once: constants of step t from the group's hyperparameters in double, then p, g and the states of
// one element. Gradient decay, decoupled decay, clipping and noise happen around the rule (step.h); p arrives decayed.
//
// Letters: g gradient, m and v moving averages of g and g^2, eta = lr, bc1 = 1 - beta1^t, bc2 = 1 - beta2^t, t = 1, 2, ...
// 1 - beta is rounded once from double: 1 - 0.999f is off by 1e-5.
#pragma once
#include "../common/scalar.h"
#include "hyper.h"

namespace dither {

template <class T>
DITHER_HD T lerp(T from, T to, T weight) {
  return from + weight * (to - from);
}

// Stochastic gradient descent; also stochastic gradient Langevin dynamics (Welling & Teh 2011, eq. 4) with half steps along
// the gradient of the whole data set and noise from step.h.
template <class T>
struct Sgd {
  static constexpr int states = 0;
  T step;
  DITHER_HD Sgd(const Hyper& h, int64_t, double&) : step(T(h.temperature > 0 ? 0.5 * h.lr * h.data_size : h.lr)) {}
  DITHER_HD void operator()(T& p, T g) const { p -= step * g; }
};

// Momentum as in torch.optim.SGD: the buffer begins as g; Nesterov looks ahead.
template <class T>
struct Momentum {
  static constexpr int states = 1;
  T keep, take, from_g, from_buffer, step;
  DITHER_HD Momentum(const Hyper& h, int64_t t, double&)
      : keep(t == 1 ? T(0) : T(h.momentum)),
        take(t == 1 ? T(1) : T(1 - h.dampening)),
        from_g(h.nesterov != 0 ? T(1) : T(0)),
        from_buffer(h.nesterov != 0 ? T(h.momentum) : T(1)),
        step(T(h.lr)) {}
  DITHER_HD void operator()(T& p, T g, T& buffer) const {
    buffer = keep * buffer + take * g;
    p -= step * (from_g * g + from_buffer * buffer);
  }
};

// Adam: Kingma & Ba 2015, algorithm 1; AdamW: Loshchilov & Hutter 2019, algorithm 2.
template <class T>
struct Adam {
  static constexpr int states = 2;
  T take1, beta2, take2, eps;
  T step;     // eta / bc1
  T v_scale;  // 1 / sqrt(bc2); with beta2 = 1, where v stands still, 1
  DITHER_HD Adam(const Hyper& h, int64_t t, double&)
      : take1(T(1 - h.beta1)),
        beta2(T(h.beta2)),
        take2(T(1 - h.beta2)),
        eps(T(h.eps)),
        step(T(h.lr / (1 - power(h.beta1, t)))),
        v_scale(T(h.beta2 < 1 ? 1 / square_root(1 - power(h.beta2, t)) : 1)) {}
  DITHER_HD void moments(T g, T& m, T& v) const {
    m = lerp(m, g, take1);
    v = beta2 * v + take2 * (g * g);
  }
  DITHER_HD void operator()(T& p, T g, T& m, T& v) const {
    moments(g, m, v);
    p -= step * m / (square_root(v) * v_scale + eps);
  }
};

// AMSGrad: Reddi, Kale & Kumar 2018, algorithm 2, with torch's bias correction of the largest v.
template <class T>
struct AmsGrad : Adam<T> {
  static constexpr int states = 3;
  using Adam<T>::Adam;
  DITHER_HD void operator()(T& p, T g, T& m, T& v, T& v_max) const {
    this->moments(g, m, v);
    v_max = maximum(v_max, v);
    p -= this->step * m / (square_root(v_max) * this->v_scale + this->eps);
  }
};

// AdaMax: Kingma & Ba 2015, algorithm 2; eps as in torch.optim.Adamax.
template <class T>
struct Adamax {
  static constexpr int states = 2;
  T take1, beta2, eps, step;
  DITHER_HD Adamax(const Hyper& h, int64_t t, double&)
      : take1(T(1 - h.beta1)), beta2(T(h.beta2)), eps(T(h.eps)), step(T(h.lr / (1 - power(h.beta1, t)))) {}
  DITHER_HD void operator()(T& p, T g, T& m, T& norm) const {
    m = lerp(m, g, take1);
    norm = maximum(beta2 * norm, absolute(g) + eps);
    p -= step * m / norm;
  }
};

// NAdam: Dozat 2016, with torch's momentum schedule mu_t = beta1 (1 - 0.96^(t psi) / 2). product: of mu_1 ... mu_t.
template <class T>
struct NAdam {
  static constexpr int states = 2;
  T take1, beta2, take2, eps, v_scale, step_g, step_m;
  DITHER_HD NAdam(const Hyper& h, int64_t t, double& product)
      : take1(T(1 - h.beta1)),
        beta2(T(h.beta2)),
        take2(T(1 - h.beta2)),
        eps(T(h.eps)),
        v_scale(T(1 / (1 - power(h.beta2, t)))) {
    const double mu = h.beta1 * (1 - 0.5 * real_power(0.96, double(t) * h.momentum_decay));
    const double mu_next = h.beta1 * (1 - 0.5 * real_power(0.96, double(t + 1) * h.momentum_decay));
    product *= mu;
    step_g = T(h.lr * (1 - mu) / (1 - product));
    step_m = T(h.lr * mu_next / (1 - product * mu_next));
  }
  DITHER_HD void operator()(T& p, T g, T& m, T& v) const {
    m = lerp(m, g, take1);
    v = beta2 * v + take2 * (g * g);
    p -= (step_g * g + step_m * m) / (square_root(v * v_scale) + eps);
  }
};

// Adagrad: Duchi, Hazan & Singer 2011.
template <class T>
struct Adagrad {
  static constexpr int states = 1;
  T eps, step;
  DITHER_HD Adagrad(const Hyper& h, int64_t t, double&) : eps(T(h.eps)), step(T(h.lr / (1 + double(t - 1) * h.lr_decay))) {}
  DITHER_HD void operator()(T& p, T g, T& sum) const {
    sum += g * g;
    p -= step * g / (square_root(sum) + eps);
  }
};

// RMSprop: Tieleman & Hinton 2012; centered: Graves 2013, eq. 38-41. beta2 is torch's alpha.
template <class T, bool kCentered, bool kMomentum>
struct RmsProp {
  static constexpr int states = 1 + kCentered + kMomentum;
  T alpha, take, eps, momentum, step;
  DITHER_HD RmsProp(const Hyper& h, int64_t, double&)
      : alpha(T(h.beta2)), take(T(1 - h.beta2)), eps(T(h.eps)), momentum(T(h.momentum)), step(T(h.lr)) {}
  template <class... Rest>
  DITHER_HD void operator()(T& p, T g, T& v, Rest&... rest) const {
    T* const more[] = {&rest..., nullptr};  // momentum buffer, then mean gradient
    v = alpha * v + take * (g * g);
    T variance = v;
    if constexpr (kCentered) {
      T& mean = *more[kMomentum];
      mean = lerp(mean, g, take);
      variance = v - mean * mean;
    }
    T update = g / (square_root(variance) + eps);
    if constexpr (kMomentum) update = *more[0] = momentum * *more[0] + update;
    p -= step * update;
  }
};

// Lion: Chen et al. 2023, algorithm 2.
template <class T>
struct Lion {
  static constexpr int states = 1;
  T beta1, take1, beta2, take2, step;
  DITHER_HD Lion(const Hyper& h, int64_t, double&)
      : beta1(T(h.beta1)), take1(T(1 - h.beta1)), beta2(T(h.beta2)), take2(T(1 - h.beta2)), step(T(h.lr)) {}
  DITHER_HD void operator()(T& p, T g, T& m) const {
    const T u = beta1 * m + take1 * g;
    p -= u > T(0) ? step : (u < T(0) ? -step : u);  // sign(0) = 0, NaN stays
    m = beta2 * m + take2 * g;
  }
};

// diffGrad: Dubey et al. 2020, eq. 4-8: a friction sigmoid(|g_{t-1} - g_t|) on Adam; eps is not bias-corrected.
template <class T>
struct DiffGrad {
  static constexpr int states = 3;
  T take1, beta2, take2, eps;
  T step;  // eta sqrt(bc2) / bc1
  DITHER_HD DiffGrad(const Hyper& h, int64_t t, double&)
      : take1(T(1 - h.beta1)),
        beta2(T(h.beta2)),
        take2(T(1 - h.beta2)),
        eps(T(h.eps)),
        step(T(h.lr * square_root(1 - power(h.beta2, t)) / (1 - power(h.beta1, t)))) {}
  DITHER_HD void operator()(T& p, T g, T& m, T& v, T& previous) const {
    m = lerp(m, g, take1);
    v = beta2 * v + take2 * (g * g);
    const T friction = T(1) / (T(1) + exponential(-absolute(previous - g)));
    previous = g;
    p -= step * friction * m / (square_root(v) + eps);
  }
};

// AdaBelief: Zhuang et al. 2020, algorithm 2; s includes its eps, as in the authors' code. Rectification: Liu et al. 2020
// (RAdam), eq. 9-10; below rho = 5 the step is along m alone.
template <class T>
struct AdaBelief {
  static constexpr int states = 2;
  T take1, beta2, take2, eps;
  T step, s_scale, floor;  // p -= step m / (sqrt(s) s_scale + floor)
  DITHER_HD AdaBelief(const Hyper& h, int64_t t, double&)
      : take1(T(1 - h.beta1)), beta2(T(h.beta2)), take2(T(1 - h.beta2)), eps(T(h.eps)) {
    const double decay2 = power(h.beta2, t), bc1 = 1 - power(h.beta1, t), bc2 = 1 - decay2;
    const double limit = 2 / (1 - h.beta2) - 1, rho = limit - 2 * double(t) * decay2 / bc2;
    double rate = h.lr / bc1;
    s_scale = h.rectify != 0 ? T(1) : T(1 / square_root(bc2));
    floor = eps;
    if (h.rectify != 0 && rho >= 5) {
      rate *= square_root(bc2 * (rho - 4) / (limit - 4) * (rho - 2) / rho * limit / (limit - 2));
    } else if (h.rectify != 0) {
      s_scale = T(0);
      floor = T(1);
    }
    step = T(rate);
  }
  DITHER_HD void operator()(T& p, T g, T& m, T& s) const {
    m = lerp(m, g, take1);
    const T surprise = g - m;
    s = beta2 * s + take2 * (surprise * surprise) + eps;
    p -= step * m / (square_root(s) * s_scale + floor);
  }
};

// ADOPT: Taniguchi et al. 2024, algorithm 2 with the clipping of the authors' current code, |u| <= k^(1/4) after k steps.
// The first step only sets v = g^2.
template <class T>
struct Adopt {
  static constexpr int states = 2;
  static constexpr bool first_step_keeps_p = true;
  T take1, keep2, take2, eps, bound, step;
  DITHER_HD Adopt(const Hyper& h, int64_t t, double&)
      : take1(t == 1 ? T(0) : T(1 - h.beta1)),
        keep2(t == 1 ? T(0) : T(h.beta2)),
        take2(t == 1 ? T(1) : T(1 - h.beta2)),
        eps(T(h.eps)),
        bound(T(square_root(square_root(double(t - 1))))),
        step(t == 1 ? T(0) : T(h.lr)) {}
  DITHER_HD void operator()(T& p, T g, T& m, T& v) const {
    T u = g / maximum(square_root(v), eps);
    u = u < -bound ? -bound : (u > bound ? bound : u);
    m = lerp(m, u, take1);
    p -= step * m;
    v = keep2 * v + take2 * (g * g);
  }
};

// Ano: Kegreisz 2025, algorithm 1: direction from the momentum, size from the gradient. Anolog: beta1 = 1 - 1/ln(max(2, t))
// and no bias correction.
template <class T, bool kLogarithmic>
struct Ano {
  static constexpr int states = 2;
  T take1, beta2, take2, eps, step, v_scale;
  DITHER_HD Ano(const Hyper& h, int64_t t, double&)
      : take1(T(kLogarithmic ? 1 / logarithm(double(larger<int64_t>(2, t))) : 1 - h.beta1)),
        beta2(T(h.beta2)),
        take2(T(1 - h.beta2)),
        eps(T(h.eps)),
        step(T(h.lr)),
        v_scale(T(kLogarithmic ? 1 : 1 / (1 - power(h.beta2, t)))) {}
  DITHER_HD void operator()(T& p, T g, T& m, T& v) const {
    m = lerp(m, g, take1);
    const T square = g * g, gain = take2 * square;
    v = beta2 * v + (square > v ? gain : (square < v ? -gain : T(0) * square));
    const T size = absolute(g) / square_root(v * v_scale + eps);
    p -= step * (m > T(0) ? size : (m < T(0) ? -size : m * size));
  }
};

// clang-format off
template <class T> using RmsPropPlain = RmsProp<T, false, false>;
template <class T> using RmsPropMomentum = RmsProp<T, false, true>;
template <class T> using RmsPropCentered = RmsProp<T, true, false>;
template <class T> using RmsPropCenteredMomentum = RmsProp<T, true, true>;
template <class T> using AnoFixed = Ano<T, false>;
template <class T> using AnoLog = Ano<T, true>;
// clang-format on

// name, rule
// clang-format off
#define DITHER_RULES(X)                                                                                        \
  X(sgd, Sgd) X(momentum, Momentum) X(adam, Adam) X(amsgrad, AmsGrad) X(adamax, Adamax) X(nadam, NAdam)        \
  X(adagrad, Adagrad) X(rmsprop, RmsPropPlain) X(rmsprop_momentum, RmsPropMomentum)                            \
  X(rmsprop_centered, RmsPropCentered) X(rmsprop_centered_momentum, RmsPropCenteredMomentum) X(lion, Lion)     \
  X(diffgrad, DiffGrad) X(adabelief, AdaBelief) X(adopt, Adopt) X(ano, AnoFixed) X(anolog, AnoLog)
// clang-format on

enum class Rule : int {
#define X(name, type) name,
  DITHER_RULES(X)
#undef X
};
constexpr int kMaxStates = 3;

template <class R>
concept KeepsPAtFirst = R::first_step_keeps_p;
}  // namespace dither
