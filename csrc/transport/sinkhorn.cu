#include "block.cuh"

// An iteration is three kernels: a block a row, which gets its f; blocks of columns, which get their sums and the g that
// follows; a block a problem, which adds up the error and decides whether to go on. Each sum has its own fixed order.
namespace dither {
constexpr int kThreads = 128, kAcross = 32, kDown = 16;

struct Progress {
  double *f, *g, *columns, *errors;
  int64_t* done;
  double *row_error, *next_g, *stopped;  // [batch][n], [batch][m], [batch]
  int64_t iterations, iteration;
  double tol;
};

struct Most {
  __device__ double operator()(double a, double b) const { return larger(a, b); }
};

__global__ void __launch_bounds__(kThreads) scale_kernel(double* x, const double* weight, int64_t n, double factor) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i < n) x[i] = weight[i] > 0.0 ? x[i] * factor : -__builtin_inf();
}
__global__ void __launch_bounds__(kThreads) clear_kernel(const __grid_constant__ Progress p, int64_t batch) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i < batch) {
    p.done[i] = 0;
    p.stopped[i] = 0;
  }
}

template <class S>
__global__ void __launch_bounds__(kThreads)
    rows_kernel(const __grid_constant__ Sinkhorn s, const __grid_constant__ Progress p) {
  __shared__ double shared[kThreads];
  const Costs& c = s.c;
  const int64_t at = blockIdx.x, problem = at / c.n, i = at % c.n;
  constexpr double none = -__builtin_inf();
  if (p.stopped[problem] != 0.0) return;
  const double *g = p.g + problem * c.m, weight = s.a[at], old = p.f[at];
  const auto sum_of = [&](double shift) {
    double sum = 0;
    for (int64_t j = threadIdx.x; j < c.m; j += kThreads)
      sum += term(c.narrow, g[j] - c.scale * cost_at<S>(c, problem, i, j) + shift);
    return over_block(sum, shared, Plus{});
  };
  double base = old > none ? old : 0.0, sum = weight > 0.0 ? sum_of(base) : 0.0;
  bool nowhere = false;
  if (weight > 0.0 && !(c.narrow ? trusted<float>(sum, weight) : trusted<double>(sum, weight))) {
    double high = none;
    for (int64_t j = threadIdx.x; j < c.m; j += kThreads) high = larger(high, g[j] - c.scale * cost_at<S>(c, problem, i, j));
    high = over_block(high, shared, Most{});
    nowhere = !(high > none);
    base = nowhere ? 0.0 : -high;
    sum = nowhere ? 0.0 : sum_of(base);
  }
  if (threadIdx.x != 0) return;
  double error = nowhere ? weight : 0.0;
  if (!(weight > 0.0)) {
    p.f[at] = none;
  } else if (!nowhere) {
    const double f = relaxed(old, base + log2_of_double(weight / sum), s.damp_a, s.omega[problem]);
    p.f[at] = f;
    if (!s.exact(problem)) error = absolute(sum * exp2_of_double(f - base) - wanted_marginal(weight, f, s.damp_a));
  }
  p.row_error[at] = error;
}

template <class S>
__global__ void __launch_bounds__(kAcross* kDown)
    columns_kernel(const __grid_constant__ Sinkhorn s, const __grid_constant__ Progress p) {
  __shared__ double shared[kDown][kAcross];
  __shared__ int faint;
  const Costs& c = s.c;
  const int64_t blocks = (c.m + kAcross - 1) / kAcross, problem = blockIdx.x / blocks;
  const int across = threadIdx.x % kAcross, down = threadIdx.x / kAcross;
  const int64_t j = blockIdx.x % blocks * kAcross + across, at = problem * c.m + j;
  constexpr double none = -__builtin_inf();
  if (p.stopped[problem] != 0.0) return;
  const bool inside = j < c.m;
  const double *f = p.f + problem * c.n, g = inside ? p.g[at] : none, weight = inside ? s.b[at] : 0.0;
  const auto sum_of = [&](double shift) {
    double sum = 0;
    if (inside && weight > 0.0 && shift > none)
      for (int64_t i = down; i < c.n; i += kDown)
        if (f[i] > none) sum += term(c.narrow, f[i] - c.scale * cost_at<S>(c, problem, i, j) + shift);
    __syncthreads();
    shared[down][across] = sum;
    __syncthreads();
    sum = 0;
    for (int k = 0; k < kDown; ++k) sum += shared[k][across];
    return sum;
  };
  double base = g, sum = sum_of(base);
  const double least = c.narrow ? kLeastColumn<float> : kLeastColumn<double>;
  const bool weak = weight > 0.0 && !(sum > least && sum < 1.0 / least);
  if (threadIdx.x == 0) faint = 0;
  __syncthreads();
  if (weak) faint = 1;
  __syncthreads();
  if (faint) {
    double high = none;
    if (weak)
      for (int64_t i = down; i < c.n; i += kDown)
        if (f[i] > none) high = larger(high, f[i] - c.scale * cost_at<S>(c, problem, i, j));
    __syncthreads();
    shared[down][across] = high;
    __syncthreads();
    for (int k = 0; k < kDown; ++k) high = larger(high, shared[k][across]);
    const double again = sum_of(weak ? -high : none);
    if (weak) {
      base = -high;
      sum = high > none ? again : 0.0;
    }
  }
  if (down != 0 || !inside) return;
  p.columns[at] = sum > 0.0 ? sum * (base == g ? 1.0 : exp2_of_double(g - base)) : 0.0;
  p.next_g[at] = !(weight > 0.0) ? none
                 : sum > 0.0     ? relaxed(g, base + log2_of_double(weight / sum), s.damp_b, s.omega[problem])
                                 : g;
}

