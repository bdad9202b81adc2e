// Runs CUDA kernels on the CPU for the tests: g++ includes this where nvcc includes <cuda_runtime.h>.
// One fiber per CUDA thread, one block at a time; a barrier yields to the scheduler. DITHER_EMU_ORDER sets the order in
// which threads and blocks run: 0 forward, 1 reverse, n > 1 shuffled with seed n. A result that depends on it is a race.
#pragma once
#include <link.h>
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <mutex>
#include <numeric>
#include <random>
#include <source_location>
#include <span>
#include <string>
#include <utility>
#include <vector>
#include "fibers.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(bytes) __attribute__((aligned(bytes)))
// g++ ignores a section attribute in templates, but it keeps thread-local variables together, where a block finds and
// poisons them all. `used`, or a variable that nobody writes would be folded to zero.
#define __shared__ static thread_local __attribute__((used))
#define DYNAMIC_SHARED(T, name) T* name = reinterpret_cast<T*>(emulator::dynamic_shared.data())
#pragma GCC visibility push(hidden)  // two libraries in one process do not share a scheduler

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
// clang-format off
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
// clang-format on
using cudaStream_t = struct CUstream_st*;
constexpr int warpSize = 32;
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulator {
enum class State { kReady, kAtBlockBarrier, kAtWarpBarrier, kReturned };
constexpr int kMaxThreads = 1024, kBallot = -1;
using Place = std::source_location;
struct Fiber {
  Context context;
  dim3 thread;
  State state;
  Place place;    // of the barrier it waits at
  unsigned mask;  // the lanes that a warp barrier waits for
  int source;     // the lane whose value is wanted, or kBallot
  uint64_t value, answer;
};

inline int order = -1;             // overrides DITHER_EMU_ORDER unless negative
inline Fiber fibers[kMaxThreads];  // reused by later blocks and launches
inline std::span<Fiber> block;
inline unsigned current;
inline Context scheduler;
inline std::function<void()> kernel_call;
inline std::vector<char> dynamic_shared;  // of the exact size, so that AddressSanitizer knows its end
inline std::span<char> static_shared;
inline thread_local char static_shared_anchor;

[[noreturn]] inline void die(const std::string& message) {
  std::fprintf(stderr, "cuda_on_cpu: block (%u,%u,%u): %s\n", blockIdx.x, blockIdx.y, blockIdx.z, message.c_str());
  std::abort();
}

inline void wait(State state, unsigned mask, const Place& place) {
  Fiber& self = fibers[current];
  self.state = state;
  self.mask = mask;
  self.place = place;
  switch_context(self.context, scheduler);
}

inline void fiber_main() noexcept {
  entered_from(scheduler);
  for (;; wait(State::kReturned, 0, Place::current())) kernel_call();
}

// Finds the thread-local variables of the program or library that holds the anchor.
inline int find_static_shared(dl_phdr_info* module, size_t, void* anchor) {
  char* begin = static_cast<char*>(module->dlpi_tls_data);
  for (const auto& segment : std::span(module->dlpi_phdr, module->dlpi_phnum))
    if (segment.p_type == PT_TLS && begin && begin <= anchor && anchor < begin + segment.p_memsz)
      static_shared = {begin, segment.p_memsz};
  return 0;
}

inline bool same_barrier(const Fiber& a, const Fiber& b) {
  return a.state == b.state && a.mask == b.mask && a.place.line() == b.place.line() && a.place.column() == b.place.column();
}

inline bool release_block() {
  for (const Fiber& fiber : block)
    if (fiber.state != State::kAtBlockBarrier || !same_barrier(fiber, block[0])) return false;
  for (Fiber& fiber : block) fiber.state = State::kReady;
  return true;
}

// Resumes the lanes whose whole mask, less the lanes that have returned, waits at one intrinsic.
inline bool release_warp(size_t first) {
  const auto warp = block.subspan(first, std::min(block.size() - first, size_t(32)));
  unsigned live = 0, released = 0;
  for (size_t l = 0; l < warp.size(); ++l) live |= unsigned(warp[l].state != State::kReturned) << l;
  for (const Fiber& leader : warp) {
    if (leader.state != State::kAtWarpBarrier) continue;
    unsigned members = 0, votes = 0;
    for (size_t l = 0; l < warp.size(); ++l) {
      if (!same_barrier(warp[l], leader)) continue;
      members |= 1u << l;
      votes |= unsigned(warp[l].value != 0) << l;
    }
    if (members != (leader.mask & live)) continue;
    for (size_t l = 0; l < warp.size(); ++l) {
      if (!(members >> l & 1)) continue;
      const int source = warp[l].source;
      const bool known = source >= 0 && members >> source & 1;  // other lanes have no value to give: poison
      warp[l].answer = source == kBallot ? votes : known ? warp[source].value : ~uint64_t(0);
      warp[l].state = State::kReady;
    }
    released |= members;
  }
  return released;
}

inline std::string describe(const Fiber& fiber) {
  const std::string place = std::string(fiber.place.file_name()) + ":" + std::to_string(fiber.place.line());
  return "thread " + std::to_string(&fiber - fibers) +
         (fiber.state == State::kReturned ? " has returned" : " waits at " + place);
}

inline void run_block(const std::vector<unsigned>& sequence) {
  std::ranges::fill(static_shared, char(0xff));  // NaN
  std::ranges::fill(dynamic_shared, char(0xff));
  for (Fiber& fiber : block) fiber.state = State::kReady;
  for (bool released = true; released;) {
    for (unsigned i : sequence) {
      if (fibers[i].state != State::kReady) continue;
      current = i;
      threadIdx = fibers[i].thread;
      switch_context(scheduler, fibers[i].context);
    }
    released = release_block();
    for (size_t first = 0; first < block.size(); first += 32) released |= release_warp(first);
  }
  const auto other = std::ranges::find_if_not(block, [](const Fiber& fiber) { return same_barrier(fiber, block[0]); });
  if (other != block.end()) die("divergent barrier: " + describe(block[0]) + ", " + describe(*other));
}

inline std::vector<unsigned> sequence(size_t size, int seed, std::mt19937& random) {
  std::vector<unsigned> result(size);
  std::iota(result.begin(), result.end(), 0);
  if (seed == 1) std::ranges::reverse(result);
  if (seed > 1) std::ranges::shuffle(result, random);
  return result;
}

inline int run_grid(dim3 grid, dim3 threads, size_t shared_bytes, std::function<void()> call) {
  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z, size = uint64_t(threads.x) * threads.y * threads.z;
  if (!blocks || grid.y > 65535 || grid.z > 65535 || !size || size > kMaxThreads) return 9;  // cudaErrorInvalidConfiguration
  if (shared_bytes > 48 << 10) return 1;  // cudaErrorInvalidValue: more needs an opt-in
  static std::mutex mutex;
  std::lock_guard lock(mutex);
  const char* variable = std::getenv("DITHER_EMU_ORDER");
  const int seed = order >= 0 ? order : variable ? std::atoi(variable) : 0;
  std::mt19937 random(seed);
  gridDim = grid;
  blockDim = threads;
  block = {fibers, size};
  kernel_call = std::move(call);
  dynamic_shared = std::vector<char>(shared_bytes);
  dl_iterate_phdr(find_static_shared, &static_shared_anchor);
  const std::vector<char> saved(static_shared.begin(), static_shared.end());
  for (unsigned i = 0; i < size; ++i) {
    if (!fibers[i].context.stack) make_context(fibers[i].context, fiber_main);
    fibers[i].thread = dim3(i % threads.x, i / threads.x % threads.y, i / threads.x / threads.y);
  }
  for (unsigned b : sequence(blocks, seed, random)) {
    blockIdx = dim3(b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y);
    run_block(sequence(size, seed, random));
  }
  std::ranges::copy(saved, static_shared.begin());
  return 0;
}

inline unsigned lane() { return current % 32; }

// Waits until the lanes of the mask have come here with their values; the answer is that of lane `source`.
template <class T>
T meet(unsigned mask, T value, int source, const Place& place) {
  static_assert(std::is_arithmetic_v<T> && sizeof(T) >= 4);
  Fiber& self = fibers[current];
  self.value = 0;
  std::memcpy(&self.value, &value, sizeof(T));
  self.source = source;
  if (!(mask >> lane() & 1)) die("thread " + std::to_string(current) + " is not in its own mask");
  wait(State::kAtWarpBarrier, mask, place);
  std::memcpy(&value, &self.answer, sizeof(T));
  return value;
}
}  // namespace emulator

