#include "select.h"
#include "../common/launch.cuh"

namespace dither {
constexpr int kThreads = 256;
constexpr unsigned kAll = ~0u;

template <int kBytes>
struct alignas(kBytes) Line {
  char bytes[kBytes];
};
// As many elements as make 16 bytes, where the address allows it.
template <int kCount, class S>
__device__ inline void load(const S* from, S (&to)[kCount]) {
  if (reinterpret_cast<uintptr_t>(from) % sizeof to == 0)
    *reinterpret_cast<Line<sizeof to>*>(to) = *reinterpret_cast<const Line<sizeof to>*>(from);
  else
    for (int j = 0; j < kCount; ++j) to[j] = from[j];
}
template <int kCount, class S>
__device__ inline void store(const S (&from)[kCount], S* to) {
  if (reinterpret_cast<uintptr_t>(to) % sizeof from == 0)
    *reinterpret_cast<Line<sizeof from>*>(to) = *reinterpret_cast<const Line<sizeof from>*>(from);
  else
    for (int j = 0; j < kCount; ++j) to[j] = from[j];
}

// Keys of scores: w, or |w| times its factor.
template <class Key, class S>
__device__ inline Key key_of(S x, const void* factor, int64_t index) {
  if constexpr (sizeof(Key) == 2) {
    return magnitude(x);
  } else {
    using T = decltype(widen(x) + 0);
    return magnitude(factor ? T(absolute(T(widen(x))) * static_cast<const T*>(factor)[index]) : T(widen(x)));
  }
}
template <class S>
__device__ inline S pruned(S x, const Select& s) {
  using T = decltype(widen(x) + 0);
  const T beta = s.beta_on_device ? T(*s.beta_on_device) : T(s.beta);
  S y;
  narrow(beta == T(0) ? T(0) : T(beta * widen(x)), y);
  return y;
}

// Groups of consecutive elements. A lane holds V of them; M / V lanes hold a group and compare by shuffles.
// rank = how many come before: larger ones, and equal ones of lower index.
template <class Key, int M, class S>
__global__ void __launch_bounds__(kThreads) rows_kernel(const __grid_constant__ Select s) {
  constexpr int V = 16 / sizeof(S), G = M < V ? M : V, kPartners = M > V ? M / V : 1;  // G: elements of a group in a lane
  const int64_t numel = s.numel(), i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * V;
  const bool inside = i + V <= numel;  // else some or none: numel is a multiple of 4
  const int count = int(inside ? V : larger<int64_t>(0, numel - i));
  S x[V] = {};
  if (inside) load<V>(static_cast<const S*>(s.w) + i, x);
  else
    for (int j = 0; j < count; ++j) x[j] = static_cast<const S*>(s.w)[i + j];
  Key key[V];
  const int64_t column = s.factor ? i % (s.groups * M) : 0, row = s.groups * M;
  for (int j = 0; j < V; ++j) key[j] = key_of<Key>(x[j], s.factor, column + j < row ? column + j : column + j - row);
  int rank[V] = {};
#pragma unroll
  for (int j = 0; j < V; ++j)
#pragma unroll
    for (int k = j / G * G; k < j / G * G + G; ++k)
      if (k != j) rank[j] += key[k] > key[j] || (key[k] == key[j] && k < j);
#pragma unroll
  for (int partner = 1; partner < kPartners; ++partner) {
    const bool earlier = (threadIdx.x ^ partner) % 32 < threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const Key theirs = Key(__shfl_xor_sync(kAll, sizeof(Key) == 2 ? int(key[k]) : key[k], partner));
#pragma unroll
      for (int j = 0; j < V; ++j) rank[j] += theirs > key[j] || (theirs == key[j] && earlier);
    }
  }
  uint32_t kept = 0;
  for (int j = 0; j < V; ++j) kept |= uint32_t(rank[j] < s.n && j < count) << j;
  if (s.out && count) {
    S y[V];
    for (int j = 0; j < V; ++j) y[j] = pick(kept >> j & 1, x[j], pruned(x[j], s));
    S* out = static_cast<S*>(s.out) + i;
    if (inside) store<V>(y, out);
    else
      for (int j = 0; j < count; ++j) out[j] = y[j];
  }
  if (s.keep)
    for (int j = 0; j < count; ++j) s.keep[i + j] = kept >> j & 1;
  if (s.bits) {
    constexpr int kShare = V < 8 ? 8 / V : 1;  // lanes of a byte
    uint32_t byte = kept << (threadIdx.x % kShare * V);
#pragma unroll
    for (int other = 1; other < kShare; other *= 2) byte |= __shfl_xor_sync(kAll, byte, other);
    if (threadIdx.x % kShare == 0 && i < numel) s.bits[i / 8] = uint8_t(byte);
  }
}

