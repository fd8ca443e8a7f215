// Vectors of numbers as wide as this processor's registers: how numbers of each type are read into them, and
// what is computed with them.
//
// A vector is a GCC vector extension, so that one source serves every processor. All has internal linkage:
// libraries of one process must not share it, and each is of one source.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__AVX512F__) || defined(__F16C__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int BYTES = 64;
#elif defined(__AVX__)
constexpr int BYTES = 32;
#else
constexpr int BYTES = 16;
#endif

struct bfloat16 { uint16_t bits; };
struct float16 { uint16_t bits; };

template <class T> struct Vector { typedef T type __attribute__((vector_size(BYTES))); };
template <class T> using Vec = typename Vector<T>::type;
template <class A> constexpr int LANES = BYTES / int(sizeof(A));
template <class A> constexpr A INFINITE = std::numeric_limits<A>::infinity();

// As many small numbers as there are lanes of float.
template <class T> struct NarrowVector { typedef T type __attribute__((vector_size(BYTES / 4 * sizeof(T)))); };
template <class T> using Narrow = typename NarrowVector<T>::type;

template <class To, class From> inline To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From), "a reinterpretation keeps the size");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

template <class V> inline V read(const void* from) {
    V found;
    std::memcpy(&found, from, sizeof found);
    return found;
}

// --- Number types

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(bfloat16 x) { return bits_as<float>(uint32_t(x.bits) << 16); }
inline float widen(float16 x) {
    const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13, sign = uint32_t(x.bits & 0x8000) << 16;
    uint32_t wide = magnitude + (112u << 23);  // the exponent's bias is 15 there and 127 here
    if (magnitude >= 0x7c00u << 13) wide += 112u << 23;  // infinity and NaN
    if (magnitude < 1u << 23)  // zero and subnormal: the leading bit that is implied is taken away again
        wide = bits_as<uint32_t>(bits_as<float>(wide + (1u << 23)) - bits_as<float>(113u << 23));
    return bits_as<float>(wide | sign);
}

