// Matrices into panels, and rows out of them; panels.py and blocks.py hold the same in plain torch.
//
// A panel is WIDTH rows of words, turned: the first word of every row, then the second, and so on. A word is
// what a step of a product takes of a row. Rows come as plain words, or as GGUF's blocks, whose words lie
// between scales. What is written is not read again for long: it goes past the caches, or would first be read.
//
// R rows   S words of a row

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "squares.hpp"
#include "threads.hpp"

namespace {

constexpr long WIDTH = 32;   // rows of a panel
constexpr long SOME = 64;    // words of each row in turn, where they are turned one by one
constexpr long AHEAD = 512;  // bytes of a row from what is read to what is fetched

// --- What rows are made of: places of COUNT words in BYTES bytes, the words themselves from SKIPPED on

template <class W> struct Plain {
    using Word = W;
    static constexpr long BYTES = sizeof(W), COUNT = 1, SKIPPED = 0;
    static void words(const char* from, Word* to) { std::memcpy(to, from, sizeof *to); }
#if defined(__AVX512F__) && defined(__AVX512BW__)
    static __m512i side(const char* from) { return _mm512_loadu_si512(from); }
#endif
};

struct Q8_0 {  // a float16 scale and 32 weights
    using Word = uint32_t;
    static constexpr long BYTES = 34, COUNT = 8, SKIPPED = 2;
    static void words(const char* from, Word* to) { std::memcpy(to, from + SKIPPED, COUNT * sizeof *to); }
#if defined(__AVX512F__) && defined(__AVX512BW__)
    static __m512i side(const char* from) {
        const auto at = [=](long block) {
            return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + block * BYTES + SKIPPED));
        };
        return _mm512_inserti64x4(_mm512_castsi256_si512(at(0)), at(1), 1);
    }
#endif
};

// A float16 scale and 16 bytes of weights j and j + 16, which become bytes of neighbours: of each two bytes the
// low halves are one, the high halves another.
struct Q4_0 {
    using Word = uint32_t;
    static constexpr long BYTES = 18, COUNT = 4, SKIPPED = 2;
    static void words(const char* from, Word* to) {
        uint8_t x[16], y[16];
        std::memcpy(x, from + SKIPPED, sizeof x);
        for (int i = 0; i < 8; ++i) {
            y[i] = uint8_t((x[2 * i] & 15) | x[2 * i + 1] << 4);
            y[i + 8] = uint8_t(x[2 * i] >> 4 | (x[2 * i + 1] & 0xf0));
        }
        std::memcpy(to, y, sizeof y);
    }
#if defined(__AVX512F__) && defined(__AVX512BW__)
    static __m512i side(const char* from) {
        const auto at = [=](long block) {
            return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + block * BYTES + SKIPPED));
        };
        __m512i x = _mm512_castsi128_si512(at(0));
        x = _mm512_inserti32x4(x, at(1), 1);
        x = _mm512_inserti32x4(x, at(2), 2);
        x = _mm512_inserti32x4(x, at(3), 3);
        const __m512i low = _mm512_set1_epi16(0x0f), high = _mm512_set1_epi16(0xf0);
        const __m512i down = _mm512_srli_epi16(x, 4), far = _mm512_srli_epi16(x, 8);
        const __m512i first = _mm512_or_si512(_mm512_and_si512(x, low), _mm512_and_si512(down, high));
        const __m512i second = _mm512_or_si512(_mm512_and_si512(down, low), _mm512_and_si512(far, high));
        return _mm512_packus_epi16(first, second);
    }
#endif
};

// --- Squares of words

#if defined(__AVX512F__) && defined(__AVX512BW__)
// to[s][r] = word s of row r; rows lie `stride` bytes apart, and WIDTH words of the panel.
template <class Rows> inline void turn(const char* from, long stride, uint32_t* to) {
    __m512i square[SIDE];
#pragma GCC unroll 16
    for (int r = 0; r < SIDE; ++r) square[r] = Rows::side(from + r * stride);
    turn_square(square, [=](int s, __m512i x) {
        _mm512_stream_si512(reinterpret_cast<__m512i*>(to + s * WIDTH), x);
    });
}

// As many words of all rows of a panel as there are whole squares of; the number of them.
template <class Rows> long in_squares(const char* from, long stride, long steps, uint32_t* to) {
    constexpr long PLACES = SIDE / Rows::COUNT;
    if (reinterpret_cast<uintptr_t>(to) % 64) return 0;
    long step = 0;
    for (; step + SIDE <= steps; step += SIDE, from += PLACES * Rows::BYTES) {
        // Into the second cache: the same place of many rows has few places in the first.
        for (long r = 0; r < WIDTH; ++r) __builtin_prefetch(from + r * stride + AHEAD, 0, 2);
        for (long half = 0; half < WIDTH; half += SIDE)
            turn<Rows>(from + half * stride, stride, to + step * WIDTH + half);
    }
    _mm_sfence();
    return step;
}
template <class Rows> long in_squares(const char*, long, long, uint16_t*) { return 0; }
#else
template <class Rows> long in_squares(const char*, long, long, typename Rows::Word*) { return 0; }
#endif