// Groups across rows of `inner` elements: a thread a group, neighbours in a warp neighbours in memory.
template <class Key, int M, class S>
__global__ void __launch_bounds__(kThreads) lanes_kernel(const __grid_constant__ Select s) {
  const int64_t group = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const bool inside = group < s.panels * s.inner;
  const int64_t panel = group / s.inner, at = panel * M * s.inner + group % s.inner;
  const S* w = static_cast<const S*>(s.w) + at;
  uint32_t kept = 0;
  if (inside) {
    Key key[M];
#pragma unroll
    for (int j = 0; j < M; ++j) key[j] = key_of<Key>(w[j * s.inner], s.factor, panel % s.groups * M + j);
#pragma unroll
    for (int j = 0; j < M; ++j) {
      int rank = 0;
#pragma unroll
      for (int k = 0; k < M; ++k)
        if (k != j) rank += k < j ? key[k] >= key[j] : key[k] > key[j];
      kept |= uint32_t(rank < s.n) << j;
    }
    for (int j = 0; j < M; ++j) {
      if (s.out) static_cast<S*>(s.out)[at + j * s.inner] = pick(kept >> j & 1, w[j * s.inner], pruned(w[j * s.inner], s));
      if (s.keep) s.keep[at + j * s.inner] = kept >> j & 1;
    }
  }
  if (s.bits && s.inner % 8 == 0)  // eight lanes are in one row and fill a byte
    for (int j = 0; j < M; ++j) {
      const uint32_t row = __ballot_sync(kAll, kept >> j & 1);
      if (inside && threadIdx.x % 8 == 0) s.bits[(at + j * s.inner) / 8] = uint8_t(row >> (threadIdx.x % 32));
    }
}

// Any m: a thread an element, which counts who comes before it; its group is in the caches.
template <class Key, class S>
__global__ void __launch_bounds__(kThreads) any_kernel(const __grid_constant__ Select s) {
  const int64_t i = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= s.numel()) return;
  const S* w = static_cast<const S*>(s.w);
  const int64_t panel = i / (s.m * s.inner), first = panel * s.m * s.inner + i % s.inner, column = panel % s.groups * s.m;
  const int own = int((i - first) / s.inner);
  const Key key = key_of<Key>(w[i], s.factor, column + own);
  int rank = 0;
  for (int k = 0; k < s.m; ++k) {
    const Key other = key_of<Key>(w[first + k * s.inner], s.factor, column + k);
    rank += other > key || (other == key && k < own);
  }
  if (s.out) static_cast<S*>(s.out)[i] = pick(rank < s.n, w[i], pruned(w[i], s));
  if (s.keep) s.keep[i] = rank < s.n;
}

__global__ void __launch_bounds__(kThreads) pack_kernel(const uint8_t* keep, int64_t numel, uint8_t* bits) {
  const int64_t i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * 8;
  if (i >= numel) return;
  uint32_t byte = 0;
  for (int j = 0; j < 8 && i + j < numel; ++j) byte |= uint32_t(keep[i + j]) << j;
  bits[i / 8] = uint8_t(byte);
}

