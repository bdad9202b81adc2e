// Rows of a table that remember which noisy steps they have missed, and catch up in one draw (LazyDP, Lim et al. 2024).
#pragma once
#include "../common/address.h"
#include "../common/cpu.h"
#include "../common/dtype.h"
#include "../common/normal.h"
#include "../common/stream.h"

namespace dither {
// Some steps without gradients, of a row w and its momentum m:
//   w += ww w + wm m + noise,  m = mw w + mm m + noise,  the noise normal with covariance (vw, vc; vc, vm).
struct Steps {
  double ww, wm, mw, mm, vw, vc, vm;
};
DITHER_HD Steps then(const Steps& x, const Steps& y) {  // x, after it y
  const double a = 1.0 + y.ww;
  const double p = a * x.vw + y.wm * x.vc, q = a * x.vc + y.wm * x.vm;
  const double r = y.mw * x.vw + y.mm * x.vc, s = y.mw * x.vc + y.mm * x.vm;
  return {x.ww + y.ww + y.ww * x.ww + y.wm * x.mw,
          a * x.wm + y.wm * x.mm,
          y.mw * (1.0 + x.ww) + y.mm * x.mw,
          y.mw * x.wm + y.mm * x.mm,
          a * p + y.wm * q + y.vw,
          y.mw * p + y.mm * q + y.vc,
          y.mw * r + y.mm * s + y.vm};
}

// The steps from number `first` on, and all runs of 2^k of them that begin at a multiple of 2^k after it: so any run is made
// of O(log) entries, with nothing divided or subtracted. Width 7, or without momentum 2: ww, vw.
DITHER_HD int64_t history_place(int64_t begin, int64_t count) { return 2 * begin + count - 1; }
DITHER_HD Steps load_steps(const double* history, int width, int64_t begin, int64_t count) {
  const double* x = history + history_place(begin, count) * width;
  if (width == 2) return {x[0], 0, 0, 0, x[1], 0, 0};
  return {x[0], x[1], x[2], x[3], x[4], x[5], x[6]};
}
DITHER_HD void store_steps(double* history, int width, int64_t begin, int64_t count, const Steps& s) {
  double* x = history + history_place(begin, count) * width;
  x[0] = s.ww;
  x[1] = width == 2 ? s.vw : s.wm;
  if (width == 2) return;
  x[2] = s.mw;
  x[3] = s.mm;
  x[4] = s.vw;
  x[5] = s.vc;
  x[6] = s.vm;
}
DITHER_HD void append_steps(double* history, int width, int64_t at, const Steps& s) {
  store_steps(history, width, at, 1, s);
  for (int64_t count = 1; (at + 1) % (2 * count) == 0; count *= 2) {
    const int64_t middle = at + 1 - count, begin = middle - count;
    const Steps x = load_steps(history, width, begin, count), y = load_steps(history, width, middle, count);
    store_steps(history, width, begin, 2 * count, then(x, y));
  }
}
DITHER_HD Steps steps_between(const double* history, int width, int64_t begin, int64_t end) {
  Steps all{};
  for (int64_t at = begin; at < end;) {
    int64_t count = 1;
    while (at % (2 * count) == 0 && at + 2 * count <= end) count *= 2;
    const Steps next = load_steps(history, width, at, count);
    all = at == begin ? next : then(all, next);
    at += count;
  }
  return all;
}

struct LazyRows {
  void *weight, *momentum;  // momentum may be nullptr
  int32_t* last;            // per row: how many steps it has made
  const int64_t* ids;       // or nullptr: all rows
  const void* gradient;     // of the last step, per id; or nullptr
  const double* history;
  int64_t rows, columns, count, first, steps;
  double pull_w, pull_m;  // what a gradient of 1 adds to w and m
  int64_t second;         // elements from a row's normals to its second normals
  Address address;        // its step is set row by row
  int width;
  bool wide, chacha, every;
};

// w += ww w + wm m + nw z + rw y + gw g,  m = mw w + mm m + nm z + gm g
template <class T>
struct Move {
  T ww, wm, mw, mm, nw, nm, rw, gw, gm;
  // A single step has one normal for both, w's with a minus: -lr std and std.
  DITHER_HD Move(const Steps& s, bool single) : ww(T(s.ww)), wm(T(s.wm)), mw(T(s.mw)), mm(T(s.mm)), rw(0), gw(0), gm(0) {
    const double m = square_root(s.vm), common = single || m == 0.0 ? -square_root(s.vw) : s.vc / m;
    const double rest = s.vw - common * common;
    nm = T(m);
    nw = T(common);
    if (!single && m != 0.0 && rest > 0.0) rw = T(square_root(rest));
  }
};
template <bool kMomentum, class T>
DITHER_HD void move_one(const Move<T>& a, T z, T y, T g, T& w, T& m) {
  const T before = w;
  if constexpr (kMomentum) {
    w = before + (((a.ww * before + a.wm * m) + a.gw * g) + (a.nw * z + a.rw * y));
    m = ((a.mw * before + a.mm * m) + a.gm * g) + a.nm * z;
  } else {
    w = before + ((a.ww * before + a.gw * g) + a.nw * z);
  }
}
// use(move, step of its normals, its gradient or nullptr) for what a row has missed, in order. Every use has an address of its
// own: the one of step s takes the row from s or before to s + 1.
struct Missed {  // the run of the last row: neighbours often miss the same
  int64_t from = -1;
  Steps steps{};
};
template <class T, class Use>
DITHER_HD void for_each_move(const LazyRows& l, int64_t i, int64_t from, Missed& missed, Use&& use) {
  const int64_t until = l.gradient ? l.steps - 1 : l.steps;
  const T* none = nullptr;
  from = larger(from, l.first);
  if (l.every) {
    for (; from < until; ++from) use(Move<T>(load_steps(l.history, l.width, from - l.first, 1), true), uint32_t(from), none);
  } else if (from < until) {
    if (from != missed.from) missed = {from, steps_between(l.history, l.width, from - l.first, until - l.first)};
    use(Move<T>(missed.steps, until - from == 1), uint32_t(until - 1), none);
  }
  if (l.gradient) {
    Move<T> a(load_steps(l.history, l.width, until - l.first, 1), true);
    a.gw = T(l.pull_w);
    a.gm = T(l.pull_m);
    use(a, uint32_t(until), static_cast<const T*>(l.gradient) + i * l.columns);
  }
}

DITHER_PER_ISA(void lazy_range(const LazyRows&, int64_t lo, int64_t hi))
int lazy_cuda(const LazyRows&, Stream);
int append_cuda(double* history, int width, int64_t at, const Steps&, Stream);
}  // namespace dither
