// Products of rows with a matrix that lies in panels; panels.py holds the same in plain torch.
//
// A panel is WIDTH outputs of the matrix, turned so that what a step of their sums reads lies together. Each
// output adds its terms from the first input to the last: a row's bits depend on nothing but the row and the
// matrix.
//
// R rows   I inputs   O outputs

#include <algorithm>
#include <cstdint>
#include <utility>

#include "matrix.hpp"
#include "sums.hpp"
#include "threads.hpp"
#include "vectors.hpp"

namespace {

constexpr int WIDTH = 32;     // outputs of a panel
constexpr long STEPS = 2048;  // of a sum at a time, so that a part of a panel stays in the cache for all rows
constexpr long CHUNK = 1 << 17;  // bytes of the matrix that one thread reads in a row
constexpr int GROUP = 112;    // rows of one piece of work
constexpr double LITTLE = 1e6;  // products of numbers: waking other threads for them takes longer

// As many accumulators as the registers hold, beside a step's vectors and what is broadcast.
constexpr int ROWS = BYTES == 64 ? 14 : BYTES == 32 ? 6 : 5, VECTORS = BYTES == 16 ? 4 : 2;
constexpr int SLICE = VECTORS * LANES<float>;  // outputs computed together

template <class M> using Step = SumStep<float, M>;

// --- What a call is given

template <class M> struct Product {
    const M* x;          // (R, I)
    const void* panels;  // (O / WIDTH rounded up, I / INPUTS, WIDTH, INPUTS)
    const M* bias;       // (O,) or null
    M* out;              // (R, O), rows lie out_stride apart
    int64_t rows, inputs, outputs, out_stride;
    int32_t threads;
};

// sum[r][o] += Σ x[step][r] · y[step][o] over steps in order, for R rows and a slice of the outputs.
template <class M, int R>
void add_steps(const typename Step<M>::Term* x, const typename Step<M>::Place* y, long steps, float* sums) {
    Vec<float> sum[R][VECTORS];  // in registers only where all loops over them are unrolled
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < VECTORS; ++v) sum[r][v] = load<float>(sums + r * WIDTH + v * LANES<float>);
    for (long step = 0; step < steps; ++step, x += R, y += WIDTH) {
        decltype(Step<M>::read(y)) part[VECTORS];
        for (int v = 0; v < VECTORS; ++v) part[v] = Step<M>::read(y + v * LANES<float>);
        __builtin_prefetch(y + 16 * WIDTH);
        __builtin_prefetch(y + 16 * WIDTH + 64 / sizeof(*y));
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < VECTORS; ++v) Step<M>::add(sum[r][v], x[r], part[v]);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < VECTORS; ++v) store<float>(sums + r * WIDTH + v * LANES<float>, sum[r][v]);
}

template <class M>
using AddSteps = void (*)(const typename Step<M>::Term*, const typename Step<M>::Place*, long, float*);

template <class M, int... I> constexpr AddSteps<M> add_steps_of(int rows, std::integer_sequence<int, I...>) {
    constexpr AddSteps<M> all[] = {add_steps<M, I + 1>...};
    return all[rows - 1];
}