// Words one by one, from some step on, of the rows that there are; the others are zero.
template <class Rows> void one_by_one(const char* from, long stride, long rows, long begin, long steps,
                                      typename Rows::Word* to) {
    using Word = typename Rows::Word;
    alignas(64) Word square[SOME * WIDTH] = {};
    for (; begin < steps; begin += SOME) {
        const long some = std::min(SOME, steps - begin);
        for (long r = 0; r < rows; ++r) {
            const char* here = from + r * stride + begin / Rows::COUNT * Rows::BYTES;
            __builtin_prefetch(here + AHEAD);
            for (long step = 0; step < some; step += Rows::COUNT, here += Rows::BYTES) {
                Word words[Rows::COUNT];
                Rows::words(here, words);
                for (long word = 0; word < Rows::COUNT; ++word) square[(step + word) * WIDTH + r] = words[word];
            }
        }
        std::copy(square, square + some * WIDTH, to + begin * WIDTH);
    }
}

// --- Calls

template <class Rows> void panel(const char* from, long stride, long rows, long steps, typename Rows::Word* to) {
    const long begin = rows == WIDTH ? in_squares<Rows>(from, stride, steps, to) : 0;
    one_by_one<Rows>(from, stride, rows, begin, steps, to);
}

template <class Rows>
void fill(const void* from, typename Rows::Word* to, long rows, long steps, int threads) {
    const long stride = steps / Rows::COUNT * Rows::BYTES;
    for_stretches(int((rows + WIDTH - 1) / WIDTH), threads, [=](int which) {
        const long first = which * WIDTH;
        panel<Rows>(static_cast<const char*>(from) + first * stride, stride, std::min(WIDTH, rows - first), steps,
                    to + first * steps);
    });
}

// The same of blocks, and their scales.
template <class Rows> void fill_blocks(const void* from, uint32_t* to, uint16_t* scales, long rows, long blocks,
                                       int threads) {
    const long stride = blocks * Rows::BYTES, steps = blocks * Rows::COUNT;
    for_stretches(int((rows + WIDTH - 1) / WIDTH), threads, [=](int which) {
        const long first = which * WIDTH, count = std::min(WIDTH, rows - first);
        const char* const here = static_cast<const char*>(from) + first * stride;
        panel<Rows>(here, stride, count, steps, to + first * steps);
        uint16_t* const own = scales + first * blocks;
        for (long r = 0; r < WIDTH; ++r)
            for (long block = 0; block < blocks; ++block) {
                uint16_t scale = 0;
                if (r < count) std::memcpy(&scale, here + r * stride + block * Rows::BYTES, sizeof scale);
                own[block * WIDTH + r] = scale;
            }
    });
}

// Some rows of the matrix, by their numbers: (count, S). False where one is not a row of it.
template <class Word>
bool gather(const Word* panels, const int64_t* which, Word* to, long count, long rows, long steps) {
    for (long at = 0; at < count; ++at, to += steps) {
        if (which[at] < 0 || which[at] >= rows) return false;
        const Word* from = panels + which[at] / WIDTH * steps * WIDTH + which[at] % WIDTH;
        for (long step = 0; step < steps; ++step) to[step] = from[step * WIDTH];
    }
    return true;
}

}  // namespace

extern "C" bool gather_16(const uint16_t* panels, const int64_t* which, uint16_t* to, int64_t count, int64_t rows,
                          int64_t steps) {
    return gather(panels, which, to, count, rows, steps);
}
extern "C" bool gather_32(const uint32_t* panels, const int64_t* which, uint32_t* to, int64_t count, int64_t rows,
                          int64_t steps) {
    return gather(panels, which, to, count, rows, steps);
}
extern "C" void fill_16(const void* from, uint16_t* to, int64_t rows, int64_t steps, int32_t threads) {
    fill<Plain<uint16_t>>(from, to, rows, steps, threads);
}
extern "C" void fill_32(const void* from, uint32_t* to, int64_t rows, int64_t steps, int32_t threads) {
    fill<Plain<uint32_t>>(from, to, rows, steps, threads);
}
extern "C" void fill_q8_0(const void* from, uint32_t* to, uint16_t* scales, int64_t rows, int64_t blocks,
                          int32_t threads) {
    fill_blocks<Q8_0>(from, to, scales, rows, blocks, threads);
}
extern "C" void fill_q4_0(const void* from, uint32_t* to, uint16_t* scales, int64_t rows, int64_t blocks,
                          int32_t threads) {
    fill_blocks<Q4_0>(from, to, scales, rows, blocks, threads);
}
