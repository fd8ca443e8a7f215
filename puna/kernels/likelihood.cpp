// How likely each row of logits makes its target, and the logits' gradient in their place; likelihood.py holds
// the same in plain torch.
//
// A row comes from memory once and goes back once: it stays in the cache of the thread that has it, beside its
// exponentials in float32, so that each is computed once and rounded last.
//
// C rows   V vocabulary

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "rows.hpp"

namespace {

constexpr int L = LANES<float>;
constexpr long PART = 64 * L;  // exponentials added up by themselves: of many, a sum in float32 loses digits

template <class M> struct Likelihood {
    M* logits;               // (C, V), and then their gradient
    const int64_t* targets;  // (C,)
    const bool* mask;        // (C,)
    float* losses;           // (C,): log Σ e^x - x[target]
    float* penalties;        // (C,): z · (log Σ e^x)²
    long V;
    float z;

    // False where the target is no place in the row.
    bool row(long row) const {
        M* x = logits + row * V;
        losses[row] = penalties[row] = 0;
        if (!mask[row]) {
            std::fill(x, x + V, M{});
            return true;
        }
        const int64_t target = targets[row];
        if (target < 0 || target >= V) return false;
        thread_local Buffer<float> room;
        float* powers = room.of(rounded(V, L));  // (V,)
        const float largest = largest_in(x), wanted = widen(x[target]);
        const double sum = exponentials(x, largest, powers);
        const float log = float(double(largest) + std::log(sum));
        losses[row] = float(std::log(sum) - (double(wanted) - largest));  // large logits leave it its digits
        penalties[row] = z * log * log;
        const float factor = float((1 + 2 * double(z) * log) / sum), likelihood = powers[target] * factor;
        for (long at = 0; at < V; at += L) put(x + at, V - at, load<float>(powers + at) * factor);
        x[target] = narrow<M>(likelihood - 1);
        return true;
    }

private:
    // Beyond a row's end stands what has no weight.
    Vec<float> read(const M* x, long at) const {
        Vec<float> found = some(x + at, V - at);
        for (long lane = std::min<long>(L, V - at); lane < L; ++lane) found[int(lane)] = -INFINITE<float>;
        return found;
    }

    float largest_in(const M* x) const {
        Vec<float> largest = read(x, 0);
        for (long at = L; at < V; at += L) {
            const Vec<float> here = read(x, at);
            largest = here > largest ? here : largest;
        }
        return largest_of(largest);
    }

    double exponentials(const M* x, float largest, float* to) const {
        double sum = 0;
        for (long first = 0; first < V; first += PART) {
            Vec<float> part = {};
            for (long at = first; at < std::min(V, first + PART); at += L) {
                const Vec<float> here = exponential(read(x, at) - largest);
                store<float>(to + at, here);
                part += here;
            }
            sum += added(part);
        }
        return sum;
    }
};

template <class M> bool likelihoods(const Likelihood<M>& all, long C, int threads) {
    std::atomic<bool> within{true};
    for_rows(C, all.V, threads, [&](int row) {
        if (!all.row(row)) within = false;
    });
    return within;
}

}  // namespace

#define ENTRY(name, M)                                                                                     \
    extern "C" bool likelihood_##name(M* logits, const int64_t* targets, const bool* mask, float* losses,  \
                                      float* penalties, int64_t C, int64_t V, double z, int32_t threads) { \
        return likelihoods<M>({logits, targets, mask, losses, penalties, V, float(z)}, C, threads);        \
    }

ENTRY(float32, float)
ENTRY(bfloat16, bfloat16)
