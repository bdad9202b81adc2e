// Entropic optimal transport: P_ij = exp(f_i + g_j - C_ij / reg), whose marginals are to be a and b.
//
// One iteration is one sweep over the costs. With e_j = exp(f_i + g_j - C_ij / reg) of the old f, s = sum_j e_j gives the row's
// new f_i += ln(a_i / s), and e_j a_i / s is its new share of column j: one exponential an element, and no maximum. Rows whose
// sum leaves the safe range are computed again with their maximum as the shift, and columns that underflow by themselves. The
// column sums, and with them the L1 error of the marginals, come before g is updated, for nothing.
//
// The terms of an iteration are kept where memory allows: while g stays near what it was then, the next iterations multiply
// them by the change, 2^(g_j - what it was), and spend no exponential (Schmitzer 2019). The fallbacks are the same.
//
// Potentials are doubles, divided by reg, here in powers of 2. A row or column of weight 0 has the potential -inf and an empty
// plan; a cost of +inf forbids a pair. Sums are taken in an order that depends on the shape alone: by lanes within a row, over
// the rows of a chunk, then over chunks. So results do not depend on the number of threads, but do on the instruction set, in
// the last digits: fma is used where there is one.
//
// Damped (unbalanced, Chizat et al. 2018), the marginals are held by rho KL: f is that of the balanced row times rho / (rho +
// reg).
#pragma once
#include "../common/cpu.h"
#include "../common/dtype.h"
#include "../common/power.h"
#include "../common/stream.h"

