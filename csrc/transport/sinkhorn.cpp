#include "sinkhorn.h"

#include <atomic>
#include <cmath>
#include <new>

#include "../common/torch.h"

namespace dither {
constexpr int64_t kWorthThreads = 1 << 15;  // elements of the cost matrix
constexpr int64_t kMostTerms = 64 << 20;    // bytes of a problem's terms that are kept

class Room {  // whole cache lines
 public:
  explicit Room(int64_t bytes) : data_(static_cast<char*>(::operator new(size_t(bytes), kAlign))) {}
  Room(const Room&) = delete;
  Room& operator=(const Room&) = delete;
  ~Room() { ::operator delete(data_, kAlign); }
  char* get() const { return data_; }

 private:
  static constexpr std::align_val_t kAlign{kLine};
  char* data_;
};

static const double* doubles(const Tensor& t) { return static_cast<const double*>(t.const_data_ptr()); }
static double* doubles_of(const Tensor& t) { return static_cast<double*>(t.mutable_data_ptr()); }
static void check_doubles(const char* op, const char* name, const Tensor& t, const Ints& shape, const Tensor& x) {
  check_out(op, name, t, ScalarType::Double, shape, "x", x);
}

// The arguments that all operators share.
struct Problem {
  Costs c;
  Tensor x, y;
  Problem(const char* op, const Tensor& x_, const std::optional<Tensor>& y_, int64_t ground, double scale, bool narrow,
          int64_t batch)
      : x(in_order(x_)), y(y_ ? in_order(*y_) : x) {
    DITHER_CHECK(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::Double, op, ": x is ",
                 name_of(x.scalar_type()), ", expected float32 or float64");
    DITHER_CHECK(ground >= 0 && ground < kGrounds, op, ": ground is ", ground, ", expected 0 <= ground < ", kGrounds);
    DITHER_CHECK(y_.has_value() == (ground != 0), op, ": y is ", y_ ? "a tensor" : "None", ", expected ",
                 ground ? "a tensor" : "None", " with ground ", ground);
    DITHER_CHECK(x.dim() == 3 && (x.size(0) == batch || x.size(0) == 1), op, ": x has shape ", shape_of(x), ", expected [",
                 batch, " or 1, ", ground ? "n, dim]" : "n, m]");
    c.type = x.scalar_type() == ScalarType::Double ? DType::f64 : DType::f32;
    DITHER_CHECK(!narrow || c.type == DType::f32, op, ": narrow is True, expected False for float64");
    if (y_) {
      DITHER_CHECK(y.scalar_type() == x.scalar_type(), op, ": y is ", name_of(y.scalar_type()), ", expected ",
                   name_of(x.scalar_type()), " like x");
      check_device(op, "y", y, "x", x);
      DITHER_CHECK(y.dim() == 3 && (y.size(0) == batch || y.size(0) == 1) && y.size(1) == x.size(2), op, ": y has shape ",
                   shape_of(y), ", expected [", batch, " or 1, ", x.size(2), ", m]");
    }
    DITHER_CHECK(std::isfinite(scale) && scale > 0, op, ": scale is ", scale, ", expected a positive number");
    c.x = x.const_data_ptr();
    c.y = y_ ? y.const_data_ptr() : nullptr;
    c.batch = batch;
    c.n = x.size(1);
    c.m = y.size(2);
    c.dim = x.size(2);
    DITHER_CHECK(c.n > 0 && c.m > 0 && c.m >> 31 == 0, op, ": costs have shape [", c.n, ", ", c.m,
                 "], expected 0 < n and 0 < m < 2^31");
    c.x_batch = x.size(0) == 1 ? 0 : c.n * c.dim;
    c.y_batch = y.size(0) == 1 ? 0 : c.dim * c.m;
    c.ground = Ground(ground);
    c.narrow = narrow;
    c.scale = scale * kLog2e;
  }
};
static int64_t batch_of(const char* op, const char* name, const Tensor& t) {
  DITHER_CHECK(t.dim() == 2, op, ": ", name, " has shape ", shape_of(t), ", expected two dimensions");
  return t.size(0);
}

static void times(double* x, int64_t n, double factor) {
  for (int64_t i = 0; i < n; ++i) x[i] *= factor;
}
static std::vector<double> in_base_2(const double* x, int64_t n) {
  std::vector<double> y(x, x + n);
  times(y.data(), n, kLog2e);
  return y;
}

// Columns as rows see them, with their room.
struct RoundedColumns {
  Room room;
  Columns columns;
  explicit RoundedColumns(const Costs& c)
      : room(2 * whole_lines(c.m, 8) * 8), columns{room.get(), room.get() + whole_lines(c.m, 8) * 8} {}
  void round(const Costs& c, const double* g) const { DITHER_PICK_ISA(round_columns)(c, g, columns); }
  bool change(const Costs& c, const double* g) const { return DITHER_PICK_ISA(change_columns)(c, g, columns); }
};

// Given potentials of a problem, in powers of 2.
struct RoundedPotentials {
  std::vector<double> f;
  RoundedColumns g;
  RoundedPotentials(const Costs& c, const double* f_, const double* g_) : f(in_base_2(f_, c.n)), g(c) {
    g.round(c, in_base_2(g_, c.m).data());
  }
};

// All iterations of a problem. par(count, work, body): body(lo, hi) for parts of 0 .. count.
template <class Parallel>
static void iterate(const Sinkhorn& s, int64_t problem, int64_t iterations, double tol, double* f, double* g, double* columns,
                    double* errors, int64_t* done, const Parallel& par) {
  const Costs& c = s.c;
  const Chunks chunks = row_chunks(c.n);
  const int64_t item = c.narrow ? 4 : 8, pitch = whole_lines(c.m, item) * item;
  const double *b = s.b + problem * c.m, least = c.narrow ? kLeastColumn<float> : kLeastColumn<double>;
  const RoundedColumns rounded(c);
  const Room sums(chunks.count * pitch);
  const int64_t room = (c.n + kRowBlock - 1) / kRowBlock * kRowBlock * pitch;
  const bool keeps = iterations > 1 && room <= kMostTerms;
  const Room terms(keeps ? room : 0);
  std::vector<double> base(c.n);
  Terms kept{keeps ? terms.get() : nullptr, base.data(), false};
  std::vector<double> row_error(chunks.count), logs;
  std::vector<int64_t> faint;
  const auto rows = DITHER_PICK_ISA(sinkhorn_rows);
  const auto join = DITHER_PICK_ISA(join_columns);
  const auto move = DITHER_PICK_ISA(move_columns);
  const auto column_log_of = DITHER_PICK_ISA(column_log);
  const double* a = s.a + problem * c.n;
  for (int64_t i = 0; i < c.n; ++i) f[i] = a[i] > 0.0 ? f[i] * kLog2e : -INFINITY;
  for (int64_t j = 0; j < c.m; ++j) g[j] = b[j] > 0.0 ? g[j] * kLog2e : -INFINITY;
  for (*done = 0; *done < iterations;) {
    kept.made = keeps && *done > 0 && rounded.change(c, g);
    if (!kept.made) rounded.round(c, g);
    par(chunks.count, chunks.size * c.m / (kept.made ? 4 : 1), [&](int64_t lo, int64_t hi) {
      const Room scratch(row_scratch(c));
      for (int64_t at = lo; at < hi; ++at) {
        const int64_t k = *done % 2 ? lo + hi - 1 - at : at;  // there and back: the last terms are still in the cache
        row_error[k] = rows(s, problem, k * chunks.size, std::min(c.n, (k + 1) * chunks.size), rounded.columns, kept, f,
                            scratch.get(), sums.get() + k * pitch);
      }
    });
    join(c, chunks.count, sums.get(), columns);
    faint.clear();
    for (int64_t j = 0; j < c.m; ++j)
      if (!(columns[j] > least) && b[j] > 0.0) faint.push_back(j);
    logs.resize(faint.size());
    par(int64_t(faint.size()), c.n, [&](int64_t lo, int64_t hi) {
      for (int64_t k = lo; k < hi; ++k) {
        logs[k] = column_log_of(c, problem, faint[k], f);
        columns[faint[k]] = exp2_of_double(logs[k] + g[faint[k]]);
      }
    });
    double error = DITHER_PICK_ISA(column_error)(s, problem, columns, g);
    for (const double e : row_error) error += e;
    errors[(*done)++] = error;
    if (error <= tol) break;
    for (size_t k = 0; k < faint.size(); ++k) {  // where they go
      const double old = g[faint[k]], log = logs[k] + old;
      logs[k] = log > -INFINITY ? relaxed(old, old + log2_of_double(b[faint[k]]) - log, s.damp_b, s.omega[problem]) : old;
    }
    move(s, problem, columns, g);
    for (size_t k = 0; k < faint.size(); ++k) g[faint[k]] = logs[k];
  }
  times(f, c.n, kLn2);
  times(g, c.m, kLn2);
}

template <Device device>
static void sinkhorn_(const Tensor& x, const std::optional<Tensor>& y, int64_t ground, double scale, bool narrow,
                      const Tensor& a, const Tensor& b, double damp_a, double damp_b, const Tensor& omega, int64_t iterations,
                      double tol, const Tensor& f, const Tensor& g, const Tensor& columns, const Tensor& errors,
                      const Tensor& done) {
  const char* op = "sinkhorn_";
  const int64_t batch = batch_of(op, "a", a);
  const Problem p(op, x, y, ground, scale, narrow, batch);
  const Costs& c = p.c;
  check_doubles(op, "a", a, {batch, c.n}, x);
  check_doubles(op, "b", b, {batch, c.m}, x);
  check_doubles(op, "f", f, {batch, c.n}, x);
  check_doubles(op, "g", g, {batch, c.m}, x);
  check_doubles(op, "columns", columns, {batch, c.m}, x);
  check_doubles(op, "errors", errors, {batch, iterations}, x);
  check_out(op, "done", done, ScalarType::Long, {batch}, "x", x);
  DITHER_CHECK(damp_a > 0 && damp_a <= 1 && damp_b > 0 && damp_b <= 1, op, ": damping is ", damp_a, ", ", damp_b,
               ", expected 0 < damping <= 1");
  check_doubles(op, "omega", omega, {batch}, x);
  if (device == Device::cpu)  // to look would be to wait
    for (int64_t i = 0; i < batch; ++i) {
      const double each = doubles(omega)[i];
      DITHER_CHECK(each > 0 && each < 2, op, ": omega contains ", each, ", expected 0 < omega < 2");
    }
  if (batch == 0 || iterations == 0) return;
  const Sinkhorn s{c, doubles(a), doubles(b), doubles(omega), damp_a, damp_b};
  int64_t* counts = static_cast<int64_t*>(done.mutable_data_ptr());
  if constexpr (device == Device::cpu) {
    const auto problem = [&](int64_t i, const auto& par) {
      iterate(s, i, iterations, tol, doubles_of(f) + i * c.n, doubles_of(g) + i * c.m, doubles_of(columns) + i * c.m,
              doubles_of(errors) + i * iterations, counts + i, par);
    };
    // Many problems share the threads; a single one is cut into chunks. The sums are the same.
    if (batch >= 8 || (batch > 1 && c.n * c.m < kWorthThreads)) {
      parallel(batch, std::max<int64_t>(1, kWorthThreads / (c.n * c.m * iterations)), [&](int64_t lo, int64_t hi) {
        for (int64_t i = lo; i < hi; ++i) problem(i, [](int64_t count, int64_t, const auto& body) { body(0, count); });
      });
    } else {
      for (int64_t i = 0; i < batch; ++i)
        problem(i, [](int64_t count, int64_t work, const auto& body) {
          parallel(count, std::max<int64_t>(1, kWorthThreads / work), body);
        });
    }
  } else {
    const auto guard = device_guard(x);
    const Tensor scratch = torch::stable::new_empty(x, {batch * (c.n + c.m + 1)}, ScalarType::Double);
    DITHER_CUDA_OK(op, sinkhorn_cuda(s, iterations, tol, doubles_of(f), doubles_of(g), doubles_of(columns), doubles_of(errors),
                                     counts, doubles_of(scratch), current_stream(x)));
  }
}

// ---- Sums over a plan, and Newton's direction

// columns = sum over chunks of rows of what plan_rows gives. y: nullptr, or the vector of the Schur complement with a.
static void plan_sums_of(const Costs& c, int64_t problem, const RoundedPotentials& of, const double* y, const double* a,
                         double* row_sums, double* linear, double* columns) {
  const Chunks chunks = row_chunks(c.n);
  const int64_t item = c.narrow ? 4 : 8, pitch = whole_lines(c.m, item) * item;
  const Room parts(chunks.count * pitch), vector(pitch);
  const auto rows = DITHER_PICK_ISA(plan_rows);
  DITHER_PICK_ISA(plan_vector)(c, of.g.columns, y, vector.get());
  const PlanSums sums{vector.get(), row_sums, linear, a};
  parallel(chunks.count, std::max<int64_t>(1, kWorthThreads / (chunks.size * c.m)), [&](int64_t lo, int64_t hi) {
    const Room scratch(row_scratch(c));
    for (int64_t k = lo; k < hi; ++k)
      rows(c, problem, k * chunks.size, std::min(c.n, (k + 1) * chunks.size), of.g.columns, of.f.data(), sums, scratch.get(),
           parts.get() + k * pitch);
  });
  DITHER_PICK_ISA(join_columns)(c, chunks.count, parts.get(), columns);
}

template <Device device>
static void plan_sums_(const Tensor& x, const std::optional<Tensor>& y, int64_t ground, double scale, bool narrow,
                       const Tensor& f, const Tensor& g, const Tensor& rows, const Tensor& linear, const Tensor& columns) {
  const char* op = "plan_sums_";
  const int64_t batch = batch_of(op, "f", f);
  const Problem p(op, x, y, ground, scale, narrow, batch);
  const Costs& c = p.c;
  check_doubles(op, "f", f, {batch, c.n}, x);
  check_doubles(op, "g", g, {batch, c.m}, x);
  check_doubles(op, "rows", rows, {batch, c.n}, x);
  check_doubles(op, "linear", linear, {batch, c.n}, x);
  check_doubles(op, "columns", columns, {batch, c.m}, x);
  if (batch == 0) return;
  if constexpr (device == Device::cpu) {
    for (int64_t i = 0; i < batch; ++i) {
      const RoundedPotentials rounded(c, doubles(f) + i * c.n, doubles(g) + i * c.m);
      plan_sums_of(c, i, rounded, nullptr, nullptr, doubles_of(rows) + i * c.n, doubles_of(linear) + i * c.n,
                   doubles_of(columns) + i * c.m);
    }
  } else {
    const auto guard = device_guard(x);
    const Tensor scratch = torch::stable::new_empty(x, {batch * (2 * row_parts(c) + column_parts(c))}, ScalarType::Double);
    DITHER_CUDA_OK(op, plan_sums_cuda(c, doubles(f), doubles(g), doubles_of(rows), doubles_of(linear), doubles_of(columns),
                                      doubles_of(scratch), current_stream(x)));
  }
}

template <Device device>
static void plan_(const Tensor& x, const std::optional<Tensor>& y, int64_t ground, double scale, bool narrow, const Tensor& f,
                  const Tensor& g, const Tensor& out) {
  const char* op = "plan_";
  const int64_t batch = batch_of(op, "f", f);
  const Problem p(op, x, y, ground, scale, narrow, batch);
  const Costs& c = p.c;
  check_doubles(op, "f", f, {batch, c.n}, x);
  check_doubles(op, "g", g, {batch, c.m}, x);
  check_doubles(op, "out", out, {batch, c.n, c.m}, x);
  if (batch == 0) return;
  if constexpr (device == Device::cpu) {
    const Room ones(whole_lines(c.m, 8) * 8);
    const auto rows = DITHER_PICK_ISA(plan_terms);
    for (int64_t i = 0; i < batch; ++i) {
      const RoundedPotentials rounded(c, doubles(f) + i * c.n, doubles(g) + i * c.m);
      const Columns& columns = rounded.g.columns;
      DITHER_PICK_ISA(plan_vector)(c, columns, nullptr, ones.get());
      parallel((c.n + kRowBlock - 1) / kRowBlock, std::max<int64_t>(1, kWorthThreads / (kRowBlock * c.m)),
               [&](int64_t lo, int64_t hi) {
                 const Room scratch(row_scratch(c));
                 rows(c, i, lo * kRowBlock, std::min(c.n, hi * kRowBlock), columns, rounded.f.data(), ones.get(), scratch.get(),
                      doubles_of(out) + i * c.n * c.m);
               });
    }
  } else {
    const auto guard = device_guard(x);
    DITHER_CUDA_OK(op, plan_cuda(c, doubles(f), doubles(g), doubles_of(out), current_stream(x)));
  }
}

// The plan's larger entries, row by row.
struct Entries {
  std::vector<int64_t> start{0};
  std::vector<int32_t> at;
  std::vector<int16_t> exponents;  // of their scores
  std::vector<double> values;
  std::vector<double> mass = std::vector<double>(kExponents);  // of scores, by exponent; of what is left out: 0
};

// The entries whose scores, as small as they are, are more than `allowed` in sum; incomplete if there are more than `most`.
static bool entries_of(const Costs& c, const RoundedPotentials& of, const double* a, const double* b, double allowed,
                       int64_t most, Entries& all) {
  const Chunks chunks = row_chunks(c.n);
  std::vector<Entries> parts(chunks.count);
  std::vector<double> inverse_b(c.m);
  for (int64_t j = 0; j < c.m; ++j) inverse_b[j] = b[j] > 0.0 ? 1.0 / b[j] : 0.0;
  const double least = allowed / (double(c.n) * double(c.m));
  const auto row = DITHER_PICK_ISA(plan_entries);
  std::atomic<int64_t> found{0};
  const int64_t bound = most + most / 4;
  parallel(chunks.count, std::max<int64_t>(1, kWorthThreads / (chunks.size * c.m)), [&](int64_t lo, int64_t hi) {
    const Room scratch(row_scratch(c));
    for (int64_t k = lo; k < hi; ++k) {
      Entries& e = parts[k];
      int64_t size = 0;
      for (int64_t i = k * chunks.size; i < std::min(c.n, (k + 1) * chunks.size); ++i) {
        if (found.load(std::memory_order_relaxed) > bound) return;
        if (int64_t(e.at.size()) < size + c.m) {
          e.at.resize(2 * size + c.m);
          e.exponents.resize(e.at.size());
          e.values.resize(e.at.size());
        }
        int64_t count = 0;
        if (a[i] > 0.0)
          count = row(c, 0, i, of.g.columns, of.f[i], 1.0 / a[i], inverse_b.data(), least, scratch.get(),
                      {&e.at[size], &e.exponents[size], &e.values[size]}, e.mass.data());
        size += count;
        found += count;
        e.start.push_back(size);
      }
    }
  });
  if (found > bound) return false;
  for (const Entries& e : parts)
    for (int k = 0; k < kExponents; ++k) all.mass[k] += e.mass[k];
  double left = all.mass[0];
  int first = 1;
  for (; first < kExponents - 1 && left + all.mass[first] <= allowed; ++first) left += all.mass[first];
  for (const Entries& e : parts)
    for (size_t i = 1; i < e.start.size(); ++i) {
      for (int64_t k = e.start[i - 1]; k < e.start[i]; ++k)
        if (e.exponents[k] >= first) {
          all.at.push_back(e.at[k]);
          all.values.push_back(e.values[k]);
        }
      all.start.push_back(int64_t(all.at.size()));
    }
  return int64_t(all.at.size()) <= most;
}

// y <- c y - P^T ((P y) / a), the kept entries of P.
struct SparseSchur {
  const Entries& e;
  const double *a, *c;
  int64_t n, m;
  void operator()(const std::vector<double>& y, std::vector<double>& out) const {
    constexpr int64_t kParts = 8;
    const int64_t count = std::min<int64_t>(kParts, std::max<int64_t>(1, int64_t(e.at.size()) >> 15));
    std::vector<double> parts(count * m);
    parallel(count, 1, [&](int64_t lo, int64_t hi) {
      for (int64_t part = lo; part < hi; ++part) {
        double* to = &parts[part * m];
        for (int64_t i = n * part / count; i < n * (part + 1) / count; ++i) {
          double sum = 0;
          for (int64_t k = e.start[i]; k < e.start[i + 1]; ++k) sum += e.values[k] * y[e.at[k]];
          if (e.start[i + 1] > e.start[i]) sum /= a[i];
          for (int64_t k = e.start[i]; k < e.start[i + 1]; ++k) to[e.at[k]] += e.values[k] * sum;
        }
      }
    });
    for (int64_t j = 0; j < m; ++j) {
      double sum = parts[j];
      for (int64_t part = 1; part < count; ++part) sum += parts[part * m + j];
      out[j] = c[j] * y[j] - sum;
    }
  }
};

struct Solved {
  int64_t iterations;
  bool converged;
};
static double dot(const std::vector<double>& x, const std::vector<double>& y) {
  double lanes[4] = {};
  const size_t n = x.size() / 4 * 4;
  for (size_t j = 0; j < n; j += 4)
    for (size_t l = 0; l < 4; ++l) lanes[l] += x[j + l] * y[j + l];
  for (size_t j = n; j < x.size(); ++j) lanes[0] += x[j] * y[j];
  return (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);
}
// Conjugate gradients with the inverse diagonal as the preconditioner, from 0 on.
template <class Matrix>
static Solved conjugate_gradients(const Matrix& matrix, const std::vector<double>& inverse, std::vector<double> residual,
                                  double tol, int64_t iterations, std::vector<double>& x) {
  const size_t m = residual.size();
  std::vector<double> z(m), p(m), q(m);
  const auto precondition = [&] {
    for (size_t j = 0; j < m; ++j) z[j] = inverse[j] * residual[j];
    return dot(residual, z);
  };
  double rho = precondition();
  const double goal = tol * tol * rho;
  p = z;
  for (int64_t k = 0; k < iterations; ++k) {
    if (!(rho > goal) || !(rho > 0.0)) return {k, true};
    matrix(p, q);
    const double curvature = dot(p, q);
    if (!(curvature > 0.0)) return {k, true};  // nothing but rounding is left
    const double step = rho / curvature;
    for (size_t j = 0; j < m; ++j) {
      x[j] += step * p[j];
      residual[j] -= step * q[j];
    }
    const double next = precondition(), more = next / rho;
    rho = next;
    for (size_t j = 0; j < m; ++j) p[j] = z[j] + more * p[j];
  }
  return {iterations, !(rho > goal)};
}

// One problem: f exact for g, c its column sums.
struct NewtonProblem {
  Problem p;
  const double *a, *b, *f, *g, *columns;
  NewtonProblem(const char* op, const Tensor& x, const std::optional<Tensor>& y, int64_t ground, double scale, bool narrow,
                const Tensor& a, const Tensor& b, const Tensor& f, const Tensor& g, const Tensor& columns)
      : p(op, x, y, ground, scale, narrow, 1),
        a(doubles(a)),
        b(doubles(b)),
        f(doubles(f)),
        g(doubles(g)),
        columns(doubles(columns)) {
    check_doubles(op, "a", a, {1, p.c.n}, x);
    check_doubles(op, "b", b, {1, p.c.m}, x);
    check_doubles(op, "f", f, {1, p.c.n}, x);
    check_doubles(op, "g", g, {1, p.c.m}, x);
    check_doubles(op, "columns", columns, {1, p.c.m}, x);
  }
};

// info: entries kept, iterations, whether they converged. CUDA keeps all entries: delta and density are the CPU's.
template <Device device>
static void newton_direction_(const Tensor& x, const std::optional<Tensor>& y, int64_t ground, double scale, bool narrow,
                              const Tensor& a, const Tensor& b, const Tensor& f, const Tensor& g, const Tensor& columns,
                              const Tensor& rhs, double delta, double density, double tol, int64_t iterations,
                              const Tensor& direction, const Tensor& info) {
  const char* op = "newton_direction_";
  const NewtonProblem s(op, x, y, ground, scale, narrow, a, b, f, g, columns);
  const Costs& c = s.p.c;
  check_doubles(op, "rhs", rhs, {1, c.m}, x);
  check_doubles(op, "direction", direction, {1, c.m}, x);
  check_doubles(op, "info", info, {3}, x);
  if constexpr (device == Device::cpu) {
    const RoundedPotentials rounded(c, s.f, s.g);
    std::vector<double> residual(doubles(rhs), doubles(rhs) + c.m), inverse(c.m), solution(c.m);
    for (int64_t j = 0; j < c.m; ++j) inverse[j] = s.columns[j] > 0.0 ? 1.0 / s.columns[j] : 0.0;
    // The scores of a row or a column are about 1 in sum.
    const double allowed = delta * double(std::max(c.n, c.m));
    constexpr double kMostEntries = 1 << 25;
    const int64_t most = int64_t(std::min(kMostEntries, density * double(c.n) * double(c.m)));
    double* report = doubles_of(info);
    Solved solved;
    Entries kept;
    if (most > 0 && entries_of(c, rounded, s.a, s.b, allowed, most, kept)) {
      report[0] = double(kept.at.size());
      solved = conjugate_gradients(SparseSchur{kept, s.a, s.columns, c.n, c.m}, inverse, residual, tol, iterations, solution);
    } else {
      report[0] = double(c.n) * double(c.m);
      std::vector<double> product(c.m);
      const auto matrix = [&](const std::vector<double>& v, std::vector<double>& out) {
        plan_sums_of(c, 0, rounded, v.data(), s.a, nullptr, nullptr, product.data());
        for (int64_t j = 0; j < c.m; ++j) out[j] = s.columns[j] * v[j] - product[j];
      };
      solved = conjugate_gradients(matrix, inverse, residual, tol, iterations, solution);
    }
    report[1] = double(solved.iterations);
    report[2] = solved.converged;
    std::copy(solution.begin(), solution.end(), doubles_of(direction));
  } else {
    const auto guard = device_guard(x);
    const Tensor scratch =
        torch::stable::new_empty(x, {row_parts(c) + column_parts(c) + c.n + 3 * c.m + 3}, ScalarType::Double);
    DITHER_CUDA_OK(op, newton_direction_cuda(c, s.a, s.f, s.g, s.columns, doubles(rhs), tol, iterations, doubles_of(direction),
                                             doubles_of(info), doubles_of(scratch), current_stream(x)));
  }
}

// out = diag(c) - P^T diag(1/a) P of the entries that newton_direction_ keeps. Its diagonal is the sum of the others, and of
// what was left out: nothing cancels. shift times c is added to it.
[[maybe_unused]] static void schur_matrix_(const Tensor& x, const std::optional<Tensor>& y, int64_t ground, double scale,
                                           bool narrow, const Tensor& a, const Tensor& b, const Tensor& f, const Tensor& g,
                                           const Tensor& columns, double delta, double shift, const Tensor& out) {
  const char* op = "schur_matrix_";
  const NewtonProblem s(op, x, y, ground, scale, narrow, a, b, f, g, columns);
  const Costs& c = s.p.c;
  check_doubles(op, "out", out, {c.m, c.m}, x);
  const RoundedPotentials rounded(c, s.f, s.g);
  Entries kept;
  entries_of(c, rounded, s.a, s.b, delta * double(std::max(c.n, c.m)), c.n * c.m, kept);
  double* to = doubles_of(out);
  std::vector<double> diagonal(c.m), held(c.m);
  std::fill(to, to + c.m * c.m, 0.0);
  for (int64_t i = 0; i < c.n; ++i) {
    double sum = 0;
    const int64_t begin = kept.start[i], end = kept.start[i + 1];
    for (int64_t k = begin; k < end; ++k) {
      sum += kept.values[k];
      held[kept.at[k]] += kept.values[k];
    }
    const double missing = begin < end ? std::max(0.0, s.a[i] - sum) / s.a[i] : 0.0;
    for (int64_t k = begin; k < end; ++k) {
      const double share = kept.values[k] / s.a[i];
      double* row = to + kept.at[k] * c.m;
      for (int64_t l = begin; l < end; ++l) row[kept.at[l]] -= share * kept.values[l];
      row[kept.at[k]] = 0;
      diagonal[kept.at[k]] += kept.values[k] * missing;
    }
  }
  parallel(c.m, std::max<int64_t>(1, kWorthThreads / c.m), [&](int64_t lo, int64_t hi) {
    for (int64_t j = lo; j < hi; ++j) {
      double sum = diagonal[j] + std::max(0.0, s.columns[j] - held[j]) + shift * s.columns[j];
      for (int64_t l = 0; l < c.m; ++l) sum -= to[j * c.m + l];
      to[j * c.m + j] = sum > 0.0 ? sum : 1.0;  // a column without mass
    }
  });
}
}  // namespace dither

