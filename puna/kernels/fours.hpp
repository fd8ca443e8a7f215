// Four inputs of a row times four weights of each output of a vector, added exactly, by the best instructions
// that a kind of processor has for it; and how weights of each kind are read for them.
//
// Sums are those of integers modulo 2^32, so that nothing is lost on the way to one that int32 holds.

#pragma once

#include <cstdint>

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

#include "vectors.hpp"

namespace {

using Sums = Vec<int32_t>;
using Bytes = Vec<uint32_t>;  // four weights of each output

#if defined(__AVXVNNI__) && !defined(__AVX512F__)
#define VNNI_OF_AVX2
#endif
#if defined(__AVX512VNNI__) || defined(VNNI_OF_AVX2) || defined(__ARM_FEATURE_DOTPROD)

using Term = uint32_t;  // four inputs
using Weights = Bytes;
constexpr int ROWS = BYTES == 64 ? 6 : BYTES == 32 ? 5 : 4;

inline Term term(uint32_t four) { return four; }

#if defined(__ARM_FEATURE_DOTPROD)
constexpr bool UNSIGNED = false;
inline void add(Sums& sum, Term x, Weights y) {
    const int8x16_t four = vreinterpretq_s8_u32(vdupq_n_u32(x));
    sum = (Sums)vdotq_s32((int32x4_t)sum, (int8x16_t)y, four);
}
#else
constexpr bool UNSIGNED = true;  // the instruction takes unsigned numbers on one side
// Casts, not copies: sums that are copied do not stay in registers.
inline void add(Sums& sum, Term x, Weights y) {
#if defined(__AVX512VNNI__)
    sum = (Sums)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)y, _mm512_set1_epi32(int(x)));
#else
    sum = (Sums)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)y, _mm256_set1_epi32(int(x)));
#endif
}
#endif
inline Weights weights(Bytes bytes) { return UNSIGNED ? bytes ^ 0x80808080 : bytes; }  // + 128
inline Weights small_weights(Bytes bytes) { return bytes; }  // of 0 to 15

#else

struct Term { uint32_t even, odd; };  // two inputs of 16 bits in each
struct Weights { Vec<int16_t> even, odd; };
constexpr bool UNSIGNED = false;
constexpr int ROWS = BYTES == 64 ? 6 : 4;

inline Term term(uint32_t four) {
    const auto pair = [](uint32_t low, uint32_t high) {
        return (uint32_t(int8_t(low)) & 0xffff) | uint32_t(int8_t(high)) << 16;
    };
    return {pair(four, four >> 16), pair(four >> 8, four >> 24)};
}

// Two inputs times two weights of each output: at most 2 · 128 · 127, where nothing saturates.
inline Sums pairs(Vec<int16_t> a, Vec<int16_t> b) {
#if defined(__AVX512BW__)
    return (Sums)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__) && !defined(__AVX512F__)
    return (Sums)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__) && !defined(__AVX__)
    return (Sums)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
    const Sums x = (Sums)a, y = (Sums)b;
    return (x << 16 >> 16) * (y << 16 >> 16) + (x >> 16) * (y >> 16);
#endif
}

inline Vec<int16_t> everywhere(uint32_t pair) { return (Vec<int16_t>)(Bytes{} + pair); }
inline void add(Sums& sum, Term x, const Weights& y) {
    sum += pairs(y.even, everywhere(x.even)) + pairs(y.odd, everywhere(x.odd));
}
inline Weights weights(Bytes bytes) {
    const auto two = (Vec<int16_t>)bytes;
    return {two << 8 >> 8, two >> 8};
}
inline Weights small_weights(Bytes bytes) { return weights(bytes); }

#endif

// --- Kinds of numbers: how many inputs a place of a panel holds, and what must be taken off each weight

struct Int8 {
    static constexpr int FOURS = 1, OFFSET = UNSIGNED ? 128 : 0;
    static Weights read(const uint32_t* from, int) { return weights(load<uint32_t>(from)); }
    static uint32_t four(const int8_t* q, int) { return ::read<uint32_t>(q); }
};

struct Int4 {  // the low halves of a place's bytes are inputs 0, 2, 4 and 6, the high ones 1, 3, 5 and 7
    static constexpr int FOURS = 2, OFFSET = 8;
    static Weights read(const uint32_t* from, int which) {
        return small_weights(load<uint32_t>(from) >> 4 * which & 0x0f0f0f0f);
    }
    static uint32_t four(const int8_t* q, int which) {
        uint64_t x = ::read<uint64_t>(q) >> 8 * which & 0x00ff00ff00ff00ff;
        x = (x | x >> 8) & 0x0000ffff0000ffff;
        return uint32_t(x | x >> 16);
    }
};

}  // namespace