#define PLACE const emulator::Place& place = emulator::Place::current()
inline void __syncthreads(PLACE) { emulator::wait(emulator::State::kAtBlockBarrier, 0, place); }
inline void __syncwarp(unsigned mask = ~0u, PLACE) { emulator::meet(mask, 0, 0, place); }
inline unsigned __ballot_sync(unsigned mask, int vote, PLACE) {
  return emulator::meet(mask, unsigned(vote != 0), emulator::kBallot, place);
}
inline int __any_sync(unsigned mask, int vote, PLACE) { return __ballot_sync(mask, vote, place) != 0; }
inline int __all_sync(unsigned mask, int vote, PLACE) { return __ballot_sync(mask, !vote, place) == 0; }
auto __shfl_sync(unsigned mask, auto value, int source, PLACE) { return emulator::meet(mask, value, source & 31, place); }
auto __shfl_xor_sync(unsigned mask, auto value, int bits, PLACE) {
  return emulator::meet(mask, value, (emulator::lane() ^ bits) & 31, place);
}
auto __shfl_down_sync(unsigned mask, auto value, unsigned delta, PLACE) {
  const unsigned lane = emulator::lane();
  return emulator::meet(mask, value, delta < 32 - lane ? lane + delta : lane, place);
}
auto __shfl_up_sync(unsigned mask, auto value, unsigned delta, PLACE) {
  const unsigned lane = emulator::lane();
  return emulator::meet(mask, value, delta <= lane ? lane - delta : lane, place);
}
#undef PLACE

// A thread runs undisturbed from one barrier to the next, so a plain update is atomic.
auto atomicAdd(auto* address, auto value) { return std::exchange(*address, *address + value); }
auto atomicMax(auto* address, auto value) { return std::exchange(*address, *address < value ? value : *address); }
auto atomicOr(auto* address, auto value) { return std::exchange(*address, *address | value); }
inline void __threadfence() {}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }

template <class... P>
auto launch(void (*kernel)(P...), dim3 grid, dim3 threads, size_t shared_bytes = 0, cudaStream_t = nullptr) {
  return [=](const P&... args) { return emulator::run_grid(grid, threads, shared_bytes, [&] { kernel(args...); }); };
}
#pragma GCC visibility pop
