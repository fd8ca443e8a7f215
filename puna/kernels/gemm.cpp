// The three products of a linear layer in training, of bfloat16 and summed in float32; gemm.py holds the same
// in plain torch.
//
// Both factors are packed, so that what a step of the sums takes lies together: two numbers of the contraction
// as one word, of up to ROWS rows of the first factor and of WIDTH columns of the second. An output is one lane
// that adds its terms in order; stretches of DEEP steps are summed apart. Its bits depend neither on what is
// computed beside it nor on the number of threads.
//
// M rows of the first factor and of the product   N columns of the second and of the product
// K numbers of the contraction   S steps, K/2 rounded up in every part

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "packing.hpp"
#include "threads.hpp"
#include "vectors.hpp"

// With AMX there is something faster than what follows.
#if defined(__AVX512BF16__) && defined(__AVX512BW__) && !defined(__AMX_BF16__)
#define COMPUTED
#endif

extern "C" struct Part {  // rows of the second factor: all of a weight, or of the input
    const void* from;
    int64_t rows, stride;  // numbers from one row to the next
    int64_t wide;          // float32, to be rounded; else bfloat16
};

extern "C" struct Call {
    const void* first;         // bfloat16
    int64_t stride;            // numbers from one of its rows to the next
    int64_t upright;           // whether its rows are terms of the contraction, or else rows of the product
    int64_t parts_upright;     // whether rows of the parts are terms, or else columns of the product
    const Part* parts;         // one below the other
    int64_t count;             // of parts
    int64_t M, N, K;
    void* out;
    int64_t out_stride, out_wide;
    int64_t add;               // to what out holds
    const float* bias;         // (N,) or null
    int64_t threads;
};

#if defined(COMPUTED)
namespace {

constexpr int ROWS = 14, VECTORS = WIDTH / SIDE;  // 28 registers for sums, 3 for factors
constexpr long DEEP = 1024;       // steps of a sum at a time
constexpr long HELD = 1 << 14;    // steps of panels, of all together, that are packed at a time: 2 MiB
constexpr long FEWEST = 24;       // panels packed at a time, or all: fewer would not be worth packing rows for
constexpr long KEPT = 1 << 20;    // sums in float32 that wait for more steps: 4 MiB
constexpr long SOME = 4096;       // steps of blocks, of all together, that a thread packs at a time: 256 KiB
constexpr double LITTLE = 4e6;    // products of numbers: waking other threads for them takes longer

// --- Tiles

template <class T> struct Sums {  // what becomes of a tile's sums
    const float* before;  // added to them, or null
    long before_stride;
    const float* bias;    // added too, or null
    bool add;             // to what `out` holds
    T* out;
    long stride;
};

inline void put(float* to, Vec<float> one, Vec<float> other) {
    store<float>(to, one);
    store<float>(to + SIDE, other);
}
inline void put(bfloat16* to, Vec<float> one, Vec<float> other) {
    const auto both = _mm512_cvtne2ps_pbh((__m512)other, (__m512)one);
    std::memcpy(to, &both, sizeof both);
}

// Σ a[s][r] · b[s][c] over the steps in order, of R rows and WIDTH columns.
template <int R, class T> void tile(const uint32_t* a, const uint32_t* b, long steps, const Sums<T>& sums) {
    Vec<float> sum[R][VECTORS];  // in registers only where all loops over them are unrolled
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = Vec<float>{};
    T *fetched = sums.out, *const last = sums.out + (R - 1) * sums.stride;
    for (long step = 0; step < steps; ++step, a += SIDE, b += WIDTH) {
        __builtin_prefetch(fetched, 1);
        __builtin_prefetch(fetched + SIDE, 1);
        fetched = fetched == last ? last : fetched + sums.stride;
        const __m512bh one = read<__m512bh>(b), other = read<__m512bh>(b + SIDE);
        __builtin_prefetch(b + 16 * WIDTH);
        __builtin_prefetch(b + 16 * WIDTH + SIDE);
        __builtin_prefetch(a + 16 * SIDE);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const auto x = (__m512bh)_mm512_set1_epi32(int(a[r]));
            sum[r][0] = (Vec<float>)_mm512_dpbf16_ps((__m512)sum[r][0], x, one);
            sum[r][1] = (Vec<float>)_mm512_dpbf16_ps((__m512)sum[r][1], x, other);
        }
    }
    T* to = sums.out;
    const float* before = sums.before;
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r, to += sums.stride, before += sums.before_stride) {
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) {
            if (sums.before) sum[r][v] += load<float>(before + v * SIDE);
            if (sums.bias) sum[r][v] += load<float>(sums.bias + v * SIDE);
            if (sums.add) sum[r][v] += load<float>(to + v * SIDE);
        }
        put(to, sum[r][0], sum[r][1]);
    }
}

