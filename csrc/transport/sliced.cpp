// Optimal transport on the line, row by row, for costs |u - v|^p, p >= 1: the monotone plan, its cost and its derivatives.
//
// Sorted points are paired mass by mass. The cost of a plan is linear in the masses, so by the envelope theorem its derivative
// in a value is that of the cells of this value, and in a weight the dual potential: along the plan the potential of u rises by
// c(u', v) - c(u, v) where u gives way to u', that of v likewise. Where both end at once, u gives way first.
//
// Everything is summed in double in the order of values, then of places: no machine and no number of threads changes a bit,
// but for p that is no integer, where std::pow has a say.
#include <cmath>

#include "../common/order.h"
#include "../common/torch.h"

namespace dither {
template <class S>
struct Point {
  OrderKey<S> key;
  uint32_t place;
  bool operator<(const Point& other) const { return key != other.key ? key < other.key : place < other.place; }
};

// Stable, digit by digit from the lowest; digits that all keys share are left out.
template <class S>
static void sort_points(std::vector<Point<S>>& points, std::vector<Point<S>>& spare) {
  constexpr size_t kDigits = sizeof(OrderKey<S>), kFew = 48;
  if (points.size() < kFew) return std::sort(points.begin(), points.end());
  const auto digit = [](const Point<S>& point, size_t d) { return point.key >> 8 * d & 255; };
  uint32_t starts[kDigits][256] = {};
  for (const Point<S>& point : points)
    for (size_t d = 0; d < kDigits; ++d) ++starts[d][digit(point, d)];
  spare.resize(points.size());
  for (size_t d = 0; d < kDigits; ++d) {
    uint32_t* start = starts[d];
    if (start[digit(points[0], d)] == points.size()) continue;
    for (uint32_t value = 0, sum = 0; value < 256; ++value) sum += std::exchange(start[value], sum);
    for (const Point<S>& point : points) spare[start[digit(point, d)]++] = point;
    points.swap(spare);
  }
}

// The points of one row, walked in order.
template <class S>
class Walk {
 public:
  void start(const S* values, const S* weights, int64_t count, S* slopes, S* potentials) {
    weights_ = weights, slopes_ = slopes, potentials_ = potentials;
    points_.resize(count);
    for (int64_t i = 0; i < count; ++i) points_[i] = {order_key(values[i]), uint32_t(i)};
    sort_points<S>(points_, spare_);
    if (potentials) kept_.resize(count);
    total_ = weights ? 0 : double(count);
    if (weights)
      for (const Point<S>& point : points_) total_ += weights[point.place];
    at_ = 0, sum_ = 0, slope_ = 0, potential_ = 0, mean_ = 0;
    arrive();
  }
  double value() const { return of_order_key(points_[at_].key); }
  double until() const { return until_; }  // the mass up to the end of this point, of 1 in all
  bool last() const { return at_ + 1 == points_.size(); }
  bool wants_potentials() const { return potentials_; }
  void pull(double slope) { slope_ += slope; }
  void leave() {
    if (slopes_) slopes_[points_[at_].place] = S(slope_);
    if (potentials_) {
      kept_[at_] = potential_;
      mean_ += mass_ * potential_;
    }
  }
  void next() {
    leave();
    ++at_, slope_ = 0;
    arrive();
  }
  void lift(double rise) { potential_ += rise; }
  // Weights count by their share of the total, which they change too.
  void finish() {
    leave();
    if (potentials_)
      for (size_t i = 0; i < points_.size(); ++i) potentials_[points_[i].place] = S((kept_[i] - mean_) / total_);
  }

