#include "merge.h"
#include "compact.cuh"

namespace dither {
constexpr int kThreads = 256, kRows = kThreads / 32;

// ---- gathering: a warp a row, in pieces that the addresses allow

struct alignas(16) Piece16 {
  uint64_t x, y;
};
template <class Piece>
__global__ void __launch_bounds__(kThreads) gather_kernel(const __grid_constant__ Gather g) {
  const int64_t row = int64_t(blockIdx.x) * kRows + threadIdx.x / 32, pieces = g.bytes / int64_t(sizeof(Piece));
  if (row >= g.batch * g.taken) return;
  const int64_t at = g.index[row];
  const bool inside = 0 <= at && at < g.count;
  const Piece* x = static_cast<const Piece*>(g.x) + (row / g.taken * g.count + (inside ? at : 0)) * pieces;
  Piece* out = static_cast<Piece*>(g.out) + row * pieces;
  for (int64_t k = threadIdx.x % 32; k < pieces; k += 32) {
    Piece piece;
    __builtin_memset(&piece, 0xff, sizeof piece);
    out[k] = inside ? x[k] : piece;
  }
}

int gather_cuda(const Gather& g, Stream stream) {
  const uintptr_t all = uintptr_t(g.x) | uintptr_t(g.out) | uintptr_t(g.bytes);
  const auto run = [&](auto piece) {
    return launch(gather_kernel<decltype(piece)>, blocks_of(g.batch * g.taken, kRows), kThreads, 0, stream)(g);
  };
  return all % 16 == 0 ? run(Piece16{}) : all % 4 == 0 ? run(uint32_t{}) : all % 2 == 0 ? run(uint16_t{}) : run(uint8_t{});
}

// ---- segments: a token's number in the order is the count of those before it, a thread a number

constexpr int kTile = 1024;
__global__ void __launch_bounds__(kThreads) segments_kernel(const __grid_constant__ Segments s, int64_t blocks) {
  __shared__ int64_t tile[kTile];
  const int64_t sample = blockIdx.x / blocks, mine = blockIdx.x % blocks * kThreads + threadIdx.x;
  const int64_t* index = s.index + sample * s.count;
  const bool token = mine < s.count;
  const int64_t place = token ? index[mine] : mine - s.count;
  int64_t before = 0;
  for (int64_t begin = 0; begin < s.count; begin += kTile) {
    const int64_t n = begin + kTile < s.count ? kTile : s.count - begin;
    __syncthreads();
    for (int64_t k = threadIdx.x; k < n; k += kThreads) tile[k] = index[begin + k];
    __syncthreads();
    const int64_t earlier = token ? mine - begin : 0;  // of equal ones, those count that are earlier
    for (int64_t k = 0; k < n; ++k) before += tile[k] < place || (tile[k] == place && k < earlier);
  }
  if (token) s.order[sample * s.count + before] = mine;
  else if (place <= s.places) s.start[sample * (s.places + 1) + place] = before;
}

int segments_cuda(const Segments& s, Stream stream) {
  const int64_t blocks = blocks_of(s.count + s.places + 1, kThreads);
  return launch(segments_kernel, unsigned(s.batch * blocks), kThreads, 0, stream)(s, blocks);
}

// ---- merging: a warp a place

template <class S>
__global__ void __launch_bounds__(kThreads) merge_kernel(const __grid_constant__ Merge m) {
  using T = decltype(widen(S{}));
  const int64_t unit = int64_t(blockIdx.x) * kRows + threadIdx.x / 32, C = m.channels;
  if (unit >= m.batch * m.places) return;
  const int64_t sample = unit / m.places, *start = m.start + sample * (m.places + 1) + unit % m.places;
  const int64_t *order = m.order + sample * m.count + start[0], rows = start[1] - start[0];
  const S* x = static_cast<const S*>(m.x) + sample * m.count * C;
  const T* size = m.size ? static_cast<const T*>(m.size) + sample * m.count : nullptr;
  S* out = static_cast<S*>(m.out) + unit * C;
  T total = T(rows);
  if (size) {
    total = T(0);
    for (int64_t i = 0; i < rows; ++i) total += size[order[i]];
  }
  for (int64_t c = threadIdx.x % 32; c < C; c += 32) {
    if (m.copies(rows)) {
      out[c] = x[order[0] * C + c];
      continue;
    }
    T sum = T(0);
    for (int64_t i = 0; i < rows; ++i) {
      const T value = widen(x[order[i] * C + c]);
      sum = i == 0 && m.mode >= MergeMode::amax ? value : joined<T>(m.mode, sum, value, size ? size[order[i]] : T(1));
    }
    narrow(m.mode == MergeMode::mean && rows > 0 ? sum / total : sum, out[c]);
  }
}

int merge_cuda(const Merge& m, Stream stream) {
  int error = 0;
  with_type(m.type, [&](auto tag) {
    error = launch(merge_kernel<decltype(tag)>, blocks_of(m.batch * m.places, kRows), kThreads, 0, stream)(m);
  });
  return error;
}

// ---- plans: a block a sample

__global__ void __launch_bounds__(1024) plan_kernel(const __grid_constant__ Plan p) {
  __shared__ int shared[kMaxWarps];
  const int64_t s = blockIdx.x, stay = p.count - p.merged;
  const int64_t *top = p.top + s * p.merged, *match = p.match + s * p.a_count;
  int64_t *index = p.index + s * p.count, *kept = p.kept + s * stay, *src = p.src + s * p.merged, *dst = p.dst + s * p.merged;
  for (int64_t i = threadIdx.x; i < p.count; i += blockDim.x) index[i] = 0;
  __syncthreads();
  for (int64_t t = threadIdx.x; t < p.merged; t += blockDim.x) {
    src[t] = p.a_places[top[t]];
    index[src[t]] = -1;
  }
  __syncthreads();
  int64_t before = 0;
  for (int64_t begin = 0; begin < p.count; begin += blockDim.x) {
    const int64_t i = begin + threadIdx.x;
    int stays;
    const bool is_kept = i < p.count && index[i] == 0;
    const int64_t place = before + rank_in_block(is_kept, shared, stays);
    if (is_kept && place < stay) {
      kept[place] = i;
      index[i] = place;
    }
    before += stays;
  }
  __syncthreads();
  for (int64_t t = threadIdx.x; t < p.merged; t += blockDim.x) index[src[t]] = dst[t] = index[p.b_places[match[top[t]]]];
}

int plan_cuda(const Plan& p, Stream stream) {
  return launch(plan_kernel, unsigned(p.batch), threads_for(p.count), 0, stream)(p);
}
}  // namespace dither