namespace dither {
enum class Ground : int { given, sqeuclidean, euclidean, l1 };
constexpr int kGrounds = 4;

// C: given as [batch][n][m], or the distances of x, [batch][n][dim], from y, [batch][dim][m].
struct Costs {
  const void *x, *y;
  int64_t batch, n, m, dim;
  int64_t x_batch, y_batch;  // strides, in elements; 0: one for all
  Ground ground;
  DType type;    // f32 or f64
  bool narrow;   // plans are computed in float
  double scale;  // of C: log2 e / reg
};

struct Sinkhorn {
  Costs c;
  const double *a, *b, *omega;  // [batch][n], [batch][m], [batch]
  double damp_a, damp_b;
  DITHER_HD bool exact(int64_t problem) const { return damp_a == 1.0 && omega[problem] == 1.0; }  // rows meet a
};

template <class T>
DITHER_HD T distance_part(Ground ground, T x, T y, T sum) {
  const T d = x - y;
  return sum + (ground == Ground::l1 ? absolute(d) : d * d);
}

// One cost by itself.
template <class S>
DITHER_HD double cost_at(const Costs& c, int64_t problem, int64_t i, int64_t j) {
  const S* x = static_cast<const S*>(c.x) + problem * c.x_batch + i * c.dim;  // dim is m where costs are given
  if (c.ground == Ground::given) return double(x[j]);
  const S* y = static_cast<const S*>(c.y) + problem * c.y_batch + j;
  S sum = 0;
  for (int64_t k = 0; k < c.dim; ++k) sum = distance_part(c.ground, x[k], y[k * c.m], sum);
  return double(c.ground == Ground::euclidean ? square_root(sum) : sum);
}

// Where a potential goes whose full update is `full`, and what its marginal should then be.
DITHER_HD double relaxed(double old, double full, double damp, double omega) {
  if (damp == 1.0 && omega == 1.0) return full;
  return old == -__builtin_inf() ? damp * full : old + omega * (damp * full - old);
}
// 2^x of a double that may be anything.
DITHER_HD double exp2_of_double(double x) { return power_of_2<double, uint64_t>(x); }
DITHER_HD double log2_of_double(double x) { return x > 0.0 ? logarithm(x) * kLog2e : -__builtin_inf(); }
DITHER_HD double wanted_marginal(double weight, double potential, double damp) {
  return damp == 1.0 || !(weight > 0.0) ? weight : weight * exp2_of_double(potential * (1.0 - 1.0 / damp));
}

// Sums that can be trusted: what underflowed beside them is less than a rounding.
template <class T>
constexpr double kLeastRow = sizeof(T) == 8 ? 0x1p-500 : 0x1p-40;
template <class T>
constexpr double kMostRow = sizeof(T) == 8 ? 0x1p900 : 0x1p100;
// a over such a sum, which scales the row's terms, keeps its digits too.
template <class T>
constexpr double kLeastShare = sizeof(T) == 8 ? 0x1p-960 : 0x1p-120;
template <class T>
DITHER_HD bool trusted(double sum, double weight, double least = kLeastRow<T>) {
  return sum > least && sum < kMostRow<T> && sum * kLeastShare<T> <= weight;
}
template <class T>
constexpr double kLeastColumn = sizeof(T) == 8 ? 0x1p-450 : 0x1p-60;

// Of kept terms, which are multiplied by up to 2^kMostChange: as much is lost of a column as with terms of now.
template <class T>
constexpr double kMostChange = sizeof(T) == 8 ? 200 : 15;
template <class T>
constexpr double kLeastKeptRow = sizeof(T) == 8 ? 0x1p-300 : 0x1p-25;

// ---- CPU

constexpr int64_t kLine = 64;  // bytes
DITHER_HD int64_t whole_lines(int64_t n, int64_t item) { return (n * item + kLine - 1) / kLine * kLine / item; }
struct Chunks {
  int64_t size, count;
};
inline Chunks row_chunks(int64_t n) {
  const int64_t size = larger<int64_t>(64, ((n + 31) / 32 + 3) / 4 * 4);
  return {size, (n + size - 1) / size};
}

// Columns as the rows see them, in whole lines of the plan's type: potentials, now or when terms were kept, and 2^ of what the
// exact ones of now are more.
struct Columns {
  void *g, *rest;
};
constexpr int kRowBlock = 4;
// Bytes of room for rows of terms, and of costs where these are distances.
inline int64_t row_scratch(const Costs& c) { return 2 * kRowBlock * whole_lines(c.m, 8) * 8; }
// Terms 2^(base_i + g_j - C_ij) of a problem.
struct Terms {
  void* rows;    // [whole blocks][whole lines] of the plan's type; nullptr: not kept
  double* base;  // [n]
  bool made;     // by an earlier iteration
};

DITHER_PER_ISA(void round_columns(const Costs&, const double* g, const Columns&))
// rest alone, of g beside what was rounded; whether that is near enough for kept terms.
DITHER_PER_ISA(bool change_columns(const Costs&, const double* g, const Columns&))
// Rows lo .. hi of a problem: f is updated, sums[whole lines], of the type of the plan, get the columns' shares, and the L1
// error of the rows is returned.
DITHER_PER_ISA(double sinkhorn_rows(const Sinkhorn&, int64_t problem, int64_t lo, int64_t hi, const Columns&, const Terms&,
                                    double* f, void* scratch, void* sums))
// sums[chunks][whole lines] -> columns[m].
DITHER_PER_ISA(void join_columns(const Costs&, int64_t chunks, const void* sums, double* columns))
// The L1 error of the columns, and g after them. Those that underflowed have been replaced.
DITHER_PER_ISA(double column_error(const Sinkhorn&, int64_t problem, const double* columns, const double* g))
DITHER_PER_ISA(void move_columns(const Sinkhorn&, int64_t problem, const double* columns, double* g))
// sum_i 2^(f_i - C_ij) as its log2.
DITHER_PER_ISA(double column_log(const Costs&, int64_t problem, int64_t j, const double* f))

// Sums over the plan of given potentials, rows lo .. hi of a problem.
struct PlanSums {
  const void* y;          // as plan_vector gives it, of ones
  double *rows, *linear;  // sum_j P_ij, sum_j P_ij C_ij; or nullptr
  const double* a;        // nullptr; or columns get sum_i P_ij (P y)_i / a_i, instead of sum_i P_ij
};
DITHER_PER_ISA(void plan_vector(const Costs&, const Columns&, const double* y, void* to))
DITHER_PER_ISA(void plan_rows(const Costs&, int64_t problem, int64_t lo, int64_t hi, const Columns&, const double* f,
                              const PlanSums&, void* scratch, void* columns))
// The plan itself, rows lo .. hi of a problem; ones: of plan_vector.
DITHER_PER_ISA(void plan_terms(const Costs&, int64_t problem, int64_t lo, int64_t hi, const Columns&, const double* f,
                               const void* ones, void* scratch, double* out))
// Entries of row i whose scores P_ij max(1 / a_i, 1 / b_j) are at least `least`, and their number. mass[exponent] += score, all
// the others in mass[0].
struct KeptEntries {
  int32_t* at;
  int16_t* exponents;  // of scores, as they are in a double's bits
  double* values;
};
constexpr int kExponents = 2048;
DITHER_PER_ISA(int64_t plan_entries(const Costs&, int64_t problem, int64_t i, const Columns&, double f, double inverse_a,
                                    const double* inverse_b, double least, void* scratch, const KeptEntries&, double* mass))

// ---- CUDA

// All iterations of all problems; scratch: batch (n + m + 1). A problem that is done is left alone.
int sinkhorn_cuda(const Sinkhorn&, int64_t iterations, double tol, double* f, double* g, double* columns, double* errors,
                  int64_t* done, double* scratch, Stream);

// Tiles of a plan in either direction.
constexpr int64_t kMostTiles = 32;
DITHER_HD Chunks tiles_of(int64_t n, int64_t least) {
  const int64_t size = (n + kMostTiles * least - 1) / (kMostTiles * least) * least;
  return {size, (n + size - 1) / size};
}
DITHER_HD Chunks row_tiles(int64_t n) { return tiles_of(n, 64); }
DITHER_HD Chunks column_tiles(int64_t m) { return tiles_of(m, 128); }
DITHER_HD int64_t row_parts(const Costs& c) { return column_tiles(c.m).count * c.n; }
DITHER_HD int64_t column_parts(const Costs& c) { return row_tiles(c.n).count * c.m; }

int plan_cuda(const Costs&, const double* f, const double* g, double* out, Stream);
// scratch: batch (2 row_parts + column_parts).
int plan_sums_cuda(const Costs&, const double* f, const double* g, double* rows, double* linear, double* columns,
                   double* scratch, Stream);
// Of one problem, by all of its entries; scratch: row_parts + column_parts + n + 3 m + 3.
int newton_direction_cuda(const Costs&, const double* a, const double* f, const double* g, const double* columns,
                          const double* rhs, double tol, int64_t iterations, double* direction, double* info, double* scratch,
                          Stream);
}  // namespace dither