__global__ void __launch_bounds__(kThreads)
    finish_kernel(const __grid_constant__ Sinkhorn s, const __grid_constant__ Progress p) {
  __shared__ double shared[kThreads];
  const int64_t problem = blockIdx.x, n = s.c.n, m = s.c.m;
  if (p.stopped[problem] != 0.0) return;
  double mine = 0;
  for (int64_t i = threadIdx.x; i < n; i += kThreads) mine += p.row_error[problem * n + i];
  for (int64_t j = threadIdx.x; j < m; j += kThreads) {
    const int64_t at = problem * m + j;
    mine += absolute(p.columns[at] - wanted_marginal(s.b[at], p.g[at], s.damp_b));
  }
  const double error = over_block(mine, shared, Plus{});
  const bool stop = error <= p.tol;
  if (!stop)
    for (int64_t j = threadIdx.x; j < m; j += kThreads) p.g[problem * m + j] = p.next_g[problem * m + j];
  if (threadIdx.x != 0) return;
  p.errors[problem * p.iterations + p.iteration] = error;
  p.done[problem] = p.iteration + 1;
  if (stop) p.stopped[problem] = 1;
}

template <class S>
static int run(const Sinkhorn& s, Progress p, Stream stream) {
  const Costs& c = s.c;
  const unsigned rows = unsigned(c.batch * c.n), columns = unsigned(c.batch * ((c.m + kAcross - 1) / kAcross));
  int error = 0;
  bool over = false;
  for (p.iteration = 0; p.iteration < p.iterations && !error && !over; ++p.iteration) {
    error = launch(rows_kernel<S>, rows, kThreads, 0, stream)(s, p);
    if (!error) error = launch(columns_kernel<S>, columns, kAcross * kDown, 0, stream)(s, p);
    if (!error) error = launch(finish_kernel, unsigned(c.batch), kThreads, 0, stream)(s, p);
    const int64_t next = p.iteration + 1;
    if (!error && p.tol >= 0.0 && next % kPoll == 0 && next < p.iterations) error = all_set(p.stopped, c.batch, stream, over);
  }
  return error;
}

int sinkhorn_cuda(const Sinkhorn& s, int64_t iterations, double tol, double* f, double* g, double* columns, double* errors,
                  int64_t* done, double* scratch, Stream stream) {
  const Costs& c = s.c;
  const int64_t rows = c.batch * c.n, all = c.batch * c.m;
  const Progress p{f, g, columns, errors, done, scratch, scratch + rows, scratch + rows + all, iterations, 0, tol};
  const auto scale = [&](double* x, const double* weight, int64_t n, double factor) {
    return launch(scale_kernel, unsigned((n + kThreads - 1) / kThreads), kThreads, 0, stream)(x, weight, n, factor);
  };
  int error = launch(clear_kernel, unsigned((c.batch + kThreads - 1) / kThreads), kThreads, 0, stream)(p, c.batch);
  if (!error) error = scale(f, s.a, rows, kLog2e);
  if (!error) error = scale(g, s.b, all, kLog2e);
  if (!error) error = c.type == DType::f64 ? run<double>(s, p, stream) : run<float>(s, p, stream);
  if (!error) error = scale(f, s.a, rows, kLn2);
  if (!error) error = scale(g, s.b, all, kLn2);
  return error;
}
}  // namespace dither
