// Vectors of the instruction set that a file is compiled for. Per-instruction-set files only.
#pragma once
#if defined(__x86_64__)
#include <immintrin.h>
#endif
#include "scalar.h"

#if defined(__AVX512DQ__)
#define DITHER_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define DITHER_VECTOR_BYTES 32
#else
#define DITHER_VECTOR_BYTES 16
#endif
