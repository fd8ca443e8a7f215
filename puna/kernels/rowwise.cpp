// What a layer does to each row beside its products; rowwise.py holds the same in plain torch.
//
// A row is one thread's work, and its bits depend on nothing beside it. All is computed in float32, and rounded
// where plain torch rounds.
//
// R rows   D width   F feed-forward width   N query heads   K key/value heads   H head width

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "rows.hpp"

namespace {

constexpr int L = LANES<float>;

// x / √(mean(x²) + ε) · weight
template <class M>
void norm(const M* x, const M* weight, M* out, long R, long D, double eps, int threads) {
    for_rows(R, D, threads, [=](int row) {
        const M* from = x + row * D;
        Vec<float> squares = {};
        for (long at = 0; at < D; at += L) {
            const Vec<float> here = some(from + at, D - at);
            squares += here * here;
        }
        const float scale = 1 / std::sqrt(added(squares) / float(D) + float(eps));
        for (long at = 0; at < D; at += L) {
            const Vec<float> here = rounded_to<M>(some(from + at, D - at) * scale);
            put(out + row * D + at, D - at, here * some(weight + at, D - at));
        }
    });
}

// silu(gate) · up of rows that hold both, gates first
template <class M> void gated(const M* x, M* out, long R, long F, int threads) {
    for_rows(R, 8 * F, threads, [=](int row) {
        const M *gates = x + row * 2 * F, *ups = gates + F;
        for (long at = 0; at < F; at += L) {
            const Vec<float> gate = some(gates + at, F - at), zero = {};
            const Vec<float> e = exponential(gate > zero ? -gate : gate);  // of what is not above 0: no overflow
            const Vec<float> silu = (gate > zero ? gate : gate * e) / (1 + e);
            put(out + row * F + at, F - at, rounded_to<M>(silu) * some(ups + at, F - at));
        }
    });
}

// Queries and keys turned by the angles of their row, and values, each put together.
template <class M> struct Turn {
    const M* x;             // (R, N + 2K, H)
    const float *cos, *sin;  // (R, H): of the second half the sine, of the first its negative
    M *q, *k, *v;           // (R, N, H), (R, K, H), (R, K, H)
    long R, N, K, H;

    void row(long row) const {
        const M* from = x + row * (N + 2 * K) * H;
        for (long head = 0; head < N + K; ++head, from += H)
            turn(from, row, head < N ? q + (row * N + head) * H : k + (row * K + head - N) * H);
        std::copy(from, from + K * H, v + row * K * H);
    }

private:
    void turn(const M* from, long row, M* to) const {
        const float *c = cos + row * H, *s = sin + row * H;
        const long half = H / 2;
        for (long at = 0; at < half; at += L) {
            const long left = half - at;
            const Vec<float> a = some(from + at, left), b = some(from + half + at, left);
            const Vec<float> ca = some(c + at, left), sa = some(s + at, left);
            const Vec<float> cb = some(c + half + at, left), sb = some(s + half + at, left);
            put(to + at, left, a * ca + b * sa);
            put(to + half + at, left, b * cb + a * sb);
        }
    }
};

template <class M> void turned(const Turn<M>& turn, int threads) {
    for_rows(turn.R, (turn.N + 2 * turn.K) * turn.H, threads, [&](int row) { turn.row(row); });
}

}  // namespace

#define ENTRIES(name, M)                                                                              \
    extern "C" void norm_##name(const M* x, const M* weight, M* out, int64_t R, int64_t D, double eps, \
                                int32_t threads) {                                                    \
        norm<M>(x, weight, out, R, D, eps, threads);                                                  \
    }                                                                                                 \
    extern "C" void gated_##name(const M* x, M* out, int64_t R, int64_t F, int32_t threads) {         \
        gated<M>(x, out, R, F, threads);                                                              \
    }                                                                                                 \
    extern "C" void turned_##name(const M* x, const float* cos, const float* sin, M* q, M* k, M* v,   \
                                  int64_t R, int64_t N, int64_t K, int64_t H, int32_t threads) {      \
        turned<M>({x, cos, sin, q, k, v, R, N, K, H}, threads);                                       \
    }

ENTRIES(float32, float)
ENTRIES(bfloat16, bfloat16)
ENTRIES(float16, float16)
