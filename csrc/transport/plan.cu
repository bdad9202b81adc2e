#include <utility>
#include "block.cuh"

// Sums over a plan that is never stored. A block takes a tile of rows and columns, whose sums become partial sums of the rows
// and of the columns, joined in the order of the tiles. There are at most 32 tiles in either direction: memory is O(n + m).
namespace dither {
constexpr int kWarp = 32, kWarps = 4, kThreads = kWarp * kWarps;
constexpr int kHigh = 4, kWide = 4, kStripe = kWarp * kWide;  // rows of a warp at a time; columns of a lane, and of a warp
constexpr int kVector = 512;                                  // threads on the vectors of conjugate gradients

struct PlanFactors {
  const double *f, *g;    // as they are given, in powers of e
  const double *y, *t;    // rows get P y and columns P^T t; nullptr: of ones
  const double* skipped;  // nullptr; or nothing is done where it is set
};
struct PartialSums {
  double *rows, *linear, *columns;  // [batch][across][n], the same, [batch][down][m]
};
enum class Want { all, rows, columns };

// C of rows i .. i + kHigh and of columns j, j + kWarp, ..; beyond the last ones, theirs again.
template <class S>
__device__ inline void costs_of(const Costs& c, int64_t problem, int64_t i, int64_t j, S (&cost)[kHigh][kWide]) {
  const S *x = static_cast<const S*>(c.x) + problem * c.x_batch, *row[kHigh];
  int64_t column[kWide];
  for (int h = 0; h < kHigh; ++h) row[h] = x + smaller(i + h, c.n - 1) * c.dim;  // dim is m where costs are given
  for (int w = 0; w < kWide; ++w) column[w] = smaller(j + w * kWarp, c.m - 1);
  for (int h = 0; h < kHigh; ++h)
    for (int w = 0; w < kWide; ++w) cost[h][w] = c.ground == Ground::given ? row[h][column[w]] : S(0);
  if (c.ground == Ground::given) return;
  const S* y = static_cast<const S*>(c.y) + problem * c.y_batch;
  for (int64_t k = 0; k < c.dim; ++k)
    for (int w = 0; w < kWide; ++w) {
      const S other = y[k * c.m + column[w]];
      for (int h = 0; h < kHigh; ++h) cost[h][w] = distance_part(c.ground, row[h][k], other, cost[h][w]);
    }
  if (c.ground == Ground::euclidean)
    for (int h = 0; h < kHigh; ++h)
      for (int w = 0; w < kWide; ++w) cost[h][w] = square_root(cost[h][w]);
}

__device__ inline double over_warp(double sum) {
  for (int half = kWarp / 2; half > 0; half /= 2) sum += __shfl_xor_sync(~0u, sum, half);
  return sum;
}

template <class S, Want kWant>
__global__ void __launch_bounds__(kThreads)
    tiles_kernel(const __grid_constant__ Costs c, const __grid_constant__ PlanFactors of,
                 const __grid_constant__ PartialSums to) {
  __shared__ double shared[kWarps][kStripe];
  constexpr double none = -__builtin_inf();
  if (of.skipped && *of.skipped != 0.0) return;
  const Chunks down = row_tiles(c.n), across = column_tiles(c.m);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t block = blockIdx.x, right = block % across.count, under = block / across.count % down.count,
                problem = block / (across.count * down.count);
  const int64_t bottom = smaller(c.n, (under + 1) * down.size), end = smaller(c.m, (right + 1) * across.size);
  const double *f = of.f + problem * c.n, *g = of.g + problem * c.m;
  for (int64_t left = right * across.size; left < end; left += kStripe) {
    double base[kWide], y[kWide], column[kWide] = {};
    for (int w = 0; w < kWide; ++w) {
      const int64_t j = left + w * kWarp + lane;
      base[w] = j < end ? g[j] * kLog2e : none;
      y[w] = j < end && of.y ? of.y[problem * c.m + j] : 1.0;
    }
    for (int64_t i = under * down.size + warp * kHigh; i < bottom; i += kWarps * kHigh) {
      S cost[kHigh][kWide];
      costs_of(c, problem, i, left + lane, cost);
      DITHER_UNROLL(kHigh)
      for (int h = 0; h < kHigh; ++h) {
        const bool inside = i + h < bottom;
        const double shift = inside ? f[i + h] * kLog2e : none, t = inside && of.t ? of.t[problem * c.n + i + h] : 1.0;
        double row = 0, linear = 0;
        for (int w = 0; w < kWide; ++w) {
          const double value = double(cost[h][w]), e = term(c.narrow, shift + base[w] - c.scale * value);
          if constexpr (kWant != Want::columns) row += e * y[w];
          if constexpr (kWant == Want::all) linear += e > 0.0 ? e * value : 0.0;  // nothing of a forbidden pair
          if constexpr (kWant != Want::rows) column[w] += e * t;
        }
        // A row has one warp: stripe after stripe is added.
        const auto add = [&](double* parts, double sum) {
          sum = over_warp(sum);
          double& part = parts[(problem * across.count + right) * c.n + i + h];
          if (lane == 0 && inside) part = left == right * across.size ? sum : part + sum;
        };
        if constexpr (kWant != Want::columns) add(to.rows, row);
        if constexpr (kWant == Want::all) add(to.linear, linear);
      }
    }
    if constexpr (kWant != Want::rows) {
      __syncthreads();
      for (int w = 0; w < kWide; ++w) shared[warp][w * kWarp + lane] = column[w];
      __syncthreads();
      for (int64_t at = threadIdx.x; at < kStripe && left + at < end; at += kThreads) {
        double sum = 0;
        for (int k = 0; k < kWarps; ++k) sum += shared[k][at];
        to.columns[(problem * down.count + under) * c.m + left + at] = sum;
      }
    }
  }
}

// out[batch][n] = the sum of parts[batch][count][n], divided by the weights if there are any; 0 where a weight is 0.
__global__ void __launch_bounds__(kThreads)
    join_kernel(const double* parts, int64_t count, int64_t n, int64_t all, const double* weight, double* out) {
  const int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (at >= all) return;
  const double* part = parts + at / n * count * n + at % n;
  double sum = 0;
  for (int64_t k = 0; k < count; ++k) sum += part[k * n];
  out[at] = !weight ? sum : weight[at] > 0.0 ? sum / weight[at] : 0.0;
}
static int join(const double* parts, int64_t count, int64_t n, int64_t batch, const double* weight, double* out,
                Stream stream) {
  const int64_t all = batch * n;
  return launch(join_kernel, unsigned((all + kThreads - 1) / kThreads), kThreads, 0, stream)(parts, count, n, all, weight, out);
}

template <Want kWant>
static int sum_tiles(const Costs& c, const PlanFactors& of, const PartialSums& to, Stream stream) {
  const unsigned blocks = unsigned(c.batch * row_tiles(c.n).count * column_tiles(c.m).count);
  return c.type == DType::f64 ? launch(tiles_kernel<double, kWant>, blocks, kThreads, 0, stream)(c, of, to)
                              : launch(tiles_kernel<float, kWant>, blocks, kThreads, 0, stream)(c, of, to);
}

template <class S>
__global__ void __launch_bounds__(kThreads)
    plan_kernel(const __grid_constant__ Costs c, const double* f, const double* g, double* out) {
  const int64_t at = int64_t(blockIdx.x) * kThreads + threadIdx.x, row = at / c.m, j = at % c.m, problem = row / c.n;
  if (problem < c.batch)
    out[at] = term(c.narrow, (f[row] + g[problem * c.m + j]) * kLog2e - c.scale * cost_at<S>(c, problem, row % c.n, j));
}
int plan_cuda(const Costs& c, const double* f, const double* g, double* out, Stream stream) {
  const unsigned blocks = unsigned((c.batch * c.n * c.m + kThreads - 1) / kThreads);
  return c.type == DType::f64 ? launch(plan_kernel<double>, blocks, kThreads, 0, stream)(c, f, g, out)
                              : launch(plan_kernel<float>, blocks, kThreads, 0, stream)(c, f, g, out);
}

int plan_sums_cuda(const Costs& c, const double* f, const double* g, double* rows, double* linear, double* columns,
                   double* scratch, Stream stream) {
  const int64_t down = row_tiles(c.n).count, across = column_tiles(c.m).count, room = c.batch * row_parts(c);
  const PartialSums parts{scratch, scratch + room, scratch + 2 * room};
  int error = sum_tiles<Want::all>(c, {f, g, nullptr, nullptr, nullptr}, parts, stream);
  if (!error) error = join(parts.rows, across, c.n, c.batch, nullptr, rows, stream);
  if (!error) error = join(parts.linear, across, c.n, c.batch, nullptr, linear, stream);
  if (!error) error = join(parts.columns, down, c.m, c.batch, nullptr, columns, stream);
  return error;
}

// ---- Conjugate gradients with the inverse diagonal as the preconditioner: one block does all of an iteration but the product.

struct Gradients {
  int64_t m;
  const double *diagonal, *rhs;
  double *x, *residual, *step;  // [m]
  const double* product;        // P^T diag(1/a) P step
  double *rho, *goal, *over, *info;
};

// residual . residual / diagonal, after both of them have changed.
__device__ inline double preconditioned_square(const Gradients& s, double* shared) {
  double mine = 0;
  for (int64_t j = threadIdx.x; j < s.m; j += kVector)
    if (s.diagonal[j] > 0.0) mine += s.residual[j] * (1.0 / s.diagonal[j] * s.residual[j]);
  return over_block(mine, shared, Plus{});
}
__device__ inline void next_step(const Gradients& s, double more) {
  for (int64_t j = threadIdx.x; j < s.m; j += kVector) {
    const double z = s.diagonal[j] > 0.0 ? 1.0 / s.diagonal[j] * s.residual[j] : 0.0;
    s.step[j] = more != 0.0 ? z + more * s.step[j] : z;
  }
}
__device__ inline void note(const Gradients& s, double rho, double goal, double iterations) {
  *s.rho = rho;
  *s.goal = goal;
  s.info[1] = iterations;
  *s.over = s.info[2] = !(rho > goal && rho > 0.0);
}

__global__ void __launch_bounds__(kVector) start_kernel(const __grid_constant__ Gradients s, double tol, double entries) {
  __shared__ double shared[kVector];
  for (int64_t j = threadIdx.x; j < s.m; j += kVector) {
    s.residual[j] = s.rhs[j];
    s.x[j] = 0;
  }
  const double rho = preconditioned_square(s, shared);
  next_step(s, 0.0);
  if (threadIdx.x != 0) return;
  s.info[0] = entries;
  note(s, rho, tol * tol * rho, 0);
}

__global__ void __launch_bounds__(kVector) advance_kernel(const __grid_constant__ Gradients s) {
  __shared__ double shared[kVector];
  if (*s.over != 0.0) return;
  const double rho = *s.rho;
  const auto image = [&](int64_t j) { return s.diagonal[j] * s.step[j] - s.product[j]; };
  double mine = 0;
  for (int64_t j = threadIdx.x; j < s.m; j += kVector) mine += s.step[j] * image(j);
  const double curvature = over_block(mine, shared, Plus{});
  if (!(curvature > 0.0)) {  // nothing but rounding is left
    if (threadIdx.x == 0) *s.over = s.info[2] = 1;
    return;
  }
  const double size = rho / curvature;
  for (int64_t j = threadIdx.x; j < s.m; j += kVector) {
    s.residual[j] -= size * image(j);
    s.x[j] += size * s.step[j];
  }
  const double next = preconditioned_square(s, shared);
  next_step(s, next / rho);
  if (threadIdx.x == 0) note(s, next, *s.goal, s.info[1] + 1);
}

int newton_direction_cuda(const Costs& c, const double* a, const double* f, const double* g, const double* columns,
                          const double* rhs, double tol, int64_t iterations, double* direction, double* info, double* scratch,
                          Stream stream) {
  const int64_t down = row_tiles(c.n).count, across = column_tiles(c.m).count;
  double* at = scratch;
  const auto room = [&](int64_t size) { return std::exchange(at, at + size); };
  const PartialSums parts{room(row_parts(c)), nullptr, room(column_parts(c))};
  double *t = room(c.n), *product = room(c.m), *residual = room(c.m), *step = room(c.m), *numbers = room(3);
  const Gradients s{c.m, columns, rhs, direction, residual, step, product, numbers, numbers + 1, numbers + 2, info};
  int error = launch(start_kernel, 1, kVector, 0, stream)(s, tol, double(c.n) * double(c.m));
  bool over = false;
  for (int64_t k = 0; k < iterations && !error && !over; ++k) {
    error = sum_tiles<Want::rows>(c, {f, g, step, nullptr, s.over}, parts, stream);
    if (!error) error = join(parts.rows, across, c.n, 1, a, t, stream);
    if (!error) error = sum_tiles<Want::columns>(c, {f, g, nullptr, t, s.over}, parts, stream);
    if (!error) error = join(parts.columns, down, c.m, 1, nullptr, product, stream);
    if (!error) error = launch(advance_kernel, 1, kVector, 0, stream)(s);
    if (!error && (k + 1) % kPoll == 0) error = all_set(s.over, 1, stream, over);
  }
  return error;
}
}  // namespace dither
