#include "transposable_nm.h"
#include "../common/launch.cuh"

namespace dither {
constexpr int kThreads = 64;

// kSide threads of a warp, one for each row and for each column.
template <int kSide>
struct Team {
  static constexpr bool kMirrored = false;
  using V = float;
  using I = int32_t;
  using U = uint32_t;
  const int lane = int(threadIdx.x % kSide), shift = int(threadIdx.x % 32 / kSide * kSide);
  const uint32_t mask = (~0u >> (32 - kSide)) << shift;
  template <class Body>
  __device__ void each(int m, const Body& body) const {
    __syncwarp(mask);
    if (lane < m) body(lane);
    __syncwarp(mask);
  }
  template <class Body>
  __device__ void lanes(int m, const Body& body) const {
    each(m, body);
  }
  template <class Body>
  __device__ void each_of(uint32_t word, const Body& body) const {
    each(kSide, [&](int k) {
      if (word >> k & 1) body(k);
    });
  }
  template <class Test>
  __device__ uint32_t where(int m, const Test& test) const {
    __syncwarp(mask);
    return (__ballot_sync(mask, lane < m && test(lane)) & mask) >> shift;
  }
  template <class Test>
  __device__ uint32_t which(uint32_t word, const Test& test) const {
    return where(kSide, [&](int k) { return (word >> k & 1) && test(k); });
  }
  __device__ int first_largest(int m, const float* x) const { return first_of_largest(m, x); }
  template <class T>
  __device__ T largest(T x) const {
    for (int bits = kSide / 2; bits > 0; bits /= 2) x = larger(x, __shfl_xor_sync(mask, x, bits));
    return x;
  }
};

// `factor` and `inverse`: of columns and of rows.
template <class Team>
__device__ void transport(const Team& team, const TransposableNM& t, const Square<false>& y, float* factor, float* inverse) {
  const int m = t.m;
  const float n = float(t.n);
  team.each(m, [&](int i) {
    factor[i] = 1.0f;
    for (int j = 0; j < m; ++j) y.set(i, j, first_plan<uint32_t>(y(i, j)));
  });
  for (int iteration = 0; iteration < t.iterations; ++iteration) {
    team.each(m, [&](int i) {
      float sum = 0;
      for (int j = 0; j < m; ++j) {
        const float x = y(i, j) * factor[j];
        sum += at_most(x, 1.0f);
        y.set(i, j, x);
      }
      inverse[i] = n / sum;
      for (int j = 0; j < m; ++j) y.set(i, j, y(i, j) * inverse[i]);
    });
    team.each(m, [&](int j) {
      float sum = 0;
      for (int i = 0; i < m; ++i) sum += at_most(y(i, j), inverse[i]);
      factor[j] = n / sum;
    });
  }
  team.each(m, [&](int i) {
    for (int j = 0; j < m; ++j) y.set(i, j, at_most(y(i, j) * factor[j], 1.0f));
  });
}

__host__ __device__ inline int pitch_of(int m) { return m | 1; }  // odd, so that columns lie in all banks
template <int kSide>
__host__ __device__ int room_of(int m) {
  return 2 * m * pitch_of(m) + Margins::kArrays * kSide;
}

// A team a tile.
template <class S, int kSide>
__global__ void __launch_bounds__(kThreads) transposable_nm_kernel(const __grid_constant__ TransposableNM t) {
  using T = decltype(widen(S{}) + 0);
  DYNAMIC_SHARED(float, shared);
  const int64_t tile = int64_t(blockIdx.x) * (kThreads / kSide) + threadIdx.x / kSide;
  if (tile >= t.tiles()) return;
  const int m = t.m, pitch = pitch_of(m);
  float* room = shared + int(threadIdx.x / kSide) * room_of<kSide>(m);
  const Square<false> weight{room, pitch, nullptr}, score{room + m * pitch, pitch, nullptr};
  const Team<kSide> team;
  const Rounding<Team<kSide>> rounding{team, t.n, m, weight, score, Margins(room + 2 * m * pitch, kSide)};
  const S* w = static_cast<const S*>(t.w) + t.start(tile);
  T most = 0;
  const auto size = [&](int i, int j) { return absolute(T(widen(w[i * t.columns + j]))); };
  team.each(m, [&](int j) {
    for (int i = 0; i < m; ++i) most = is_finite(size(i, j)) ? larger(most, size(i, j)) : most;
  });
  most = team.largest(most);
  team.each(m, [&](int j) {
    for (int i = 0; i < m; ++i) {
      const float x = relative(size(i, j), most);
      weight.set(i, j, x);
      score.set(i, j, x);
    }
  });
  if (t.iterations) transport(team, t, score, rounding.at.column, rounding.at.row);
  rounding.choose();
  rounding.complete();
  rounding.exchange();
  uint8_t* keep = t.keep + t.start(tile);
  team.each(m, [&](int j) {
    for (int i = 0; i < m; ++i) keep[i * t.columns + j] = rounding.at.held[i] >> j & 1;
  });
}

int transposable_nm_cuda(const TransposableNM& t, Stream stream) {
  int error = 0;
  with_type(t.type, [&](auto tag) {
    using S = decltype(tag);
    const auto run = [&](auto side) {
      constexpr int kSide = decltype(side)::value, kTeams = kThreads / kSide;
      const auto blocks = unsigned((t.tiles() + kTeams - 1) / kTeams);
      const size_t bytes = sizeof(float) * kTeams * room_of<kSide>(t.m);
      error = launch(transposable_nm_kernel<S, kSide>, blocks, kThreads, bytes, stream)(t);
    };
    if (t.m <= 8) run(Constant<8>{});
    else if (t.m <= 16) run(Constant<16>{});
    else run(Constant<32>{});
  });
  return error;
}
}  // namespace dither
