// The norms of a layer that learns, forward and backward; norms.py holds the same in plain torch.
//
// All is computed in float32, and rounded where plain torch rounds. A row is read from memory once: what is
// needed of it a second time is still in the cache. Of a weight's gradient the rows of a block are added up
// first, and then the blocks, in order: the number of threads changes no bit.
//
// R rows   D width   S the number type of the residual stream and of weights   M that of products

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "rows.hpp"

namespace {

constexpr int L = LANES<float>;

template <class S, class M> struct Norm {
    const S* x;       // (R, D)
    const M* added;   // (R, D), or null: what the residual stream gets before
    const S* weight;  // (D,)
    S* total;         // (R, D): both together; not written where nothing is added
    M* y;             // (R, D)
    float* rstd;      // (R,): 1 / √(mean(x²) + ε)
    long D;
    float eps;

    void row(long row) const {
        const long first = row * D;
        Vec<float> squares = {};
        for (long at = 0; at < D; at += L) {
            const Vec<float> here = added ? sum(first + at, D - at) : some(x + first + at, D - at);
            squares += here * here;
        }
        const float scale = rstd[row] = 1 / std::sqrt(::added(squares) / float(D) + eps);
        const S* from = (added ? total : x) + first;
        for (long at = 0; at < D; at += L) {
            const Vec<float> normal = rounded_to<S>(some(from + at, D - at) * scale);
            put(y + first + at, D - at, normal * some(weight + at, D - at));
        }
    }

private:
    Vec<float> sum(long at, long left) const {
        const Vec<float> here = rounded_to<S>(some(x + at, left) + some(added + at, left));
        put(total + at, left, here);
        return here;
    }
};

template <class S, class M> struct Backward {
    const M* grad;      // (R, D), of y
    const S* x;         // (R, D)
    const float* rstd;  // (R,)
    const S* weight;    // (D,)
    const S* past;      // (R, D), or null: the gradient that reaches x past the norm
    S* grad_x;          // (R, D)
    M* rounded;         // (R, D), or null: the same rounded
    M* y;               // (R, D), or null: the norm once more
    long D;

    // A row's share of the weight's gradient is added to `sums` (D,).
    void row(long row, float* sums) const {
        const long first = row * D;
        const float scale = rstd[row];
        Vec<float> products = {};
        for (long at = 0; at < D; at += L) {
            const long left = D - at;
            const Vec<float> given = some(grad + first + at, left), normal = some(x + first + at, left) * scale;
            products += given * some(weight + at, left) * normal;
            put(sums + at, left, some(sums + at, left) + given * rounded_to<S>(normal));
        }
        const float mean = added(products) / float(D);
        for (long at = 0; at < D; at += L) write(first + at, at, scale, mean);
    }

private:
    void write(long place, long at, float scale, float mean) const {
        const long left = D - at;
        const Vec<float> normal = some(x + place, left) * scale, by = some(weight + at, left);
        Vec<float> found = (some(grad + place, left) * by - normal * mean) * scale;
        if (past) found += some(past + place, left);
        put(grad_x + place, left, found);
        if (rounded) put(rounded + place, left, found);
        if (y) put(y + place, left, rounded_to<S>(normal) * by);
    }
};

template <class S, class M> void norm(const Norm<S, M>& norm, long R, int threads) {
    for_row_blocks(R, norm.D, threads, [&](long row, long) { norm.row(row); });
}

template <class S, class M> void backward(const Backward<S, M>& norm, S* grad_weight, long R, int threads) {
    thread_local Buffer<float> room;
    const long D = norm.D, blocks = row_blocks(R);
    float* sums = room.of((blocks + 1) * D);  // (blocks + 1, D)
    std::fill(sums, sums + (blocks + 1) * D, 0.0f);
    for_row_blocks(R, D, threads, [&](long row, long block) { norm.row(row, sums + (block + 1) * D); });
    for (long block = 1; block <= blocks; ++block)
        for (long at = 0; at < D; ++at) sums[at] += sums[block * D + at];
    for (long at = 0; at < D; at += L) put(grad_weight + at, D - at, some(sums + at, D - at));
}

}  // namespace

#define ENTRIES(name, S, M)                                                                               \
    extern "C" void norm_##name(const S* x, const M* added, const S* weight, S* total, M* y, float* rstd, \
                                int64_t R, int64_t D, double eps, int32_t threads) {                      \
        norm<S, M>({x, added, weight, total, y, rstd, D, float(eps)}, R, threads);                        \
    }                                                                                                     \
    extern "C" void norm_backward_##name(const M* grad, const S* x, const float* rstd, const S* weight,   \
                                         const S* past, S* grad_x, M* rounded, M* y, S* grad_weight,      \
                                         int64_t R, int64_t D, int32_t threads) {                         \
        backward<S, M>({grad, x, rstd, weight, past, grad_x, rounded, y, D}, grad_weight, R, threads);    \
    }

ENTRIES(float32_float32, float, float)
ENTRIES(float32_bfloat16, float, bfloat16)
ENTRIES(bfloat16_bfloat16, bfloat16, bfloat16)