template <class T> using Tile = void (*)(const uint32_t*, const uint32_t*, long, const Sums<T>&);

template <class T, int... I> constexpr Tile<T> tile_of(int rows, std::integer_sequence<int, I...>) {
    constexpr Tile<T> all[] = {tile<I + 1, T>...};
    return all[rows - 1];
}

// The same for a panel that may have fewer columns.
template <class T>
void some_columns(const uint32_t* a, const uint32_t* b, long steps, int rows, int columns, const Sums<T>& sums) {
    using All = std::make_integer_sequence<int, ROWS>;
    if (columns == WIDTH) return tile_of<T>(rows, All{})(a, b, steps, sums);
    alignas(64) float some[ROWS * WIDTH];
    tile_of<float>(rows, All{})(a, b, steps, {nullptr, 0, nullptr, false, some, WIDTH});
    for (int r = 0; r < rows; ++r)
        for (int c = 0; c < columns; ++c) {
            T* to = sums.out + r * sums.stride + c;
            float sum = some[r * WIDTH + c];
            if (sums.before) sum += sums.before[r * sums.before_stride + c];
            if (sums.bias) sum += sums.bias[c];
            if (sums.add) sum += widen(*to);
            *to = narrow<T>(sum);
        }
}

// --- The whole product

struct Range {
    long begin, end;
    long size() const { return end - begin; }
};

inline long ceiling(long a, long b) { return (a + b - 1) / b; }
inline Range share(long all, long shares, long which) {
    return {all * which / shares, all * (which + 1) / shares};
}
inline Range share(Range all, long shares, long which) {
    const Range part = share(all.size(), shares, which);
    return {all.begin + part.begin, all.begin + part.end};
}

struct Panel {
    int part;            // whose rows are its columns; where they are steps, it has rows of every part
    long first, column;  // its first column in the part, and in the product
    int width;
};

struct Stretch {  // a part's share of the contraction, which begins with a step
    int part;
    long first, terms, step;  // its first number, how many, and its first step
    long steps() const { return ceiling(terms, 2); }
};

// What is computed at a time: panels are packed by all threads, then rows go to one thread or another. The
// first of these changes least.
struct Plan {
    long panels, rows, steps;  // how many shares of each

    // As many panels as are worth it and all their steps, or fewer steps and sums that wait for the others.
    Plan(long M, long count, long S, bool waits) {
        panels = ceiling(count, std::max(FEWEST, HELD / S));
        const long together = ceiling(count, panels);
        steps = ceiling(S, std::max(DEEP, HELD / together));
        rows = steps > 1 && waits ? ceiling(M * together * WIDTH, KEPT) : 1;
    }
};

class Work {
    const Call& call;
    std::vector<Panel> panels;
    std::vector<Stretch> stretches;
    long S = 0;
    int threads;

    // Of the share at work:
    Range held{0, 0}, rows{0, 0}, steps{0, 0};
    uint32_t* packed = nullptr;  // (panels held, steps, WIDTH)
    float* kept = nullptr;       // (rows, panels held, WIDTH): sums that wait, where out is too narrow for them

public:
    explicit Work(const Call& call) : call(call), threads(int(call.threads)) {
        if (call.parts_upright) add_panels(0, call.N);
        for (int part = 0; part < call.count; ++part) {
            if (!call.parts_upright) add_panels(part, call.parts[part].rows);
            if (call.parts_upright) add_stretch(part, call.parts[part].rows);
        }
        if (!call.parts_upright) add_stretch(0, call.K);
        if (double(call.M) * double(call.N) * double(call.K) < LITTLE * least()) threads = 1;
    }

