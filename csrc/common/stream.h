#pragma once
#include <cstdint>
struct CUstream_st;

namespace dither {
using Stream = CUstream_st*;  // cudaStream_t, without the CUDA headers
}  // namespace dither
