// The gradient of a feed-forward layer's gate; gates.py holds the same in plain torch.
//
// A row is read from memory once; all is computed in float32, and rounded where plain torch rounds.
//
// R rows   F feed-forward width

#include <cstdint>

#include "rows.hpp"

namespace {

constexpr int L = LANES<float>;

template <class M> struct Gate {
    const M* grad;  // (R, F)
    const M* x;     // (R, 2F): gates, then what they let through
    M* grad_x;      // (R, 2F)
    M* h;           // (R, F): the product once more
    long F;

    void row(long row) const {
        const M *given = grad + row * F, *gates = x + 2 * row * F, *ups = gates + F;
        M *grad_gates = grad_x + 2 * row * F, *grad_ups = grad_gates + F, *products = h + row * F;
        for (long at = 0; at < F; at += L) {
            const long left = F - at;
            const Vec<float> gate = some(gates + at, left), up = some(ups + at, left), zero = {};
            const Vec<float> e = exponential(gate > zero ? -gate : gate);  // of what is not above 0: no overflow
            const Vec<float> part = 1 / (1 + e), other = e * part;
            const Vec<float> open = gate > zero ? part : other, shut = gate > zero ? other : part;
            const Vec<float> silu = rounded_to<M>(gate * open), here = some(given + at, left);
            put(products + at, left, silu * up);
            put(grad_ups + at, left, here * silu);
            put(grad_gates + at, left, here * up * (open * (1 + gate * shut)));
        }
    }
};

template <class M> void backward(const Gate<M>& gate, long R, int threads) {
    for_row_blocks(R, 8 * gate.F, threads, [&](long row, long) { gate.row(row); });
}

}  // namespace

#define ENTRY(name, M)                                                                                 \
    extern "C" void gate_backward_##name(const M* grad, const M* x, M* grad_x, M* h, int64_t R,        \
                                         int64_t F, int32_t threads) {                                 \
        backward<M>({grad, x, grad_x, h, F}, R, threads);                                              \
    }

ENTRY(float32, float)
ENTRY(bfloat16, bfloat16)
