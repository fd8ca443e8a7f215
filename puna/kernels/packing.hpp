// Factors of a product of bfloat16, packed: what a step of its sums takes lies together, two numbers of the
// contraction as one word, whichever way the factor's rows lie. Numbers of float32 are rounded on the way.

#pragma once

#include <algorithm>
#include <cstdint>

#include "squares.hpp"
#include "vectors.hpp"

#if defined(__AVX512BF16__) && defined(__AVX512BW__)

namespace {

constexpr int WIDTH = 2 * SIDE;  // numbers of a register
constexpr long CHUNK = 16;       // steps of upright rows that are packed for all columns before the next

inline __mmask32 first_of(long count) { return count >= WIDTH ? ~0u : (1u << count) - 1; }

// The first `count` numbers, or WIDTH, as bfloat16; the others zero.
inline __m512i numbers(const bfloat16* from, long count) {
    return _mm512_maskz_loadu_epi16(first_of(count), from);
}
inline __m512i numbers(const float* from, long count) {
    const __mmask32 some = first_of(count);
    const __m512 low = _mm512_maskz_loadu_ps(__mmask16(some), from);
    const __m512 high = _mm512_maskz_loadu_ps(__mmask16(some >> SIDE), from + SIDE);
    return bits_as<__m512i>(_mm512_cvtne2ps_pbh(high, low));
}

// Words of all rows into a row of `to`; these lie `pitch` words apart. Rows hold `terms` of the contraction
// each, and beyond `rows` ≤ SIDE of them, something.
template <class T>
void pack_along(const T* from, long stride, int rows, long terms, uint32_t* to, long pitch) {
    for (; terms > 0; terms -= WIDTH, from += WIDTH, to += SIDE * pitch) {
        __m512i square[SIDE];
#pragma GCC unroll 16
        for (int r = 0; r < SIDE; ++r) {
            const T* row = from + std::min(r, rows - 1) * stride;
            // What follows in memory, or is packed next, into the second cache.
            for (int line = 0; line < int(sizeof(T)) / 2; ++line)
                __builtin_prefetch(row + SIDE * (stride + line), 0, 2);
            square[r] = numbers(row, terms);
        }
        const long steps = (terms + 1) / 2;
        if (steps >= SIDE)
            turn_square(square, [=](int s, __m512i x) { _mm512_store_si512(to + s * pitch, x); });
        else
            turn_square(square, [=](int s, __m512i x) {
                if (s < steps) _mm512_store_si512(to + s * pitch, x);
            });
    }
}

// Two rows side by side, `columns` ≤ WIDTH of them, into a row of `to`; what is missing of the last is zero.
template <class T>
void pack_upright(const T* from, long stride, long terms, long columns, uint32_t* to, long pitch) {
    alignas(64) static constexpr uint16_t places[] = {  // of the first row and of the second, taken in turn
        0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
        11, 43, 12, 44, 13, 45, 14, 46, 15, 47, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53,
        22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
    const __m512i low = _mm512_load_si512(places), high = _mm512_load_si512(places + WIDTH);
    for (long term = 0; term < terms; term += 2, from += 2 * stride, to += pitch) {
        for (const T* next : {from + 2 * CHUNK * stride, from + (2 * CHUNK + 1) * stride}) {
            __builtin_prefetch(next, 0, 2);
            __builtin_prefetch(next + columns - 1, 0, 2);
        }
        const __m512i one = numbers(from, columns);
        const __m512i other = term + 1 < terms ? numbers(from + stride, columns) : _mm512_setzero_si512();
        _mm512_store_si512(to, _mm512_permutex2var_epi16(one, low, other));
        if (columns > SIDE) _mm512_store_si512(to + SIDE, _mm512_permutex2var_epi16(one, high, other));
    }
}

}  // namespace
#endif
