// What causal attention and its gradients are given, which queries see which keys, and rows of a head turned by
// their angles as they are read.
//
// B rows   T positions   N query heads   K key/value heads, G = N/K   H head width   P = H filled up with zeros

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

#include "threads.hpp"
#include "tiles.hpp"
#include "vectors.hpp"

namespace {

// --- What a call is given

extern "C" struct Heads {  // (B, T, heads, H): from one row, token and head to the next, in numbers
    void* at;
    int64_t row, token, head;
};

extern "C" struct Call {
    Heads q, k, v, out, grad, dq, dk, dv;
    float* lse;              // (B, N, T)
    const float *cos, *sin;  // (B or 1, T, H), or null; of the first half the negative sine
    const int32_t* starts;   // (B or 1, T): the first key that a query sees; rising
    int64_t angle_row, start_row;  // 0 where all rows have the same
    int64_t B, T, N, K, H;
    int32_t threads;
};

// --- Rows of a head

// Rounded and written to memory past the caches: what is overwritten whole is then not read first.
template <class M> inline void store_past(M* to, Vec<float> x) {
#if defined(__AVX512BF16__)
    if (reinterpret_cast<uintptr_t>(to) % (L * sizeof(M)) == 0) {
        if constexpr (std::is_same_v<M, float>) _mm512_stream_ps(to, (__m512)x);
        else _mm256_stream_si256(reinterpret_cast<__m256i*>(to), bits_as<__m256i>(_mm512_cvtneps_pbh((__m512)x)));
        return;
    }
#endif
    store_narrow(to, x);
}

// Before others are told that it is there.
inline void settle() {
#if defined(__AVX512BF16__)
    _mm_sfence();
#endif
}

template <class M> struct Head {  // one head of one row of the batch
    M* at;
    long token;
    const float *cos, *sin;  // of the row, or null: nothing is turned
    long T, H, P;
    bool past;  // written past the caches

    M* row(long t) const { return at + t * token; }

    // A row asked of memory ahead of time: rows lie far apart, which no processor foresees.
    void ask(long t) const {
        constexpr long LINE = 64 / long(sizeof(M));
        if (t < T)
            for (long h = 0; h < H; h += LINE) __builtin_prefetch(row(t) + h);
    }

    // Rows first … first + SIDE, turned, to (SIDE, P), with zeros beyond H and beyond T.
    void read_rows(long first, M* to) const {
        for (long t = first; t < first + SIDE; ++t, to += P) {
            if (t >= T) {
                std::fill(to, to + P, M{});
                continue;
            }
            ask(t + SIDE);
            if (cos) turn(t, to);
            else std::copy(row(t), row(t) + H, to);
            for (long h = H; h < P; ++h) to[h] = M{};
        }
    }

    // A row of gradients of what was turned, times a factor: turned back.
    void write_row(long t, const float* from, float factor) const {
        if (past) write<true>(t, from, factor);
        else write<false>(t, from, factor);
    }

private:
    // Angles are those of the first half, and sines are read where they are not negative.
    void turn(long t, M* to) const {
        const long half = H / 2;
        const M* const from = row(t);
        const float *c = cos + t * H, *s = sin + t * H + half;
        for_vectors<false>(half, [&](long at, auto get, auto put) {
            const auto a = get(from + at), b = get(from + half + at), x = get(c + at), y = get(s + at);
            put(to + at, a * x - b * y);
            put(to + half + at, b * x + a * y);
        });
    }

    template <bool PAST> void write(long t, const float* from, float factor) const {
        M* const to = row(t);
        if (cos) {
            const long half = H / 2;
            const float *c = cos + t * H, *s = sin + t * H + half;
            for_vectors<PAST>(half, [&](long at, auto get, auto put) {
                const auto a = get(from + at), b = get(from + half + at), x = get(c + at), y = get(s + at);
                put(to + at, (a * x + b * y) * factor);
                put(to + half + at, (b * x - a * y) * factor);
            });
        } else {
            for_vectors<PAST>(H, [&](long at, auto get, auto put) { put(to + at, get(from + at) * factor); });
        }
    }

    // `count` numbers by whole vectors, the last of which may begin within the one before; fewer one by one.
    template <bool PAST, class Work> static void for_vectors(long count, const Work& work) {
        const auto get = [](const auto* from) { return load<float>(from); };
        const auto put = [](M* to, Vec<float> x) {
            if constexpr (PAST) store_past(to, x);
            else store_narrow(to, x);
        };
        const auto get_one = [](const auto* from) { return widen(*from); };
        const auto put_one = [](M* to, float x) { *to = narrow<M>(x); };
        if (count < L)
            for (long at = 0; at < count; ++at) work(at, get_one, put_one);
        else
            for (long at = 0; at < count; at += L) work(std::min(at, count - L), get, put);
    }
};

// --- Which queries see which keys

class Sight {
    std::vector<int32_t> numbers;  // of each row: where queries begin to see, and where keys are seen no more
    const long row, T;

public:
    static long padded(long T) { return rounded(T, BLOCK); }