STABLE_TORCH_LIBRARY_FRAGMENT(DITHER_NS, m) {
  m.def(
      "sinkhorn_(Tensor x, Tensor? y, int ground, float scale, bool narrow, Tensor a, Tensor b, float damp_a, float damp_b, "
      "Tensor omega, int iterations, float tol, Tensor(a!) f, Tensor(b!) g, Tensor(c!) columns, Tensor(d!) errors, "
      "Tensor(e!) done) -> ()");
  m.def(
      "plan_sums_(Tensor x, Tensor? y, int ground, float scale, bool narrow, Tensor f, Tensor g, Tensor(a!) rows, "
      "Tensor(b!) linear, Tensor(c!) columns) -> ()");
  m.def("plan_(Tensor x, Tensor? y, int ground, float scale, bool narrow, Tensor f, Tensor g, Tensor(a!) out) -> ()");
  m.def(
      "newton_direction_(Tensor x, Tensor? y, int ground, float scale, bool narrow, Tensor a, Tensor b, Tensor f, Tensor g, "
      "Tensor columns, Tensor rhs, float delta, float density, float tol, int iterations, Tensor(a!) direction, "
      "Tensor(b!) info) -> ()");
  m.def(
      "schur_matrix_(Tensor x, Tensor? y, int ground, float scale, bool narrow, Tensor a, Tensor b, Tensor f, Tensor g, "
      "Tensor columns, float delta, float shift, Tensor(a!) out) -> ()");
}
#if !defined(DITHER_EMULATE)
STABLE_TORCH_LIBRARY_IMPL(DITHER_NS, CPU, m) {
  m.impl("sinkhorn_", TORCH_BOX(&dither::sinkhorn_<dither::Device::cpu>));
  m.impl("plan_sums_", TORCH_BOX(&dither::plan_sums_<dither::Device::cpu>));
  m.impl("plan_", TORCH_BOX(&dither::plan_<dither::Device::cpu>));
  m.impl("newton_direction_", TORCH_BOX(&dither::newton_direction_<dither::Device::cpu>));
  m.impl("schur_matrix_", TORCH_BOX(&dither::schur_matrix_));
}
#endif
#if defined(DITHER_CUDA) || defined(DITHER_EMULATE)
STABLE_TORCH_LIBRARY_IMPL(DITHER_NS, DITHER_CUDA_KEY, m) {
  m.impl("sinkhorn_", TORCH_BOX(&dither::sinkhorn_<dither::Device::cuda>));
  m.impl("plan_sums_", TORCH_BOX(&dither::plan_sums_<dither::Device::cuda>));
  m.impl("plan_", TORCH_BOX(&dither::plan_<dither::Device::cuda>));
  m.impl("newton_direction_", TORCH_BOX(&dither::newton_direction_<dither::Device::cuda>));
}
#endif
