// One binary, several instruction sets: files named *.isa.cpp are compiled once for each, into namespace DITHER_ISA, and
// chosen here at run time. They include nothing but this project's headers and intrinsics, so that no inline function of the
// standard library is ever emitted for an instruction set that the machine may lack.
#pragma once
#include <cstdint>

namespace dither {
enum class Isa : int { baseline, avx2, avx512 };
#if defined(__x86_64__)
constexpr int kIsaCount = 3;
#define DITHER_PER_ISA(declaration) \
  namespace baseline {              \
  declaration;                      \
  }                                 \
  namespace avx2 {                  \
  declaration;                      \
  }                                 \
  namespace avx512 {                \
  declaration;                      \
  }
#define DITHER_PICK_ISA(function)                                               \
  (::dither::capability() == ::dither::Isa::avx512 ? ::dither::avx512::function \
   : ::dither::capability() == ::dither::Isa::avx2 ? ::dither::avx2::function   \
                                                   : ::dither::baseline::function)
#else
constexpr int kIsaCount = 1;
#define DITHER_PER_ISA(declaration) \
  namespace baseline {              \
  declaration;                      \
  }
#define DITHER_PICK_ISA(function) (::dither::baseline::function)
#endif

constexpr const char* kIsaNames[] = {"default", "avx2", "avx512"};
Isa best_capability();                         // what this machine can run
Isa capability();                              // what is in use: the best, or DITHER_CPU_CAPABILITY=default|avx2|avx512
const char* set_capability(const char* name);  // nullptr, or why not
}  // namespace dither
