// Small products of what lies in the cache, in words as a step of a sum takes them, and numbers laid so that they
// can be read like that.
//
// I = 2 in bfloat16, else 1: numbers of a word

#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "sums.hpp"
#include "vectors.hpp"

namespace {

constexpr int L = LANES<float>;
constexpr int BLOCK = 64;  // keys, and queries, whose scores are in the cache together
constexpr int SIDE = 16;   // rows that are read together, and queries of the narrowest stretch of scores
constexpr int GROUP = 8;   // rows of the narrowest stretch

// As many accumulators as the registers hold, beside a step's vectors and what is broadcast.
constexpr int ROWS = BYTES == 64 ? 8 : 4, VECTORS = BYTES == 64 ? 3 : 2;

template <class M> using Step = SumStep<float, M>;
template <class M> using Place = typename Step<M>::Place;
template <class M> constexpr int I = Step<M>::INPUTS;

inline long floored(long x, long by) { return x / by * by; }

// --- Products

template <class M> struct Left {  // the word of row r and step s lies at at + r · row + s · step
    const M* at;
    long row, step;
};
template <class M> struct Right {  // a step's words, side by side
    const Place<M>* at;
    long step;
};
struct Sums {
    float* at;
    long row;
    bool fresh;            // begin with zero, not with what is there
    const float* factors;  // what is there is first multiplied by these, of each row, or null
};

template <class M, int V> void tile(Left<M> a, Right<M> b, long steps, Sums c) {
    Vec<float> sum[ROWS][V];  // in registers only where all loops over them are unrolled
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
            sum[r][v] = c.fresh ? Vec<float>{} : load<float>(c.at + r * c.row + v * L);
            if (c.factors) sum[r][v] *= c.factors[r];
        }
    for (long step = 0; step < steps; ++step, a.at += a.step, b.at += b.step) {
        decltype(Step<M>::read(b.at)) part[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) part[v] = Step<M>::read(b.at + v * L);
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r) {
            const auto term = Step<M>::term(a.at + r * a.row);
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) Step<M>::add(sum[r][v], term, part[v]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) store<float>(c.at + r * c.row + v * L, sum[r][v]);
}

// c[r] += Σ a[r][step] · b[step] over steps in order, for GROUP rows and some vectors.
template <class M> void multiply(Left<M> a, Right<M> b, long steps, Sums c, int vectors) {
    const int parts = (vectors + VECTORS - 1) / VECTORS;
    for (int r = 0; r < GROUP; r += ROWS)
        for (int part = 0; part < parts; ++part) {
            const int first = vectors * part / parts, count = vectors * (part + 1) / parts - first;
            const Left<M> rows{a.at + r * a.row, a.row, a.step};
            const Right<M> some{b.at + first * L, b.step};
            const float* const factors = c.factors ? c.factors + r : nullptr;
            const Sums sums{c.at + r * c.row + first * L, c.row, c.fresh, factors};
            if (count == 1) tile<M, 1>(rows, some, steps, sums);
            else if (count == 2) tile<M, 2>(rows, some, steps, sums);
            else if constexpr (VECTORS > 2) tile<M, 3>(rows, some, steps, sums);
        }
}

// --- Numbers laid as products read them

using Words = Vec<uint32_t>;
typedef uint16_t Shorts __attribute__((vector_size(BYTES)));

// Of rows i and i + STEP of a square the parts exchanged that lie across.
template <int STEP, int... i> inline void exchange(Words& a, Words& b, std::integer_sequence<int, i...>) {
    const Words first = __builtin_shuffle(a, b, Words{uint32_t(i & STEP ? L + i - STEP : i)...});
    b = __builtin_shuffle(a, b, Words{uint32_t(i & STEP ? L + i : i + STEP)...});
    a = first;
}

template <int STEP> inline void exchange_all(Words* rows) {
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i)
        if (!(i & STEP)) exchange<STEP>(rows[i], rows[i + STEP], std::make_integer_sequence<int, L>{});
}

// L × L words turned.
template <class P> inline void turn_square(const P* from, long from_row, P* to, long to_row) {
    Words rows[L];
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) rows[i] = read<Words>(from + i * from_row);
    exchange_all<1>(rows);
    exchange_all<2>(rows);
    if constexpr (L > 4) exchange_all<4>(rows);
    if constexpr (L > 8) exchange_all<8>(rows);
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) std::memcpy(to + i * to_row, &rows[i], sizeof(Words));
}

