// Tensor cores and copies past the registers, for compute capability 8.0 and newer, with the same answers in plain C++ for the
// emulator: products of 16-bit floats are exact in float32; the order and rounding of a tensor core's sums are its own.
#pragma once
#include "dtype.h"
#include "launch.cuh"

namespace dither {
template <class S>
constexpr bool kIsBfloat16 = false;
template <>
inline constexpr bool kIsBfloat16<bfloat16> = true;

// c += a b: [16][8] += [16][16] [16][8]. With g = lane / 4 and t = lane % 4, two numbers in a word: a = rows g, g + 8 at
// columns 2 t, then both at 2 t + 8; b = rows 2 t, 2 t + 8 of column g; c = columns 2 t, 2 t + 1 of row g, then of g + 8.
template <class S>
__device__ inline void multiply_add_tile(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(sizeof(S) == 2);
#if defined(__CUDA_ARCH__)
  if constexpr (kIsBfloat16<S>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  for (int k = 0; k < 8; ++k) {  // words of a row of a: lane k % 4 of four has it
    uint32_t x[2], y[2];
    for (int r = 0; r < 2; ++r) x[r] = __shfl_sync(~0u, a[r + k / 4 * 2], 4 * g + k % 4);
    for (int e = 0; e < 2; ++e) y[e] = __shfl_sync(~0u, b[k / 4], 4 * (2 * t + e) + k % 4);
    for (int n = 0; n < 4; ++n) {
      const uint32_t u = x[n / 2], v = y[n % 2];
      c[n] += widen(S{uint16_t(u)}) * widen(S{uint16_t(v)});
      c[n] += widen(S{uint16_t(u >> 16)}) * widen(S{uint16_t(v >> 16)});
    }
  }
#endif
}

// Four matrices of 8 x 8 numbers of 16 bits: lane l gives the address of row l % 8 of matrix l / 8, in shared memory and a
// multiple of 16 bytes, and gets two numbers of each, row l / 4 at columns 2 (l % 4).
__device__ inline void load_matrices(uint32_t (&x)[4], const void* row) {
#if defined(__CUDA_ARCH__)
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(uint32_t(__cvta_generic_to_shared(row)))
               : "memory");
#else
  const int lane = threadIdx.x % 32;
  for (int m = 0; m < 4; ++m) {
    const uint64_t from = __shfl_sync(~0u, uint64_t(reinterpret_cast<uintptr_t>(row)), 8 * m + lane / 4);
    __builtin_memcpy(&x[m], reinterpret_cast<const char*>(uintptr_t(from)) + 4 * (lane % 4), 4);
  }
#endif
}

// 16 bytes from global to shared memory, both aligned, or zeros; there after commit_copies and wait_for_copies.
__device__ inline void copy_async(void* shared, const void* global, bool inside) {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(uint32_t(__cvta_generic_to_shared(shared))), "l"(global),
               "r"(inside ? 16 : 0)
               : "memory");
#else
  if (inside) __builtin_memcpy(shared, global, 16);
  else __builtin_memset(shared, 0, 16);
#endif
}
__device__ inline void commit_copies() {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// All but the last kPending commits.
template <int kPending>
__device__ inline void wait_for_copies() {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}
}  // namespace dither
