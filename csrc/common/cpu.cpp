#include "cpu.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace dither {
Isa best_capability() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  auto v3 = [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2"); };
  auto v4 = [] {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  };
  if (v3() && v4()) return Isa::avx512;
  if (v3()) return Isa::avx2;
#endif
  return Isa::baseline;
}

static std::atomic<int> chosen{int(best_capability())};

Isa capability() { return Isa(chosen.load(std::memory_order_relaxed)); }

const char* set_capability(const char* name) {
  for (int i = 0; i < kIsaCount; ++i)
    if (!std::strcmp(name, kIsaNames[i])) {
      if (i > int(best_capability())) return "this machine lacks the instruction set";
      chosen = i;
      return nullptr;
    }
  return "expected default, avx2 or avx512";
}
}  // namespace dither