    void run() {
        thread_local Buffer<uint32_t> room;
        thread_local Buffer<float> sums;
        const long count = long(panels.size());
        const Plan plan(call.M, count, S, !call.out_wide);
        const long most = ceiling(count, plan.panels);
        packed = room.of(most * ceiling(S, plan.steps) * WIDTH);
        if (plan.steps > 1 && !call.out_wide) kept = sums.of(ceiling(call.M, plan.rows) * most * WIDTH);
        for (long i = 0; i < plan.panels; ++i)
            for (long j = 0; j < plan.rows; ++j)
                for (long k = 0; k < plan.steps; ++k) {
                    held = share(count, plan.panels, i), rows = share(call.M, plan.rows, j);
                    steps = share(S, plan.steps, k);
                    pack_panels();
                    multiply();
                }
    }

private:
    void add_panels(int part, long columns) {
        const long column = panels.empty() ? 0 : panels.back().column + panels.back().width;
        for (long at = 0; at < columns; at += WIDTH)
            panels.push_back({part, at, column + at, int(std::min<long>(WIDTH, columns - at))});
    }
    void add_stretch(int part, long terms) {
        const long first = stretches.empty() ? 0 : stretches.back().first + stretches.back().terms;
        stretches.push_back({part, first, terms, S});
        S += stretches.back().steps();
    }

    // work(part, its first term, terms, the first's place in the contraction, steps from the range's begin to
    // it) of every stretch that a range of steps meets.
    template <class Each> void for_terms(Range range, const Each& work) const {
        for (const Stretch& stretch : stretches) {
            const long begin = std::max(range.begin, stretch.step);
            const long end = std::min(range.end, stretch.step + stretch.steps());
            if (begin >= end) continue;
            const long from = 2 * (begin - stretch.step), to = std::min(2 * (end - stretch.step), stretch.terms);
            work(stretch.part, from, to - from, stretch.first + from, begin - range.begin);
        }
    }

    // A piece is one panel, or some steps of all where they lie together.
    void pack_panels() const {
        const bool all = call.parts_upright;
        const long pieces = ceiling(steps.size(), all ? CHUNK : DEEP), count = all ? held.size() : 1;
        for_stretches(int(held.size() / count * pieces), threads, [&](int which) {
            const Range piece = share(steps, pieces, which % pieces);
            const long first = which / pieces * count;
            for_terms(piece, [&](int part, long term, long terms, long, long step) {
                for (long at = first; at < first + count; ++at) {
                    const Panel& panel = panels[size_t(held.begin + at)];
                    const Part& source = call.parts[all ? part : panel.part];
                    uint32_t* to = packed + (at * steps.size() + piece.begin - steps.begin + step) * WIDTH;
                    if (source.wide) pack_panel<float>(source, panel, term, terms, to);
                    else pack_panel<bfloat16>(source, panel, term, terms, to);
                }
            });
        });
    }

    template <class T>
    void pack_panel(const Part& part, const Panel& panel, long term, long terms, uint32_t* to) const {
        const T* from = static_cast<const T*>(part.from);
        if (call.parts_upright) {
            pack_upright(from + term * part.stride + panel.first, part.stride, terms, panel.width, to, WIDTH);
        } else {
            from += panel.first * part.stride + term;
            for (int half = 0; half < panel.width; half += SIDE)
                pack_along(from + half * part.stride, part.stride, std::min(SIDE, panel.width - half), terms,
                           to + half, WIDTH);
        }
    }

