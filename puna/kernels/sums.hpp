// A step of a sum: what is read of a row and of a matrix for it, and how their product is added.
//
// An output is one lane that adds its terms in order, whatever is computed beside it. Of bfloat16 a step is two
// numbers, as the instruction for it takes them: a matrix's lie in pairs.

#pragma once

#include <cstdint>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include "vectors.hpp"

namespace {

template <class A, class S> struct SumStep {  // summed in A; the matrix holds S
    using Term = A;
    using Place = S;
    static constexpr int INPUTS = 1;
    template <class M> static Term term(const M* x) { return A(widen(*x)); }
    static Vec<A> read(const Place* from) { return load<A>(from); }
    static void add(Vec<A>& sum, Term x, Vec<A> y) { sum += x * y; }
};

template <> struct SumStep<float, bfloat16> {
    using Place = uint32_t;
    static constexpr int INPUTS = 2;
#if defined(__AVX512BF16__)
    using Term = uint32_t;
    static Term term(const bfloat16* x) { return ::read<uint32_t>(x); }
    static __m512bh read(const Place* from) { return ::read<__m512bh>(from); }
    // Casts, not copies: sums that are copied do not stay in registers.
    static void add(Vec<float>& sum, Term x, __m512bh y) {
        sum = (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(int(x)), y);
    }
#else
    struct Term { float first, second; };
    static Term term(const bfloat16* x) { return {widen(x[0]), widen(x[1])}; }
    static Vec<uint32_t> read(const Place* from) { return ::read<Vec<uint32_t>>(from); }
    static void add(Vec<float>& sum, Term x, Vec<uint32_t> y) {
        sum += x.first * (Vec<float>)(y << 16);
        sum += x.second * (Vec<float>)(y & 0xffff0000);
    }
#endif
};

}  // namespace