template <int... i> inline Words alternating(Shorts a, Shorts b, int half, std::integer_sequence<int, i...>) {
    const Shorts low{uint16_t(i / 2 + i % 2 * 2 * L)...}, high{uint16_t(i / 2 + L + i % 2 * 2 * L)...};
    return (Words)__builtin_shuffle(a, b, half ? high : low);
}

// Of the two halves of one.
template <int... i> inline Words alternating_halves(Shorts both, std::integer_sequence<int, i...>) {
    return (Words)__builtin_shuffle(both, Shorts{uint16_t(i / 2 + i % 2 * L)...});
}

// A word for each of two rows of 2L numbers: the first row's number, then the second's.
inline void put_pairs(const bfloat16* first, const bfloat16* second, uint32_t* to) {
    const auto lanes = std::make_integer_sequence<int, 2 * L>{};
    const Shorts a = read<Shorts>(first), b = read<Shorts>(second);
    const Words low = alternating(a, b, 0, lanes), high = alternating(a, b, 1, lanes);
    std::memcpy(to, &low, sizeof low);
    std::memcpy(to + L, &high, sizeof high);
}

// The same of two vectors, rounded.
inline void put_pair(Vec<float> first, Vec<float> second, uint32_t* to) {
#if defined(__AVX512BF16__)
    const auto both = _mm512_cvtne2ps_pbh(bits_as<__m512>(second), bits_as<__m512>(first));
    const Words words = alternating_halves(bits_as<Shorts>(both), std::make_integer_sequence<int, 2 * L>{});
    std::memcpy(to, &words, sizeof words);
#else
    for (int lane = 0; lane < L; ++lane) {
        const uint32_t low = narrow<bfloat16>(first[lane]).bits, high = narrow<bfloat16>(second[lane]).bits;
        to[lane] = low | high << 16;
    }
#endif
}

// 2^x, as exactly as numbers that are rounded to M need it; -∞ gives 0, NaN stays.
template <class M> __attribute__((always_inline)) inline Vec<float> power_of_two(Vec<float> x) {
#if defined(__AVX512DQ__)
    // How far from the nearest whole number; of ∞ 0.
    const Vec<float> rest = (Vec<float>)_mm512_reduce_ps((__m512)x, 0);
    Vec<float> sum;  // coefficients that make the largest relative error least: 2.6e-6, or 1.9e-9
    if constexpr (I<M> == 2) {
        sum = rest * 0.00957010191f + 0.0559178603f;
        sum = sum * rest + 0.240247448f;
        sum = sum * rest + 0.693121815f;
        sum = sum * rest + 0.999999261f;
    } else {
        sum = rest * 0.00015345812f + 0.00133999312f;
        sum = sum * rest + 0.00961848896f;
        sum = sum * rest + 0.0555032878f;
        sum = sum * rest + 0.240226469f;
        sum = sum * rest + 0.693147206f;
        sum = sum * rest + 1.0f;
    }
    return (Vec<float>)_mm512_scalef_ps((__m512)sum, (__m512)(x - rest));
#else
    return exponential(x * 0.693147181f);
#endif
}

// Rows as the other side of products over a head reads them: (P / I, BLOCK) for SIDE of BLOCK rows.
template <class M> void into_panel(const M* rows, long P, Place<M>* to) {
    const auto* words = reinterpret_cast<const Place<M>*>(rows);
    const long width = P / I<M>;
    for (long w = 0; w < width; w += L)
        for (int r = 0; r < SIDE; r += L)
            turn_square(words + r * width + w, width, to + w * BLOCK + r, BLOCK);
}

// Rows as the other side of products over rows reads them: (SIDE / I, P).
template <class M> void into_pairs(const M* rows, long P, Place<M>* to) {
    if constexpr (I<M> == 1) {
        std::copy(rows, rows + SIDE * P, to);
    } else {
        for (int r = 0; r < SIDE; r += 2, rows += 2 * P, to += P)
            for (long h = 0; h < P; h += 2 * L) put_pairs(rows + h, rows + P + h, to + h);
    }
}

}  // namespace