static unsigned blocks_for(int64_t threads) { return unsigned((threads + kThreads - 1) / kThreads); }

int select_cuda(const Select& s, Stream stream) {
  int error = 0;
  with_type(s.type, [&](auto tag) {
    using S = decltype(tag);
    const auto of_size = [&](auto key, auto m) {
      using Key = decltype(key);
      constexpr int M = decltype(m)::value;
      if (s.inner == 1)
        error = launch(rows_kernel<Key, M, S>, blocks_for(s.numel() * int64_t(sizeof(S)) / 16 + 1), kThreads, 0, stream)(s);
      else error = launch(lanes_kernel<Key, M, S>, blocks_for(s.panels * s.inner), kThreads, 0, stream)(s);
    };
    const auto of_key = [&](auto key) {
      switch (s.m) {
        case 4: return of_size(key, Constant<4>{});
        case 8: return of_size(key, Constant<8>{});
        case 16: return of_size(key, Constant<16>{});
        case 32: return of_size(key, Constant<32>{});
        default: error = launch(any_kernel<decltype(key), S>, blocks_for(s.numel()), kThreads, 0, stream)(s);
      }
    };
    if constexpr (sizeof(S) > 2) of_key(magnitude(S{}));
    else if (s.factor) of_key(int32_t{});
    else of_key(int16_t{});
  });
  if (error == 0 && s.bits && bits_need_keep(s))
    error = launch(pack_kernel, blocks_for((s.numel() + 7) / 8), kThreads, 0, stream)(s.keep, s.numel(), s.bits);
  return error;
}

// Eight elements a thread: a byte of bits.
template <class S>
__global__ void __launch_bounds__(kThreads) blend_kernel(const __grid_constant__ Blend x) {
  using T = decltype(widen(S{}) + 0);
  const int64_t i = (int64_t(blockIdx.x) * kThreads + threadIdx.x) * 8;
  if (i >= x.numel) return;
  const T scale = x.scale_on_device ? T(*x.scale_on_device) : T(x.scale), lamb = T(x.lamb);
  const uint32_t kept = x.bits[i / 8];
  const S *a = static_cast<const S*>(x.a) + i, *b = x.b ? static_cast<const S*>(x.b) + i : nullptr;
  S* out = static_cast<S*>(x.out) + i;
  constexpr int V = 16 / sizeof(S) < 8 ? 16 / sizeof(S) : 8;
  S from[8] = {}, added[8] = {}, y[8];
  const int count = int(smaller<int64_t>(8, x.numel - i));
  if (count == 8)
    for (int v = 0; v < 8; v += V) {
      load<V>(a + v, reinterpret_cast<S(&)[V]>(from[v]));
      if (b) load<V>(b + v, reinterpret_cast<S(&)[V]>(added[v]));
    }
  else
    for (int j = 0; j < count; ++j) {
      from[j] = a[j];
      if (b) added[j] = b[j];
    }
  for (int j = 0; j < 8; ++j) {
    T other = scale == T(0) ? T(0) : T(scale * widen(from[j]));
    if (b) other = other + lamb * widen(added[j]);
    S rounded;
    narrow(other, rounded);
    y[j] = pick(kept >> j & 1, from[j], rounded);
  }
  if (count == 8)
    for (int v = 0; v < 8; v += V) store<V>(reinterpret_cast<const S(&)[V]>(y[v]), out + v);
  else
    for (int j = 0; j < count; ++j) out[j] = y[j];
}

int blend_cuda(const Blend& x, Stream stream) {
  int error = 0;
  with_type(x.type, [&](auto tag) {
    error = launch(blend_kernel<decltype(tag)>, blocks_for((x.numel + 7) / 8), kThreads, 0, stream)(x);
  });
  return error;
}
}  // namespace dither