template <class M> class Work {
    using Term = typename Step<M>::Term;
    using Place = typename Step<M>::Place;
    const Product<M>& call;
    const long steps = call.inputs / Step<M>::INPUTS, blocks = (call.rows + ROWS - 1) / ROWS;
    Term* const terms;  // of each block: (steps, rows of the block)

public:
    Work(const Product<M>& call, Term* terms) : call(call), terms(terms) {}

    // What a step takes of a block's rows put together: read row by row, rows of some widths would drive
    // each other out of the cache.
    void turn(long which) const {
        const Block block = block_of(call.rows, blocks, which);
        Term* to = terms + block.first * steps;
        for (int r = 0; r < block.count; ++r) {
            const M* from = call.x + (block.first + r) * call.inputs;
            for (long step = 0; step < steps; ++step)
                to[step * block.count + r] = Step<M>::term(from + step * Step<M>::INPUTS);
        }
    }

    // A panel's outputs for some of the blocks.
    void panel(long which, long begin, long end) const {
        thread_local Buffer<float> room;
        const long first = block_of(call.rows, blocks, begin).first;
        const Block last = block_of(call.rows, blocks, end - 1);
        const long rows = last.first + last.count - first;
        float* sums = room.of(rows * WIDTH);
        std::fill(sums, sums + rows * WIDTH, 0.0f);
        const Place* places = static_cast<const Place*>(call.panels) + which * steps * WIDTH;
        for (long step = 0; step < steps; step += STEPS)
            for (long at = begin; at < end; ++at) {
                const Block block = block_of(call.rows, blocks, at);
                const auto add = add_steps_of<M>(block.count, std::make_integer_sequence<int, ROWS>{});
                const Term* x = terms + block.first * steps + step * block.count;
                for (int slice = 0; slice < WIDTH; slice += SLICE)
                    add(x, places + step * WIDTH + slice, std::min(STEPS, steps - step),
                        sums + (block.first - first) * WIDTH + slice);
            }
        for (long r = 0; r < rows; ++r) give(sums + r * WIDTH, first + r, which * WIDTH);
    }

private:
    void give(float* sums, long row, long output) const {
        const long count = std::min<long>(WIDTH, call.outputs - output);
        if (call.bias)
            for (long o = 0; o < count; ++o) sums[o] += widen(call.bias[output + o]);
        alignas(64) M small[WIDTH];
        M* to = call.out + row * call.out_stride + output;
        M* direct = count == WIDTH ? to : small;
        for (int o = 0; o < WIDTH; o += LANES<float>) store_narrow(direct + o, load<float>(sums + o));
        if (direct == small) std::copy(small, small + count, to);
    }
};

template <class M> void multiply(const Product<M>& call) {
    using Term = typename Step<M>::Term;
    thread_local Buffer<Term> room;
    if (call.rows == 0 || call.outputs == 0) return;
    const Work<M> work(call, room.of(call.rows * call.inputs));
    const long blocks = (call.rows + ROWS - 1) / ROWS, panels = (call.outputs + WIDTH - 1) / WIDTH;
    const long groups = (call.rows + GROUP - 1) / GROUP;
    const long bytes = call.inputs * WIDTH * long(sizeof(M));
    const long chunk = std::max(1L, std::min(CHUNK / bytes, panels / (8 * call.threads)));
    const long chunks = (panels + chunk - 1) / chunk;
    for_each(int(blocks), blocks > 4 ? call.threads : 1, [&](int which) { work.turn(which); });
    const bool little = double(call.inputs) * call.outputs * std::max<int64_t>(call.rows, 4) < LITTLE * least();
    const int pieces = int(chunks * groups);
    for_stretches(pieces, little ? 1 : call.threads, [&](int piece) {
        const long group = piece % groups, first = piece / groups * chunk;
        for (long panel = first; panel < std::min(panels, first + chunk); ++panel)
            work.panel(panel, blocks * group / groups, blocks * (group + 1) / groups);
    });
}

}  // namespace

#define ENTRY(name, M)                                                                                    \
    extern "C" void name(const Matrix* matrix, const void* x, void* out, int64_t rows, int64_t out_stride, \
                         int32_t threads) {                                                               \
        const auto *from = static_cast<const M*>(x), *bias = static_cast<const M*>(matrix->bias);         \
        multiply<M>({from, matrix->panels, bias, static_cast<M*>(out), rows, matrix->inputs,              \
                     matrix->outputs, out_stride, threads});                                              \
    }

ENTRY(multiply_float32, float)
ENTRY(multiply_bfloat16, bfloat16)
ENTRY(multiply_float16, float16)