template <class M> inline M narrow(double x) { return M(x); }
template <> inline bfloat16 narrow<bfloat16>(double x) {
    const uint32_t bits = bits_as<uint32_t>(float(x));
    if ((bits & 0x7fffffff) > 0x7f800000) return {uint16_t(bits >> 16 | 0x40)};  // NaN stays NaN
    return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};  // to nearest, ties to even
}
template <> inline float16 narrow<float16>(double x) {
    const uint32_t bits = bits_as<uint32_t>(float(x));
    const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return {uint16_t(sign | 0x7e00)};
    if (magnitude >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // from 65520 on: infinity
    if (magnitude < 113u << 23) {  // subnormal: adding 1/2 puts the last bit that stays at the float's end
        const float rounded = bits_as<float>(magnitude) + 0.5f;
        return {uint16_t(sign | (bits_as<uint32_t>(rounded) - bits_as<uint32_t>(0.5f)))};
    }
    return {uint16_t(sign | ((magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13))};
}

// Small numbers read as wide ones. GCC takes a vector conversion apart on x86: there it is one instruction.
#if defined(__AVX512F__)
inline Vec<uint32_t> read_wide(const uint16_t* from) {
    return bits_as<Vec<uint32_t>>(_mm512_cvtepu16_epi32(read<__m256i>(from)));
}
inline Vec<int32_t> read_wide(const int8_t* from) {
    return bits_as<Vec<int32_t>>(_mm512_cvtepi8_epi32(read<__m128i>(from)));
}
inline Vec<float> read_half(const float16* from) {
    return bits_as<Vec<float>>(_mm512_cvtph_ps(read<__m256i>(from)));
}
#elif defined(__AVX2__) && defined(__F16C__)
inline Vec<uint32_t> read_wide(const uint16_t* from) {
    return bits_as<Vec<uint32_t>>(_mm256_cvtepu16_epi32(read<__m128i>(from)));
}
inline Vec<int32_t> read_wide(const int8_t* from) {
    return bits_as<Vec<int32_t>>(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(read<long long>(from))));
}
inline Vec<float> read_half(const float16* from) {
    return bits_as<Vec<float>>(_mm256_cvtph_ps(read<__m128i>(from)));
}
#else
inline Vec<uint32_t> read_wide(const uint16_t* from) {
    return __builtin_convertvector(read<Narrow<uint16_t>>(from), Vec<uint32_t>);
}
inline Vec<int32_t> read_wide(const int8_t* from) {
    return __builtin_convertvector(read<Narrow<int8_t>>(from), Vec<int32_t>);
}
inline Vec<float> read_half(const float16* from) {
    Vec<float> found;
    for (int lane = 0; lane < LANES<float>; ++lane) found[lane] = widen(from[lane]);
    return found;
}
#endif

template <class A> inline Vec<A> load(const A* from) { return read<Vec<A>>(from); }
template <class A> inline Vec<A> load(const bfloat16* from) {
    return bits_as<Vec<float>>(read_wide(reinterpret_cast<const uint16_t*>(from)) << 16);
}
template <class A> inline Vec<A> load(const float16* from) { return read_half(from); }
template <class A> inline Vec<A> load(const int8_t* from) {
    if constexpr (std::is_same_v<A, float>) {
        return __builtin_convertvector(read_wide(from), Vec<float>);
    } else {
        Vec<A> found;
        for (int lane = 0; lane < LANES<A>; ++lane) found[lane] = from[lane];
        return found;
    }
}
template <class A> inline void store(A* to, Vec<A> x) { std::memcpy(to, &x, sizeof x); }

// Wide numbers rounded to those of another type, as many as a vector holds.
template <class M> inline void store_narrow(M* to, Vec<float> x) {
    if constexpr (std::is_same_v<M, float>) {
        store<float>(to, x);
    } else {
#if defined(__AVX512BF16__)
        if constexpr (std::is_same_v<M, bfloat16>) {
            const auto small = _mm512_cvtneps_pbh(bits_as<__m512>(x));
            std::memcpy(to, &small, sizeof small);
            return;
        }
#endif
        for (int lane = 0; lane < LANES<float>; ++lane) to[lane] = narrow<M>(x[lane]);
    }
}

template <class M> inline Vec<float> rounded_to(Vec<float> x) {
    alignas(BYTES) M small[LANES<float>];
    store_narrow(small, x);
    return load<float>(small);
}

// --- Arithmetic

template <class A> inline Vec<A> counting() {  // 0, 1, 2, …
    Vec<A> found;
    for (int lane = 0; lane < LANES<A>; ++lane) found[lane] = A(lane);
    return found;
}

__attribute__((always_inline)) inline Vec<float> exponential(Vec<float> x) {
    // 2^n · e^r with |r| ≤ ln 2 / 2, where the series up to r^7 is exact to 6e-9. NaN stays NaN, and what is
    // below the normal numbers becomes 0.
    using Bits = Vec<int32_t>;
    const float shift = 12582912.0f;  // 1.5 · 2^23: added, it leaves the nearest integer in the last bits
    const Vec<float> shifted = x * 1.44269504f + shift;
    const Vec<float> n = shifted - shift;
    const Vec<float> r = (x - n * 0.693359375f) - n * -2.12194440e-4f;  // ln 2 in two parts
    Vec<float> sum = r * (1.0f / 5040) + 1.0f / 720;
    sum = sum * r + 1.0f / 120;
    sum = sum * r + 1.0f / 24;
    sum = sum * r + 1.0f / 6;
    sum = sum * r + 0.5f;
    sum = sum * r + 1.0f;
    sum = sum * r + 1.0f;
    const Bits power = (bits_as<Bits>(shifted) - bits_as<int32_t>(shift) + 127) << 23;
    const Bits vanished = x < -87.3f;
    return bits_as<Vec<float>>(~vanished & bits_as<Bits>(sum * bits_as<Vec<float>>(power)));
}
inline Vec<double> exponential(Vec<double> x) {
    for (int lane = 0; lane < LANES<double>; ++lane) x[lane] = std::exp(x[lane]);
    return x;
}
template <class A> inline A exponential_of(A x) { return exponential(Vec<A>{} + x)[0]; }

// All lanes put together by halves, in one order for every caller.
template <class V, class Two> inline auto fold(V x, const Two& two) {
    using A = std::decay_t<decltype(x[0])>;
    if constexpr (sizeof(V) == 2 * sizeof(A)) {
        return two(x[0], x[1]);
    } else {
        typedef A Half __attribute__((vector_size(sizeof(V) / 2)));
        Half halves[2];
        std::memcpy(halves, &x, sizeof x);
        return fold(two(halves[0], halves[1]), two);
    }
}
template <class V> inline auto added(V x) {
    return fold(x, [](auto a, auto b) { return a + b; });
}
template <class V> inline auto largest_of(V x) {
    return fold(x, [](auto a, auto b) { return a > b ? a : b; });
}

}  // namespace
