#include "step.h"
#include "../common/chacha.h"
#include "../common/launch.cuh"
#include "../common/philox.h"
#include "../common/normal.h"

namespace dither {
constexpr int kThreads = 256, kVector = 4, kWarps = kThreads / 32;
constexpr int kSlotsPerLaunch = 200, kClocksPerLaunch = 120;  // kernel arguments hold 32,764 bytes
constexpr int kStaged = 192;                                  // three tiles of 64 draws cover 128 elements at any offset
// Private noise is drawn for several iterations of a warp at a time: 32 blocks of ChaCha20, one a lane.
template <class T>
constexpr int kSpan = 32 * ChaCha20::words * 4 / int(sizeof(T));
constexpr int kSpanBytes = 32 * ChaCha20::words * 4;

struct Clocks {
  Clock clock[kClocksPerLaunch];
};
template <template <class> class R, class T>
__global__ void derive_kernel(const __grid_constant__ Clocks clocks, int count, const __grid_constant__ Shared shared,
                              char* out) {
  const int i = threadIdx.x;
  if (i >= count) return;
  const Constants<R<T>, T> c = derive<R, T>(clocks.clock[i], shared);
  static_assert(sizeof c <= kConstantsBytes);
  *reinterpret_cast<Constants<R<T>, T>*>(out + i * kConstantsBytes) = c;
}

template <int kBytes>
struct alignas(kBytes) Words {
  uint32_t w[kBytes / 4];
};
// Four stored elements, not yet converted: all loads of an iteration are under way before the first is waited for.
template <class T>
using Raw = Words<kVector * sizeof(T)>;
template <int kSize, int kBytes>
__device__ inline void fetch(const void* from, int64_t i, int n, Words<kBytes>& raw) {
  const char* x = static_cast<const char*>(from) + i * kSize;
  if (n == kVector && reinterpret_cast<uintptr_t>(x) % (kVector * kSize) == 0) {
    constexpr int part = kVector * kSize < 16 ? kVector * kSize : 16;
#pragma unroll
    for (int b = 0; b < kVector * kSize / part; ++b) {
      const auto words = reinterpret_cast<const Words<part>*>(x)[b];
      for (int k = 0; k < part / 4; ++k) raw.w[b * (part / 4) + k] = words.w[k];
    }
  } else {
    for (int k = 0; k < kVector * kSize / 4; ++k) raw.w[k] = 0;
    for (int j = 0; j < n; ++j) {
      if constexpr (kSize == 2) raw.w[j / 2] |= uint32_t(reinterpret_cast<const uint16_t*>(x)[j]) << (16 * (j % 2));
      else
        for (int k = 0; k < kSize / 4; ++k)
          raw.w[j * (kSize / 4) + k] = reinterpret_cast<const uint32_t*>(x)[j * (kSize / 4) + k];
    }
  }
}
template <class T, int kBytes>
__device__ inline void fetch(const void* from, DType type, int64_t i, int n, Words<kBytes>& raw) {
  if (type == DType::f32) fetch<4>(from, i, n, raw);
  else if (type != DType::f64) fetch<2>(from, i, n, raw);
  else if constexpr (sizeof(T) == 8) fetch<8>(from, i, n, raw);
}
template <class T, int kBytes>
__device__ inline void decode(const Words<kBytes>& raw, DType type, T (&to)[kVector]) {
  for (int j = 0; j < kVector; ++j) {
    const uint16_t half = uint16_t(raw.w[j / 2] >> (16 * (j % 2)));
    if (type == DType::f32) to[j] = T(bit_as<float>(raw.w[j]));
    else if (type == DType::bf16) to[j] = T(widen(bfloat16{half}));
    else if (type == DType::f16) to[j] = T(widen(float16{half}));
    else if constexpr (sizeof(T) == 8) to[j] = bit_as<double>(uint64_t(raw.w[2 * j + 1]) << 32 | raw.w[2 * j]);
  }
}

template <class S>
struct alignas(kVector * sizeof(S)) Pack {
  S x[kVector];
};
template <class T, class S>
__device__ inline void round_to(T x, bool stochastic, uint32_t w, int slot, S& y) {
  if constexpr (sizeof(T) == 8 && sizeof(S) == 2) narrow(float(x), y);
  else if (stochastic) narrow(x, RoundingBits(slot)(w), y);
  else narrow(x, y);
}
template <class T>
__device__ inline void store(const T (&from)[kVector], void* to, DType type, int64_t i, int n, bool stochastic,
                             const uint32_t (&w)[kVector], int slot) {
  with_type(type, [&](auto tag) {
    using S = decltype(tag);
    S* y = static_cast<S*>(to) + i;
    Pack<S> pack;
    for (int j = 0; j < kVector; ++j) round_to(from[j], stochastic, w[j], slot, pack.x[j]);
    if (n == kVector && reinterpret_cast<uintptr_t>(y) % sizeof(Pack<S>) == 0) *reinterpret_cast<Pack<S>*>(y) = pack;
    else
      for (int j = 0; j < n; ++j) y[j] = pack.x[j];
  });
}

// One element at any address: for shards whose elements are not consecutive, and for double.
__device__ inline uint32_t word_at(const Address& a, uint64_t e) {
  uint32_t w[4];
  Philox::block(a, e / 64 * 16 + e % 16, w);
  return w[e % 64 / 16];
}
// The normals of the elements g and g + 16 from the words of their block.
__device__ inline void normals(const uint32_t* w, float (&z)[2]) { box_muller(w[0], w[1], z[0], z[1]); }
__device__ inline void normals(const uint32_t* w, double (&z)[2]) { box_muller(w[0], w[1], w[2], w[3], z[0], z[1]); }
template <class Generator, class T>
constexpr int kTile = 16 * Generator::words * 4 / int(sizeof(T));  // elements whose draws come from the same 16 blocks
template <class Generator, class T>
__device__ inline void normal_at(Generator, const Address& a, uint64_t e, T& z) {
  constexpr int per_pair = sizeof(T) / 2, tile = kTile<Generator, T>;
  uint32_t w[Generator::words];
  T pair[2];
  Generator::block(a, e / tile * 16 + e % 16, w);
  normals(w + e % tile / 32 * per_pair, pair);
  z = pair[e % 32 / 16];
}

// Draws for the warp's 128 consecutive elements from `first`, each generator block once; all lanes call together.
template <bool kNormal>
__device__ inline void stage(const Address& a, uint64_t first, int lane, uint32_t* staged) {
  const uint64_t tile = first / 64;
  const int blocks = int((first + 127) / 64 - tile + 1) * 16;
  __syncwarp();
  for (int b = lane; b < blocks; b += 32) {
    uint32_t w[4];
    Philox::block(a, tile * 16 + b, w);
    if (kNormal)
      for (int pair = 0; pair < 4; pair += 2) {
        float x, y;
        box_muller(w[pair], w[pair + 1], x, y);
        w[pair] = bit_as<uint32_t>(x);
        w[pair + 1] = bit_as<uint32_t>(y);
      }
    for (int i = 0; i < 4; ++i) staged[b / 16 * 64 + 16 * i + b % 16] = w[i];
  }
  __syncwarp();
}
__device__ inline void draw_words(const Slot& slot, const Address& a, int64_t at, int lane, uint32_t* staged,
                                  uint32_t (&w)[kVector]) {
  if (slot.run >= slot.numel) {
    const uint64_t first = uint64_t(slot.start + at);
    stage<false>(a, first, lane, staged);
    for (int j = 0; j < kVector; ++j) w[j] = staged[first % 64 + lane * kVector + j];
  } else {
    for (int j = 0; j < kVector; ++j) w[j] = word_at(a, slot.element(at + lane * kVector + j));
  }
}
__device__ inline void draw_normals(const Slot& slot, const Address& a, int64_t at, int lane, uint32_t* staged,
                                    float (&z)[kVector]) {
  if (slot.run >= slot.numel) {
    const uint64_t first = uint64_t(slot.start + at);
    stage<true>(a, first, lane, staged);
    for (int j = 0; j < kVector; ++j) z[j] = bit_as<float>(staged[first % 64 + lane * kVector + j]);
  } else {
    for (int j = 0; j < kVector; ++j) normal_at(Philox{}, a, slot.element(at + lane * kVector + j), z[j]);
  }
}
__device__ inline void draw_normals(const Slot& slot, const Address& a, int64_t at, int lane, uint32_t*, double (&z)[kVector]) {
  for (int j = 0; j < kVector; ++j) normal_at(Philox{}, a, slot.element(at + lane * kVector + j), z[j]);
}

// The normals of the elements at .. at + count of a tensor, by whole tiles, each block once; all lanes call together.
template <class Generator, class T>
__device__ inline void span_of_normals(Generator g, const Slot& slot, const Address& a, int64_t at, int count, int lane,
                                       T* out) {
  constexpr int per_pair = sizeof(T) / 2, tile = kTile<Generator, T>;
  __syncwarp();
  if (slot.run < slot.numel && slot.run < 64) {
    for (int i = lane; i < count; i += 32) normal_at(g, a, slot.element(at + i), out[i]);
  } else {
    for (int done = 0; done < count;) {  // addresses that follow each other
      const int64_t left = slot.run < slot.numel ? slot.run - (at + done) % slot.run : count;
      const int n = int(smaller<int64_t>(count - done, left));
      const uint64_t first = slot.element(at + done), tiles = first / tile;
      const int blocks = int((first + n - 1) / tile - tiles + 1) * 16;
      for (int b = lane; b < blocks; b += 32) {
        uint32_t w[Generator::words];
        Generator::block(a, tiles * 16 + b, w);
#pragma unroll
        for (int p = 0; p < tile / 32; ++p) {
          T z[2];
          normals(w + per_pair * p, z);
          const int64_t i = int64_t(tiles * tile + b / 16 * tile + 32 * p + b % 16) - int64_t(first);
          if (i >= 0 && i < n) out[done + i] = z[0];
          if (i + 16 >= 0 && i + 16 < n) out[done + i + 16] = z[1];
        }
      }
      done += n;
    }
  }
  __syncwarp();
}

struct Slots {
  Slot slot[kSlotsPerLaunch];
  int32_t first_block[kSlotsPerLaunch + 1];  // prefix sum of chunks
  int32_t count, chunk;                      // elements a block takes: whole iterations, or spans, of all warps
};
static_assert(sizeof(Slots) <= 32700 && sizeof(Clocks) <= 32700, "kernel argument limit");

// At least 16 warps a multiprocessor with four 16-byte loads each under way in every lane.
// kPrivate: with private noise, in a kernel of its own, so that its registers cost the others nothing.
template <class R, class T, bool kPrivate>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 4 ? 2 : 1)
    step_kernel(const __grid_constant__ Slots b, const __grid_constant__ PrivateKey key, const char* constants) {
  DYNAMIC_SHARED(uint32_t, shared);
  int t = 0;  // the tensor that owns this block
  for (int end = b.count; end - t > 1;) {
    const int middle = (t + end) / 2;
    (b.first_block[middle] <= int(blockIdx.x) ? t : end) = middle;
  }
  const Slot& slot = b.slot[t];
  const auto& c = *reinterpret_cast<const Constants<R, T>*>(constants + t * kConstantsBytes);
  const R rule = c.rule;
  const Around<T>& a = c.around;
  if (a.skip) return;
  const int lane = threadIdx.x % 32;
  uint32_t* staged = shared + threadIdx.x / 32 * kStaged;
  T* private_normals = reinterpret_cast<T*>(shared + kWarps * kStaged) + threadIdx.x / 32 * kSpan<T>;

  // A warp takes 128 elements, or a span of private noise, then the next that no other warp takes.
  constexpr int vectors = 32 * kVector, span = kPrivate ? kSpan<T> : vectors;
  const int64_t begin = int64_t(blockIdx.x - b.first_block[t]) * b.chunk, end = smaller(begin + b.chunk, slot.numel);
  int in_span = 0;
  for (int64_t at = begin + threadIdx.x / 32 * span; at < end; at += vectors) {
    const int64_t i = at + lane * kVector;
    const int n = int(larger<int64_t>(0, smaller<int64_t>(kVector, end - i)));
    T p[kVector], g[kVector], s[kMaxStates][kVector], z[kVector];
    uint32_t w[kVector] = {};
    Raw<T> raw_p, raw_g, raw_s[kMaxStates];
    fetch<T>(slot.p, slot.p_type, i, n, raw_p);
    fetch<T>(slot.g, slot.g_type, i, n, raw_g);
#pragma unroll
    for (int k = 0; k < R::states; ++k) fetch<T>(slot.state[k], slot.state_type[k], i, n, raw_s[k]);
    const uint32_t mask = slot.mask && n > 0 ? uint32_t(slot.mask[i / 8]) >> (i % 8) : ~0u;
    const uint32_t kept = a.pull == T(0) ? mask : ~0u;
    decode(raw_p, slot.p_type, p);
    decode(raw_g, slot.g_type, g);
#pragma unroll
    for (int k = 0; k < R::states; ++k) decode(raw_s[k], slot.state_type[k], s[k]);

    for (int j = 0; j < kVector; ++j) g[j] *= a.scale;
    if constexpr (kPrivate) {
      if (a.std != T(0)) {
        if (in_span == 0) {
          const int count = int(smaller<int64_t>(span, end - at));
          if (key.chacha) span_of_normals(ChaCha20{}, slot, a.address(key), at, count, lane, private_normals);
          else span_of_normals(Philox{}, slot, a.address(key), at, count, lane, private_normals);
        }
        for (int j = 0; j < n; ++j) g[j] = (g[j] + a.std * private_normals[in_span + lane * kVector + j]) * a.gain;
      }
      in_span += vectors;
    }
    for (int j = 0; j < kVector; ++j) g[j] = clamp(g[j], a.clip);
    if (a.gradient) {
      if (slot.ema) {
        T h[kVector];
        Raw<T> raw;
        fetch<T>(slot.ema, slot.ema_type, i, n, raw);
        decode(raw, slot.ema_type, h);
        for (int j = 0; j < kVector; ++j) {
          const T smoothed = a.first ? g[j] : lerp(h[j], g[j], a.ema_take);
          g[j] += a.ema_gain * smoothed;
          if (kept >> j & 1) h[j] = smoothed;
        }
        store(h, slot.ema, slot.ema_type, i, n, false, w, 0);
      }
      if (a.noise != T(0)) {
        draw_normals(slot, a.address(a.normal, kGradientNoise), at, lane, staged, z);
        for (int j = 0; j < kVector; ++j) g[j] += a.noise * z[j];
      }
    }
    if (a.pull != T(0))
      for (int j = 0; j < kVector; ++j)
        if (!(mask >> j & 1)) g[j] += a.pull * p[j];
    if (a.l2 != T(0))
      for (int j = 0; j < kVector; ++j) g[j] += a.l2 * p[j];
    if (a.kick != T(0)) draw_normals(slot, a.address(a.normal), at, lane, staged, z);
    if (a.stochastic) draw_words(slot, a.address(Kind::bits), at, lane, staged, w);
#pragma unroll
    for (int j = 0; j < kVector; ++j) {
      T q = p[j] * a.keep, x[kMaxStates];
      for (int k = 0; k < R::states; ++k) x[k] = s[k][j];
      if constexpr (R::states == 0) rule(q, g[j]);
      else if constexpr (R::states == 1) rule(q, g[j], x[0]);
      else if constexpr (R::states == 2) rule(q, g[j], x[0], x[1]);
      else rule(q, g[j], x[0], x[1], x[2]);
      if (a.kick != T(0)) q += a.kick * z[j];
      if (kept >> j & 1) {
        p[j] = q;
        for (int k = 0; k < R::states; ++k) s[k][j] = x[k];
      }
    }
    store(p, slot.p, slot.p_type, i, n, a.stochastic, w, 0);
#pragma unroll
    for (int k = 0; k < R::states; ++k) store(s[k], slot.state[k], slot.state_type[k], i, n, a.stochastic, w, k + 1);
    if (!kPrivate || in_span == span) {
      at += (kWarps - 1) * span;
      in_span = 0;
    }
  }
}