 private:
  void arrive() {
    const double weight = weights_ ? double(weights_[points_[at_].place]) : 1.0;
    sum_ += weight;
    mass_ = weight / total_;
    until_ = last() ? 1.0 : std::min(sum_ / total_, 1.0);
  }
  std::vector<Point<S>> points_, spare_;
  std::vector<double> kept_;
  const S* weights_;
  S *slopes_, *potentials_;
  size_t at_;
  double total_, sum_, mass_, until_, slope_, potential_, mean_;
};

struct Power {  // d^(p - 1) and d^p of d >= 0
  double p;
  int factors;  // p - 1, or -1 where that is no small integer
  explicit Power(double p) : p(p), factors(p <= 16 && p == std::floor(p) ? int(p) - 1 : -1) {}
  double below(double d) const {
    if (factors < 0) return std::pow(d, p - 1);
    double y = 1;
    for (int i = 0; i < factors; ++i) y *= d;
    return y;
  }
  double cost(double d) const { return below(absolute(d)) * absolute(d); }
};

template <class S>
static double walk_row(Walk<S>& u, Walk<S>& v, const Power& power) {
  const bool potentials = u.wants_potentials() || v.wants_potentials();
  double cost = 0, done = 0;
  for (;;) {
    const double d = u.value() - v.value(), below = power.below(absolute(d)), until = std::min(u.until(), v.until());
    if (const double mass = until - done; mass > 0) {
      const double slope = d != 0 ? mass * power.p * below * (d < 0 ? -1 : 1) : 0;
      cost += mass * (below * absolute(d));
      u.pull(slope);
      v.pull(-slope);
      done = until;
    }
    if (u.last() && v.last()) break;
    if (!potentials && !u.last() && !v.last() && u.until() == v.until()) {
      u.next();
      v.next();
      continue;
    }
    Walk<S>& ends = !u.last() && (v.last() || u.until() <= v.until()) ? u : v;
    ends.next();
    if (potentials) ends.lift(power.cost(u.value() - v.value()) - below * absolute(d));
  }
  u.finish();
  v.finish();
  return cost;
}

template <class S>
struct Side {
  const S *values, *weights;
  S *slopes, *potentials;
  int64_t count, weight_stride;
  void start(Walk<S>& walk, int64_t row) const {
    const auto of = [&](auto* p, int64_t stride) { return p ? p + row * stride : nullptr; };
    walk.start(values + row * count, of(weights, weight_stride), count, of(slopes, count), of(potentials, count));
  }
};

static Tensor rows_dense(const Tensor& t) { return t.dim() == 2 && t.size(1) > 1 && t.stride(1) != 1 ? in_order(t) : t; }

template <class S>
static void check_weights(const char* op, const char* name, const Tensor& t) {
  const S* w = static_cast<const S*>(t.const_data_ptr());
  for (int64_t row = 0; row < (t.stride(0) ? t.size(0) : 1); ++row) {
    double sum = 0;
    for (int64_t i = 0; i < t.size(1); ++i) {
      const double weight = w[row * t.stride(0) + i];
      DITHER_CHECK(weight >= 0, op, ": ", name, " contains ", weight, ", expected weights >= 0");
      sum += weight;
    }
    DITHER_CHECK(sum > 0 && std::isfinite(sum), op, ": ", name, " sums to ", sum, ", expected a positive number");
  }
}

static void wasserstein_rows_(const Tensor& u, const Tensor& v, const std::optional<Tensor>& a, const std::optional<Tensor>& b,
                              double p, const Tensor& cost, const std::optional<Tensor>& u_slope,
                              const std::optional<Tensor>& v_slope, const std::optional<Tensor>& a_slope,
                              const std::optional<Tensor>& b_slope) {
  const char* op = "wasserstein_rows_";
  const ScalarType type = u.scalar_type();
  DITHER_CHECK(type == ScalarType::Float || type == ScalarType::Double, op, ": u is ", name_of(type),
               ", expected float32 or float64");
  DITHER_CHECK(v.scalar_type() == type, op, ": v is ", name_of(v.scalar_type()), ", expected ", name_of(type), " like u");
  DITHER_CHECK(u.dim() == 2 && u.size(1) > 0 && u.size(1) >> 31 == 0, op, ": u has shape ", shape_of(u),
               ", expected [rows, 1 <= n < 2^31]");
  DITHER_CHECK(v.dim() == 2 && v.size(0) == u.size(0) && v.size(1) > 0 && v.size(1) >> 31 == 0, op, ": v has shape ",
               shape_of(v), ", expected [", u.size(0), ", 1 <= m < 2^31] like u");
  check_device(op, "v", v, "u", u);
  DITHER_CHECK(p >= 1 && std::isfinite(p), op, ": p is ", p, ", expected a number of at least 1");
  const int64_t rows = u.size(0);
  check_out(op, "cost", cost, type, {rows}, "u", u);
  const Tensor u_values = in_order(u), v_values = in_order(v);
  std::optional<Tensor> a_rows, b_rows;
  const auto run = [&]<class S>(S) {
    const auto side = [&](const char* name, const Tensor& values, const char* weights_name,
                          const std::optional<Tensor>& weights, std::optional<Tensor>& kept, const std::optional<Tensor>& slope,
                          const std::optional<Tensor>& weights_slope) {
      const int64_t n = values.size(1);
      Side<S> s{static_cast<const S*>(values.const_data_ptr()), nullptr, nullptr, nullptr, n, 0};
      if (weights) {
        DITHER_CHECK(weights->scalar_type() == type && weights->dim() == 2 && weights->size(0) == rows && weights->size(1) == n,
                     op, ": ", weights_name, " is ", name_of(weights->scalar_type()), " of shape ", shape_of(*weights),
                     ", expected ", name_of(type), " of shape [", rows, ", ", n, "] like ", name);
        check_device(op, weights_name, *weights, name, values);
        kept = rows_dense(*weights);
        if (rows) check_weights<S>(op, weights_name, *kept);
        s.weights = static_cast<const S*>(kept->const_data_ptr());
        s.weight_stride = kept->stride(0);
      }
      if (slope) check_out(op, "a slope", *slope, type, {rows, n}, name, values);
      if (weights_slope) check_out(op, "a slope", *weights_slope, type, {rows, n}, weights_name, values);
      s.slopes = data_or_null<S>(slope);
      s.potentials = data_or_null<S>(weights_slope);
      return s;
    };
    const Side<S> first = side("u", u_values, "a", a, a_rows, u_slope, a_slope),
                  second = side("v", v_values, "b", b, b_rows, v_slope, b_slope);
    S* out = static_cast<S*>(cost.mutable_data_ptr());
    parallel(rows, std::max<int64_t>(1, (1 << 13) / (first.count + second.count)), [&](int64_t lo, int64_t hi) {
      Walk<S> walk[2];
      const Power power(p);
      for (int64_t row = lo; row < hi; ++row) {
        first.start(walk[0], row);
        second.start(walk[1], row);
        out[row] = S(walk_row(walk[0], walk[1], power));
      }
    });
  };
  if (type == ScalarType::Double) run(double{});
  else run(float{});
}
}  // namespace dither

STABLE_TORCH_LIBRARY_FRAGMENT(DITHER_NS, m) {
  m.def(
      "wasserstein_rows_(Tensor u, Tensor v, Tensor? a, Tensor? b, float p, Tensor(a!) cost, Tensor(b!)? u_slope, "
      "Tensor(c!)? v_slope, Tensor(d!)? a_slope, Tensor(e!)? b_slope) -> ()");
}
// On CUDA torch's own sort is fast: dither.reference does it there.
STABLE_TORCH_LIBRARY_IMPL(DITHER_NS, CPU, m) { m.impl("wasserstein_rows_", TORCH_BOX(&dither::wasserstein_rows_)); }