    // Rows of the first factor in blocks: (blocks, steps, SIDE).
    void pack_rows(Range group, long blocks, Range pass, uint32_t* to) const {
        for_terms(pass, [&](int, long, long terms, long term, long step) {
            const long some = call.upright ? 2 * CHUNK : terms;
            for (long done = 0; done < terms; done += some)
                for (long at = 0; at < blocks; ++at)
                    pack_block(share(group, blocks, at), term + done, std::min(some, terms - done),
                               to + (at * pass.size() + step + done / 2) * SIDE);
        });
    }

    void pack_block(Range block, long term, long terms, uint32_t* to) const {
        const auto* from = static_cast<const bfloat16*>(call.first);
        const long stride = call.stride;
        if (call.upright) pack_upright(from + term * stride + block.begin, stride, terms, block.size(), to, SIDE);
        else pack_along(from + block.begin * stride + term, stride, int(block.size()), terms, to, SIDE);
    }

    void multiply() const {
        const long passes = ceiling(steps.size(), DEEP), most = ceiling(steps.size(), passes);
        const long blocks = ceiling(rows.size(), ROWS);
        const long together = std::min(std::max(2L, SOME / most), std::max(1L, blocks / (4 * threads)));
        const long groups = std::min(blocks, rounded(ceiling(blocks, together), threads));
        for_each(int(groups), threads, [&](int which) {
            thread_local Buffer<uint32_t> room;
            thread_local Buffer<float> sums;
            const Range group = share(rows, groups, which);
            const long stride = held.size() * WIDTH;
            uint32_t* to = room.of(ceiling(group.size(), ROWS) * most * SIDE);
            float* waiting = kept ? kept + (group.begin - rows.begin) * stride : nullptr;
            if (!kept && passes > 1 && !call.out_wide) waiting = sums.of(group.size() * stride);
            for (long pass = 0; pass < passes; ++pass) multiply(group, share(steps, passes, pass), to, waiting);
        });
    }

    // Some rows, and some steps of their sums, for all panels held.
    void multiply(Range group, Range pass, uint32_t* blocks, float* waiting) const {
        const long count = ceiling(group.size(), ROWS);
        pack_rows(group, count, pass, blocks);
        for (long which = 0; which < held.size(); ++which) {
            const uint32_t* b = packed + (which * steps.size() + pass.begin - steps.begin) * WIDTH;
            for (long at = 0; at < count; ++at) {
                const Range block = share(group, count, at);
                const Panel& panel = panels[size_t(held.begin + which)];
                const long place = ((block.begin - group.begin) * held.size() + which) * WIDTH;
                const uint32_t* a = blocks + at * pass.size() * SIDE;
                give(a, b, pass, block, panel, waiting ? waiting + place : nullptr);
            }
        }
    }

    // A tile's sums to where they wait, or out.
    void give(const uint32_t* a, const uint32_t* b, Range pass, Range block, const Panel& panel,
              float* waiting) const {
        const bool begins = pass.begin == 0, ends = pass.end == S;
        const long stride = held.size() * WIDTH, at = block.begin * call.out_stride + panel.column;
        const float* bias = call.bias && ends ? call.bias + panel.column : nullptr;
        const auto sum = [&](const auto& to) {
            some_columns(a, b, pass.size(), int(block.size()), panel.width, to);
        };
        if (call.out_wide) {
            auto* out = static_cast<float*>(call.out) + at;
            sum(Sums<float>{nullptr, 0, bias, call.add || !begins, out, call.out_stride});
        } else if (!ends) {
            sum(Sums<float>{nullptr, 0, nullptr, !begins, waiting, stride});
        } else {
            auto* out = static_cast<bfloat16*>(call.out) + at;
            sum(Sums<bfloat16>{begins ? nullptr : waiting, stride, bias, bool(call.add), out, call.out_stride});
        }
    }
};

}  // namespace
#endif

// Whether products are computed here.
extern "C" bool available() {
#if defined(COMPUTED)
    return true;
#else
    return false;
#endif
}

extern "C" void product([[maybe_unused]] const Call* call) {
#if defined(COMPUTED)
    if (call->M && call->N) Work(*call).run();
#endif
}
