// Packed masks on the host: bytes 0 and 1 to bits and back, and stores past the caches. Per-instruction-set files only.
#pragma once
#include "vector_cpu.h"

namespace dither::DITHER_ISA {
// Eight bytes 0 or 1 as the bits of one.
static inline uint8_t pack_byte(const uint8_t* bytes) {
  uint64_t x;
  __builtin_memcpy(&x, bytes, 8);
  return uint8_t((x * 0x0102040810204080ull) >> 56);
}
// count: a multiple of 8
static inline void pack_bytes(const uint8_t* bytes, int64_t count, uint8_t* bits) {
  int64_t i = 0;
#if defined(__AVX512BW__)
  for (; i + 64 <= count; i += 64) {
    const uint64_t word = _cvtmask64_u64(_mm512_test_epi8_mask(_mm512_loadu_si512(bytes + i), _mm512_set1_epi8(1)));
    __builtin_memcpy(bits + i / 8, &word, 8);
  }
#elif defined(__AVX2__)
  for (; i + 32 <= count; i += 32) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes + i));
    const int word = _mm256_movemask_epi8(_mm256_slli_epi16(x, 7));
    __builtin_memcpy(bits + i / 8, &word, 4);
  }
#endif
  for (; i < count; i += 8) bits[i / 8] = pack_byte(bytes + i);
}

// Bits start .. start + count of a mask. Bytes that other runs share are or-ed into, atomically: they must begin as 0.
// kept has margins of 8 zeros on both sides.
static inline void store_bits(uint8_t* bits, int64_t start, int64_t count, const uint8_t* kept) {
  const int64_t before = start % 8, end = start + count;
  uint8_t* to = bits + start / 8;
  int64_t i = 0;  // elements done, of those from start - before on
  if (before || count < 8) {
    __atomic_fetch_or(to, pack_byte(kept - before), __ATOMIC_RELAXED);
    i = 8;
  }
  const int64_t whole = (end & ~int64_t(7)) - (start - before);
  if (i < whole) pack_bytes(kept - before + i, whole - i, to + i / 8);
  i = larger(i, whole);
  if (i < before + count) __atomic_fetch_or(to + i / 8, pack_byte(kept - before + i), __ATOMIC_RELAXED);
}

// count bytes 0 and 1, rounded up to a multiple of 8.
static inline void load_bits(const uint8_t* bits, int64_t count, uint8_t* kept) {
  for (int64_t b = 0; b < (count + 7) / 8; ++b) {
    const uint64_t spread = bits[b] * 0x0101010101010101ull & 0x8040201008040201ull;  // bit k in byte k
    const uint64_t bytes = (spread + 0x7f7f7f7f7f7f7f7full) >> 7 & 0x0101010101010101ull;
    __builtin_memcpy(kept + 8 * b, &bytes, 8);
  }
}

template <class V>
static inline __attribute__((always_inline)) bool any_bit(V x) {
#if defined(__AVX512F__)
  return _mm512_test_epi64_mask((__m512i)x, (__m512i)x) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256((__m256i)x, (__m256i)x);
#else
  uint64_t words[2];
  __builtin_memcpy(words, &x, 16);
  return (words[0] | words[1]) != 0;
#endif
}

// Past the caches; `to` is aligned.
template <class V>
static inline __attribute__((always_inline)) void stream(void* to, V x) {
#if defined(__AVX512F__)
  _mm512_stream_si512(static_cast<__m512i*>(to), (__m512i)x);
#elif defined(__AVX2__)
  _mm256_stream_si256(static_cast<__m256i*>(to), (__m256i)x);
#elif defined(__x86_64__)
  _mm_stream_si128(static_cast<__m128i*>(to), (__m128i)x);
#else
  __builtin_memcpy(to, &x, sizeof x);
#endif
}

// Whole vectors, both sides aligned.
static inline void stream_lines(void* to, const void* from, int64_t bytes) {
  using V __attribute__((vector_size(DITHER_VECTOR_BYTES))) = int32_t;
  for (int64_t at = 0; at < bytes; at += DITHER_VECTOR_BYTES) {
    V line;
    __builtin_memcpy(&line, static_cast<const char*>(from) + at, sizeof line);
    stream(static_cast<char*>(to) + at, line);
  }
}

// Lanes of -1 and 0 as the bits of `count` = M vectors, a multiple of 8 lanes.
template <int M, class V>
static inline __attribute__((always_inline)) void store_lanes(uint8_t* bits, const V (&kept)[M]) {
  constexpr int L = sizeof(V) / sizeof(kept[0][0]);
#if defined(__x86_64__)
  constexpr int kBytes = sizeof(kept[0][0]);
  uint64_t word = 0;
  int filled = 0;
#pragma GCC unroll 32
  for (int p = 0; p < M; ++p) {
    uint64_t lanes;
#if defined(__AVX512BW__)
    if constexpr (kBytes == 2) lanes = _mm512_movepi16_mask((__m512i)kept[p]);
    else if constexpr (kBytes == 4) lanes = _mm512_movepi32_mask((__m512i)kept[p]);
    else lanes = _mm512_movepi64_mask((__m512i)kept[p]);
#elif defined(__AVX2__)
    if constexpr (kBytes == 2) {
      const __m256i x = (__m256i)kept[p], both = _mm256_packs_epi16(x, x);
      lanes = uint32_t(_mm_movemask_epi8(_mm256_castsi256_si128(_mm256_permute4x64_epi64(both, 8))));
    } else if constexpr (kBytes == 4) {
      lanes = uint32_t(_mm256_movemask_ps((__m256)kept[p]));
    } else {
      lanes = uint32_t(_mm256_movemask_pd((__m256d)kept[p]));
    }
#else
    if constexpr (kBytes == 2) lanes = uint32_t(_mm_movemask_epi8(_mm_packs_epi16((__m128i)kept[p], __m128i{})));
    else if constexpr (kBytes == 4) lanes = uint32_t(_mm_movemask_ps((__m128)kept[p]));
    else lanes = uint32_t(_mm_movemask_pd((__m128d)kept[p]));
#endif
    word |= lanes << filled;
    filled += L;
    if (filled == 64 || p == M - 1) {
      __builtin_memcpy(bits + (p + 1) * L / 8 - filled / 8, &word, uint64_t(filled / 8));
      word = 0;
      filled = 0;
    }
  }
#else
  uint8_t bytes[M * L];
  for (int p = 0; p < M; ++p)
    for (int l = 0; l < L; ++l) bytes[p * L + l] = uint8_t(kept[p][l] & 1);
  pack_bytes(bytes, M * L, bits);
#endif
}
}  // namespace dither::DITHER_ISA
