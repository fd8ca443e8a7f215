// An update by AdamW in two passes over memory: the norm of all gradients, then everything else; adamw.py holds
// the same in plain torch.
//
// Computed in float32, and the norm in float64. A number's new value depends on nothing beside it, and the norm
// is summed by blocks in their order, so that threads change no bit.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "rows.hpp"

namespace {

constexpr int L = LANES<float>;
constexpr long BLOCK = 1 << 14;
constexpr double LITTLE = 20000;  // numbers: waking other threads for them takes longer

struct Numbers {
    const void* from;
    int64_t count;
};

// A parameter. Without a master copy the weight itself is updated; `keep` is what decay leaves of it, `size`
// the rate over 1 - β₁ᵗ, `root` 1 / √(1 - β₂ᵗ).
struct Piece {
    void* weight;
    const void* gradient;
    void *first, *second;
    float* master;
    int64_t count;
    float keep, size, root;
    uint32_t key, other;
};

struct Rates {
    float beta1, beta2, rest1, rest2, eps, factor;  // a rest is 1 - β, rounded once
};

// work(piece, first, end, block) of the blocks of all pieces, from the first piece to the last.
template <class P, class Work> void for_blocks(const P* pieces, long count, int threads, const Work& work) {
    std::vector<int> begins(size_t(count + 1));
    long numbers = 0;
    for (long i = 0; i < count; ++i) {
        begins[size_t(i + 1)] = begins[size_t(i)] + int((pieces[i].count + BLOCK - 1) / BLOCK);
        numbers += pieces[i].count;
    }
    for_stretches(begins.back(), double(numbers) < LITTLE * least() ? 1 : threads, [&](int block) {
        const long which = std::upper_bound(begins.begin(), begins.end(), block) - begins.begin() - 1;
        const P& piece = pieces[which];
        const long first = (block - begins[size_t(which)]) * BLOCK;
        work(piece, first, std::min<long>(piece.count, first + BLOCK), block);
    });
}

template <class G> double squares(const G* from, long count) {
    typedef float Half __attribute__((vector_size(BYTES / 2)));
    Vec<double> sums[2] = {};
    for (long at = 0; at < count; at += L) {
        const Vec<float> x = some(from + at, count - at);
        Half halves[2];
        std::memcpy(halves, &x, sizeof x);
        for (int half = 0; half < 2; ++half) {
            const Vec<double> wide = __builtin_convertvector(halves[half], Vec<double>);
            sums[half] += wide * wide;
        }
    }
    return added(sums[0] + sums[1]);
}

template <class G> double sum_of_squares(const Numbers* pieces, long count, int threads) {
    long blocks = 0;
    for (long i = 0; i < count; ++i) blocks += (pieces[i].count + BLOCK - 1) / BLOCK;
    std::vector<double> sums(size_t(blocks), 0.0);
    for_blocks(pieces, count, threads, [&](const Numbers& piece, long first, long end, int block) {
        sums[size_t(block)] = squares(static_cast<const G*>(piece.from) + first, end - first);
    });
    double sum = 0;
    for (const double each : sums) sum += each;
    return sum;
}

inline Vec<float> root_of(Vec<float> x) {
#if defined(__AVX512F__)
    return bits_as<Vec<float>>(_mm512_sqrt_ps(bits_as<__m512>(x)));
#else
    for (int lane = 0; lane < L; ++lane) x[lane] = std::sqrt(x[lane]);
    return x;
#endif
}

// The random bits of rounding.py, and what they round.
using Bits = Vec<uint32_t>;
struct Halves {
    Bits first, second, third;
    Halves(const Piece& piece, long at) {
        Bits x = counting<uint32_t>() + (uint32_t(at) + piece.key);
        x = (x ^ x >> 16) * 0x7feb352du + piece.other;
        x = (x ^ x >> 15) * 0x846ca68bu;
        x ^= x >> 16;
        first = x >> 16, second = x & 0xffff, third = (x ^ x >> 15) * 0x9e3779b1u >> 16;
    }
};
// A float32 that bfloat16 holds exactly: storing it rounds no more.
inline Vec<float> shaken(Vec<float> x, Bits half) {
    return bits_as<Vec<float>>((bits_as<Bits>(x) + half) & 0xffff0000u);
}

// Of weights W with gradients G and moments S. Where those are bfloat16 all is rounded stochastically; else
// weights in bfloat16 are the rounding of a master copy.
template <class W, class G, class S> struct Step {
    static constexpr bool SHAKES = std::is_same_v<S, bfloat16>;
    static constexpr bool COPIED = !SHAKES && std::is_same_v<W, bfloat16>;

    static void block(const Piece& piece, const Rates& rates, long begin, long end) {
        long at = begin;
        for (; at + L <= end; at += L) some_of(piece, rates, at, L);
        if (at < end) some_of(piece, rates, at, end - at);
    }

    __attribute__((always_inline))
    static void some_of(const Piece& piece, const Rates& rates, long at, long left) {
        W* const weights = static_cast<W*>(piece.weight) + at;
        S *const firsts = static_cast<S*>(piece.first) + at, *const seconds = static_cast<S*>(piece.second) + at;
        const Vec<float> g = some(static_cast<const G*>(piece.gradient) + at, left) * rates.factor;
        Vec<float> m = some(firsts, left), v = some(seconds, left), w;
        if constexpr (COPIED) w = some(piece.master + at, left);
        else w = some(weights, left);
        m += (g - m) * rates.rest1;
        v = v * rates.beta2 + g * g * rates.rest2;
        w = w * piece.keep - m * piece.size / (root_of(v) * piece.root + rates.eps);
        if constexpr (SHAKES) {
            const Halves halves(piece, at);
            w = shaken(w, halves.first), m = shaken(m, halves.second), v = shaken(v, halves.third);
        }
        put(firsts, left, m);
        put(seconds, left, v);
        if constexpr (COPIED) put(piece.master + at, left, w);
        put(weights, left, w);
    }

    static void all(const Piece* pieces, long count, const Rates& rates, int threads) {
        for_blocks(pieces, count, threads, [&](const Piece& piece, long first, long end, int) {
            block(piece, rates, first, end);
        });
    }
};

}  // namespace

#define NORM(name, G)                                                                                   \
    extern "C" double squares_##name(const Numbers* pieces, int64_t count, int32_t threads) {           \
        return sum_of_squares<G>(pieces, count, threads);                                               \
    }
#define UPDATE(w, g, s, W, G, S)                                                                        \
    extern "C" void update_##w##_##g##_##s(const Piece* pieces, int64_t count, const Rates* rates,      \
                                           int32_t threads) {                                           \
        Step<W, G, S>::all(pieces, count, *rates, threads);                                             \
    }

NORM(float32, float)
NORM(bfloat16, bfloat16)
UPDATE(float32, float32, float32, float, float, float)
UPDATE(bfloat16, float32, float32, bfloat16, float, float)
UPDATE(bfloat16, bfloat16, float32, bfloat16, bfloat16, float)
UPDATE(bfloat16, float32, bfloat16, bfloat16, float, bfloat16)
UPDATE(bfloat16, bfloat16, bfloat16, bfloat16, bfloat16, bfloat16)