    explicit Sight(const Call& call)
        : numbers(size_t((call.start_row ? call.B : 1) * 2 * padded(call.T))),
          row(call.start_row ? 2 * padded(call.T) : 0), T(call.T) {
        const long all = padded(T), rows = call.start_row ? call.B : 1;
        for (long b = 0; b < rows; ++b) {
            int32_t *begin = numbers.data() + b * row, *end = begin + all, sofar = 0;
            // What does not rise, or lies ahead, is set right, so that nothing is read beyond the row.
            for (long t = 0; t < T; ++t) {
                if (call.starts) sofar = std::min(int32_t(t), std::max(sofar, call.starts[b * T + t]));
                begin[t] = sofar;
            }
            std::fill(begin + T, begin + all, int32_t(T));
            std::fill(end, end + all, int32_t(T));
            for (long t = 0, k = 0; t < T; ++t)
                for (; k < begin[t]; ++k) end[k] = int32_t(t);
        }
    }

    // The first key that query t sees, and the first query that sees key k no more; for t, k < padded(T).
    const int32_t* starts(long b) const { return numbers.data() + b * row; }
    const int32_t* ends(long b) const { return starts(b) + padded(T); }
};

template <class M> struct Sizes {
    long T, G, H, P;
    int vectors;        // of a head
    long steps;         // of a sum over a head
    float scale, power;  // of scores, for e^x and for 2^x

    explicit Sizes(const Call& call)
        : T(call.T), G(call.N / call.K), H(call.H), P(rounded(H, L * I<M>)), vectors(int((H + L - 1) / L)),
          steps((H + I<M> - 1) / I<M>), scale(1 / std::sqrt(float(H))), power(scale * 1.44269504f) {}
};

// Whether results are so many that they leave the caches before anybody reads them, and halves of their rows are
// whole vectors: of lines that are written in parts the rest would be read.
inline bool writes_past(const Call& call) {
    constexpr long MANY = 1 << 20;
    return call.B * call.T * call.N * call.H >= MANY && call.H % (2 * L) == 0;
}

template <class M> Head<M> head_of(const Call& call, const Heads& heads, long b, long which, bool turned) {
    const long angles = b * call.angle_row;
    const bool turns = turned && call.cos;
    const long P = Sizes<M>(call).P;
    return {static_cast<M*>(heads.at) + b * heads.row + which * heads.head, heads.token,
            turns ? call.cos + angles : nullptr, turns ? call.sin + angles : nullptr, call.T, call.H, P,
            writes_past(call)};
}

// A stretch of memory given out piece by piece.
class Room {
    float* next;

public:
    explicit Room(float* memory) : next(memory) {}
    template <class T> T* take(long count) {
        return reinterpret_cast<T*>(std::exchange(next, next + rounded(count * long(sizeof(T)) / 4, 16)));
    }
};

// What a pass does, on one thread where it is little.
template <template <class> class Pass, class M> void run(const Call& call) {
    constexpr double LITTLE = 3e5;  // products of numbers: waking other threads for them takes longer
    if (call.B * call.T * call.N == 0) return;
    const Sight sight(call);
    const double products = double(call.B) * call.N * call.T * std::min<int64_t>(call.T, 4096) * call.H;
    Pass<M>(call, sight).run(products < LITTLE * least() ? 1 : call.threads);
}

}  // namespace