// Small tensors in small blocks, so that all multiprocessors work; large ones in long runs.
static int32_t chunk_for(int64_t total, int multiprocessors, int64_t least) {
  const int64_t even = total / (int64_t(multiprocessors) * 16) / least * least;
  return int32_t(larger(least, smaller<int64_t>(even, 16 * kThreads * kVector)));
}

int step_cuda(Rule rule, bool wide, const Slot* slots, const Clock* clocks, int64_t count, const Shared& shared,
              void* constants, int multiprocessors, Stream stream) {
  char* table = static_cast<char*>(constants);
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) total += slots[i].numel;
  const auto run = [&]<template <class> class R, class T>() -> int {
    for (int64_t first = 0; first < count; first += kClocksPerLaunch) {
      Clocks c;
      const int n = int(smaller<int64_t>(kClocksPerLaunch, count - first));
      for (int i = 0; i < n; ++i) c.clock[i] = clocks[first + i];
      if (int error =
              launch(derive_kernel<R, T>, 1, (n + 31) / 32 * 32, 0, stream)(c, n, shared, table + first * kConstantsBytes))
        return error;
    }
    for (int64_t first = 0; first < count; first += kSlotsPerLaunch) {
      Slots b;
      b.count = int32_t(smaller<int64_t>(kSlotsPerLaunch, count - first));
      b.chunk = chunk_for(total, multiprocessors, shared.releases ? kWarps * kSpan<T> : kThreads * kVector);
      b.first_block[0] = 0;
      for (int i = 0; i < b.count; ++i) {
        b.slot[i] = slots[first + i];
        b.first_block[i + 1] = b.first_block[i] + int32_t((b.slot[i].numel + b.chunk - 1) / b.chunk);
      }
      const int blocks = b.first_block[b.count];
      if (blocks == 0) continue;
      const auto kernel = shared.releases ? step_kernel<R<T>, T, true> : step_kernel<R<T>, T, false>;
      const size_t bytes = kWarps * (kStaged * sizeof(uint32_t) + (shared.releases ? kSpanBytes : 0));
      if (int error = launch(kernel, blocks, kThreads, bytes, stream)(
              b, shared.key, static_cast<const char*>(table + first * kConstantsBytes)))
        return error;
    }
    return 0;
  };
  return wide ? with_rule<true>(rule, run) : with_rule<false>(rule, run);
}
}  // namespace dither
