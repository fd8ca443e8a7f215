// A square of words turned, a register to a row: what rows hold side by side becomes what lies together.

#pragma once

#if defined(__AVX512F__) && defined(__AVX512BW__)
#include <immintrin.h>

namespace {

constexpr int SIDE = 16;  // words of a register

// put(s, words s of all rows) for every s < SIDE.
template <class Put> inline void turn_square(__m512i (&a)[SIDE], const Put& put) {
    __m512i b[SIDE];
#pragma GCC unroll 8
    for (int i = 0; i < SIDE; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < SIDE; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {  // words i, 4 + i, 8 + i and 12 + i of all rows
        const __m512i even = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);
        const __m512i odd = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
        const __m512i last_even = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
        const __m512i last_odd = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
        put(i, _mm512_shuffle_i32x4(even, last_even, 0x88));
        put(4 + i, _mm512_shuffle_i32x4(odd, last_odd, 0x88));
        put(8 + i, _mm512_shuffle_i32x4(even, last_even, 0xdd));
        put(12 + i, _mm512_shuffle_i32x4(odd, last_odd, 0xdd));
    }
}

}  // namespace
#endif
