// Choosing a token of each row of logits, and log-probabilities; engine/draw.py and rules.py hold the same in
// plain torch, and say what each rule keeps.
//
// A row is one thread's work from beginning to end: its bits depend on nothing beside it.
//
// A token's distance is that of its scaled logit from the largest, (largest - x) / temperature ≥ 0, and its
// weight e^-distance. Rules then are of one kind: the smallest distance within which there is enough, of
// tokens (top_k), of weight (top_p), or of weight around the mean (typical_p: a token's surprise is its
// distance and a constant). `reach` finds it without sorting: it sums what lies within each of several
// distances, and looks again between the two where enough is reached.
//
// Weights are exact to some 1e-7 of themselves however small; sums are float32 over at most 256 of them, and
// float64 beyond. For float64 logits all is float64.
//
// V vocabulary.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <type_traits>
#include <utility>

#include "threads.hpp"
#include "vectors.hpp"

namespace {

constexpr int BLOCK = 64;     // tokens: both levels of a search are short
constexpr int SEGMENTS = 32;  // of a row, whose largest logits are kept lane by lane
constexpr int CUTS = 8;       // distances that are looked at together
constexpr int RUN = 16;       // vectors summed in their own type
constexpr int FEW = 64;       // tokens that are sorted
constexpr double COLDEST = 1e-30, HOTTEST = 1e30;

// --- What a call is given

extern "C" struct Row {
    const void* own;        // the model's logits (V,)
    const void* edited;     // the same after rules for single ids, in the wide type; null: no such rule
    int32_t* top_ids;       // (top,)
    double* top_logprobs;   // (top,)
    double* weights;        // (V,), for tests: what each token is drawn with; null: not asked for
    double uniform, temperature, top_p, min_p, typical_p;
    int64_t top_k, top;     // top: -1 without log-probabilities
    int64_t token;          // given where only log-probabilities are asked for; else -1, and found
    int64_t fault;          // found
    double logprob;         // found
};

enum Fault { NONE, NOT_FINITE, NO_TOKEN };

// --- The largest logits

template <class A> struct Peaks {
    A largest;
    long segment;  // tokens
    bool sound;    // the largest is finite, and none is NaN
    alignas(64) A groups[SEGMENTS * LANES<A>];  // the largest of every lane of every segment
};

// Logits from..from+LANES of a row, -inf beyond its end.
template <class A, class M> inline Vec<A> some(const M* x, long from, long V) {
    if (from + LANES<A> <= V) return load<A>(x + from);
    Vec<A> found = Vec<A>{} - INFINITE<A>;
    for (long at = from; at < V; ++at) found[int(at - from)] = A(widen(x[at]));
    return found;
}

template <class A, class M> void find_peaks(const M* x, long V, Peaks<A>& peaks) {
    constexpr int L = LANES<A>;
    peaks.segment = rounded((V + SEGMENTS - 1) / SEGMENTS, 2 * L);
    Vec<A> all = Vec<A>{} - INFINITE<A>, lost = {};
    for (int segment = 0; segment < SEGMENTS; ++segment) {
        const long end = std::min(V, (segment + 1) * peaks.segment);
        long at = segment * peaks.segment;
        Vec<A> first = Vec<A>{} - INFINITE<A>, second = first;
        for (; at + 2 * L <= end; at += 2 * L) {
            const Vec<A> a = load<A>(x + at), b = load<A>(x + at + L);
            first = a > first ? a : first;
            second = b > second ? b : second;
            lost = a != a ? a : lost;
            lost = b != b ? b : lost;
        }
        for (; at < end; at += L) {
            const Vec<A> a = some<A>(x, at, V);
            first = a > first ? a : first;
            lost = a != a ? a : lost;
        }
        first = second > first ? second : first;
        store<A>(peaks.groups + segment * L, first);
        all = first > all ? first : all;
    }
    peaks.largest = largest_of(all);
    bool number = true;
    for (int lane = 0; lane < L; ++lane) number &= lost[lane] == lost[lane];
    peaks.sound = number && std::isfinite(peaks.largest);
}

// The lowest id of the largest logit: segments lie in order.
template <class A, class M> long largest_id(const M* x, long V, const Peaks<A>& peaks) {
    const A* group = std::find(peaks.groups, peaks.groups + SEGMENTS * LANES<A>, peaks.largest);
    long id = (group - peaks.groups) / LANES<A> * peaks.segment;
    while (id < V - 1 && A(widen(x[id])) != peaks.largest) ++id;
    return id;
}

// The least that the k-th largest logit can be: k groups hold one as large, each another.
template <class A> A kth_at_least(const Peaks<A>& peaks, long k) {
    A groups[SEGMENTS * LANES<A>];
    std::copy(std::begin(peaks.groups), std::end(peaks.groups), groups);
    std::nth_element(groups, groups + k - 1, std::end(groups), std::greater<A>());
    return groups[k - 1];
}

// --- Enough within a distance

template <class A> struct Mass {
    A distance, mass;
};

// The mass within each distance of CUTS; n is a multiple of the lanes.
template <class A> void within(const A* distance, const A* mass, long n, const A* cuts, double* found) {
    std::fill(found, found + CUTS, 0.0);
    for (long begin = 0; begin < n; begin += RUN * LANES<A>) {
        const long end = std::min(n, begin + RUN * LANES<A>);
        Vec<A> sum[CUTS] = {};
        for (long at = begin; at < end; at += LANES<A>) {
            const Vec<A> far = load<A>(distance + at), here = load<A>(mass + at);
            for (int cut = 0; cut < CUTS; ++cut) sum[cut] += far <= cuts[cut] ? here : Vec<A>{};
        }
        for (int cut = 0; cut < CUTS; ++cut) found[cut] += double(added(sum[cut]));
    }
}

// The largest distance, among those of any mass, that is not infinite.
template <class A> A farthest(const A* distance, const A* mass, long n) {
    Vec<A> found = {};
    for (long at = 0; at < n; at += LANES<A>) {
        const Vec<A> far = load<A>(distance + at), here = load<A>(mass + at);
        const Vec<A> counted = here > A(0) ? far : Vec<A>{};
        const Vec<A> finite = counted < INFINITE<A> ? counted : Vec<A>{};
        found = finite > found ? finite : found;
    }
    return largest_of(found);
}

// Those of low < distance ≤ high, to places that may be the same ones; how many they are.
template <class A>
long between(const A* distance, const A* mass, long n, A low, A high, A* far, A* here) {
    long left = 0;
#if defined(__AVX512F__)
    for (long at = 0; at < n; at += LANES<A>) {  // three times as fast as one by one
        const Vec<A> d = load<A>(distance + at), m = load<A>(mass + at);
        if constexpr (std::is_same_v<A, float>) {
            const auto found = __mmask16(_mm512_cmp_ps_mask(__m512(d), __m512(Vec<A>{} + low), _CMP_GT_OQ) &
                                         _mm512_cmp_ps_mask(__m512(d), __m512(Vec<A>{} + high), _CMP_LE_OQ));
            store<A>(far + left, Vec<A>(_mm512_maskz_compress_ps(found, __m512(d))));
            store<A>(here + left, Vec<A>(_mm512_maskz_compress_ps(found, __m512(m))));
            left += __builtin_popcount(found);
        } else {
            const auto found = __mmask8(_mm512_cmp_pd_mask(__m512d(d), __m512d(Vec<A>{} + low), _CMP_GT_OQ) &
                                        _mm512_cmp_pd_mask(__m512d(d), __m512d(Vec<A>{} + high), _CMP_LE_OQ));
            store<A>(far + left, Vec<A>(_mm512_maskz_compress_pd(found, __m512d(d))));
            store<A>(here + left, Vec<A>(_mm512_maskz_compress_pd(found, __m512d(m))));
            left += __builtin_popcount(found);
        }
    }
#else
    for (long at = 0; at < n; ++at) {
        const A d = distance[at], m = mass[at];
        far[left] = d, here[left] = m;
        left += long(d > low) & long(d <= high);
    }
#endif
    return left;
}

// The smallest of the distances ≥ 0 (n, a multiple of the lanes) within which there is a mass of `target`, or
// the largest if there is less. It is known to be at most `most`.
template <class A> A reach(const A* distance, const A* mass, long n, double target, A most) {
    thread_local Buffer<A> distances, masses;
    A *far = distances.of(n + LANES<A>), *here = masses.of(n + LANES<A>);
    A low = 0, high = std::min(most, farthest(distance, mass, n));
    for (double before = 0;;) {
        A cuts[CUTS];
        double sums[CUTS];
        for (int cut = 0; cut < CUTS; ++cut) cuts[cut] = low + (high - low) * (A(cut) / CUTS);
        within(distance, mass, n, cuts, sums);
        int cut = 0;
        while (cut < CUTS && before + sums[cut] < target) ++cut;
        if (cut == 0) return low;  // only at the first look can there be anything as near as this
        const A from = cuts[cut - 1], to = cut < CUTS ? cuts[cut] : high;
        if (from == low && to == high) return high;  // no number lies between
        before += sums[cut - 1];
        low = from, high = to;
        const long left = between(distance, mass, n, low, high, far, here);
        if (left <= FEW) {
            Mass<A> few[FEW];
            for (long at = 0; at < left; ++at) few[at] = {far[at], here[at]};
            std::sort(few, few + left, [](auto a, auto b) { return a.distance < b.distance; });
            for (long at = 0; at < left; ++at)
                if ((before += double(few[at].mass)) >= target) return few[at].distance;
            return high;
        }
        n = rounded(left, LANES<A>);
        std::fill(far + left, far + n, INFINITE<A>);
        std::fill(here + left, here + n, A(0));
        distance = far, mass = here;
    }
}

// --- Drawing

struct Hit {
    long at;
    double rest;  // how far into it, from 0 to 1
};

// Where a uniform number falls among weights.
template <class A> Hit hit(const A* weights, long n, double uniform) {
    double total = 0;
    long last = 0;  // that can be hit: a product may round up to the total
    for (long at = 0; at < n; ++at) {
        if (weights[at] > 0) last = at;
        total += double(weights[at]);
    }
    const double aim = uniform * total;
    double reached = 0;
    for (long at = 0; at < last; ++at) {
        const double here = double(weights[at]);
        if (reached + here > aim) return {at, std::min(1.0, std::max(0.0, (aim - reached) / here))};
        reached += here;
    }
    const double rest = (aim - reached) / double(weights[last]);
    return {last, std::min(1.0, std::max(0.0, rest))};
}

template <class A, class M> class Draw {
    const Row& row;
    const M* x;
    const long V;
    const Peaks<A>& peaks;
    const A scale;
    A *distances = nullptr, *weights = nullptr;
    double* sums = nullptr;
    const int32_t* ids = nullptr;  // of tokens that are left; null: all of them
    long n = 0;                    // how many, rounded up to blocks
    double total = 0;
    A within = INFINITE<A>;

public:
    Draw(const Row& row, const M* x, long V, const Peaks<A>& peaks)
        : row(row), x(x), V(V), peaks(peaks),
          scale(A(std::min(HOTTEST, std::max(COLDEST, row.temperature)))) {}

    long token() {
        const bool nearest = row.top_k > 0 && row.top_k < V;
        const bool gathered = nearest && row.top_k <= SEGMENTS * LANES<A>;
        if (gathered) gather();
        else take_all();
        if (nearest && !gathered) keep_nearest();
        if (row.top_p < 1) keep_likeliest();
        if (row.min_p > 0) within = std::min(within, A(-std::log(row.min_p)));
        if (row.typical_p < 1) keep_typical();
        else if (within < INFINITE<A>) keep();
        if (row.weights) tell();
        const Hit block = hit(sums, n / BLOCK, row.uniform);
        const long at = block.at * BLOCK + hit(weights + block.at * BLOCK, BLOCK, block.rest).at;
        return ids ? ids[at] : at;
    }

private:
    Vec<A> distance(long at) const {
        const Vec<A> below = peaks.largest - some<A>(x, at, V);
        return scale == A(1) ? below : below / scale;
    }

    void room(long count) {
        thread_local Buffer<A> far, heavy;
        thread_local Buffer<double> blocks;
        n = rounded(count, BLOCK);
        distances = far.of(n), weights = heavy.of(n), sums = blocks.of(n / BLOCK);
    }

    void take_all() {
        room(V);
        for (long at = 0; at < n; at += BLOCK) {
            for (int i = 0; i < BLOCK; i += LANES<A>) store<A>(distances + at + i, distance(at + i));
            weigh(at);
        }
    }

    void weigh(long block) {
        Vec<A> sum = {};
        for (long at = block; at < block + BLOCK; at += LANES<A>) {
            const Vec<A> weight = exponential(-load<A>(distances + at));
            store<A>(weights + at, weight);
            sum += weight;
        }
        total += sums[block / BLOCK] = double(added(sum));
    }

    // The k nearest, and those as near as the last of them; the others need no weights.
    void gather() {
        thread_local Buffer<int32_t> names;
        room(V);
        int32_t* name = names.of(n);
        const A bound = (peaks.largest - kth_at_least(peaks, row.top_k)) / scale;
        long left = 0;
        for (long block = 0; block < V; block += BLOCK) {
            alignas(64) A far[BLOCK];
            Vec<A> nearest = Vec<A>{} + INFINITE<A>;
            for (int i = 0; i < BLOCK; i += LANES<A>) {
                const Vec<A> here = distance(block + i);
                store<A>(far + i, here);
                nearest = here < nearest ? here : nearest;
            }
            const auto near = nearest <= bound;
            if (!fold(near, [](auto a, auto b) { return a | b; })) continue;
            const long end = std::min<long>(BLOCK, V - block);
            for (long i = 0; i < end; ++i) {
                distances[left] = far[i], name[left] = int32_t(block + i);
                left += far[i] <= bound;
            }
        }
        std::copy(distances, distances + left, weights);
        std::nth_element(weights, weights + row.top_k - 1, weights + left);
        const A last = weights[row.top_k - 1];
        long kept = 0;
        for (long at = 0; at < left; ++at) {
            const A d = distances[at];
            distances[kept] = d, name[kept] = name[at];
            kept += d <= last;
        }
        n = rounded(kept, BLOCK), ids = name;
        std::fill(distances + kept, distances + n, INFINITE<A>);
        for (long at = 0; at < n; at += BLOCK) weigh(at);
    }

    void keep_nearest() {
        thread_local Buffer<A> ones;
        A* one = ones.of(n);
        std::fill(one, one + n, A(1));
        long finite = 0;
        for (long at = 0; at < n; ++at) finite += distances[at] < INFINITE<A>;
        if (finite >= row.top_k) within = reach(distances, one, n, double(row.top_k), INFINITE<A>);
    }

    void keep_likeliest() {
        double left = total;
        if (within < INFINITE<A>) left = weight_within().first;
        const double target = row.top_p * left;
        // What lies beyond a distance d weighs less than V · e^-d.
        const double most = std::log(double(V) / std::max(left - target, 1e-300)) + 0.01;
        within = std::min(within, reach(distances, weights, n, target, A(most)));
    }

    // The weight of what is left, and its mean distance.
    std::pair<double, double> weight_within() const {
        double sum = 0, moment = 0;
        for (long block = 0; block < n; block += BLOCK) {
            Vec<A> weight = {}, product = {};
            for (long at = block; at < block + BLOCK; at += LANES<A>) {
                const Vec<A> far = load<A>(distances + at), here = load<A>(weights + at);
                const Vec<A> left = far <= within ? here : Vec<A>{};
                weight += left;
                product += left * (left > A(0) ? far : Vec<A>{});  // 0 · infinity would be NaN
            }
            sum += double(added(weight)), moment += double(added(product));
        }
        return {sum, moment / sum};
    }

    void keep_typical() {
        thread_local Buffer<double> far, heavy;
        double *apart = far.of(n), *mass = heavy.of(n);
        const auto [left, mean] = weight_within();
        for (long at = 0; at < n; ++at) {
            const bool counts = distances[at] <= within && weights[at] > 0;
            apart[at] = counts ? std::abs(double(distances[at]) - mean) : INFINITE<double>;
            mass[at] = counts ? double(weights[at]) : 0.0;
        }
        const double last = reach(apart, mass, n, row.typical_p * left, INFINITE<double>);
        for (long at = 0; at < n; ++at)
            if (apart[at] > last) distances[at] = INFINITE<A>;
        within = std::min(within, std::numeric_limits<A>::max());
        keep();
    }

    void keep() {
        for (long block = 0; block < n; block += BLOCK) {
            Vec<A> sum = {};
            for (long at = block; at < block + BLOCK; at += LANES<A>) {
                const Vec<A> left = load<A>(distances + at) <= within ? load<A>(weights + at) : Vec<A>{};
                store<A>(weights + at, left);
                sum += left;
            }
            sums[block / BLOCK] = double(added(sum));
        }
    }

    void tell() const {
        std::fill(row.weights, row.weights + V, 0.0);
        for (long at = 0; at < n; ++at)
            if (weights[at] > 0) row.weights[ids ? ids[at] : at] = double(weights[at]);
    }
};

// --- Log-probabilities

template <class A, class M> void score(Row& row, const M* x, long V, const Peaks<A>& peaks) {
    double total = 0;
    for (long block = 0; block < V; block += BLOCK) {
        Vec<A> sum = {};
        for (long at = block; at < block + BLOCK; at += LANES<A>)
            sum += exponential(some<A>(x, at, V) - peaks.largest);
        total += double(added(sum));
    }
    const double all = std::log(total);
    const auto logprob = [&](A logit) { return double(A(double(logit) - double(peaks.largest) - all)); };
    row.logprob = logprob(A(widen(x[row.token])));
    if (row.top <= 0) return;

    struct Likely {
        A logit;
        int32_t id;
    };
    thread_local Buffer<Likely> likely;
    Likely* found = likely.of(V);
    const A bound = row.top <= SEGMENTS * LANES<A> ? kth_at_least(peaks, row.top) : -INFINITE<A>;
    long left = 0;
    for (long block = 0; block < V; block += BLOCK) {
        Vec<A> most = Vec<A>{} - INFINITE<A>;
        for (long at = block; at < block + BLOCK; at += LANES<A>) {
            const Vec<A> here = some<A>(x, at, V);
            most = here > most ? here : most;
        }
        const auto some_are = most >= bound;
        if (!fold(some_are, [](auto a, auto b) { return a | b; })) continue;
        for (long at = block; at < std::min(V, block + BLOCK); ++at) {
            const A logit = A(widen(x[at]));
            if (logit >= bound) found[left++] = {logit, int32_t(at)};
        }
    }
    std::partial_sort(found, found + row.top, found + left, [](const Likely& a, const Likely& b) {
        return a.logit > b.logit || (a.logit == b.logit && a.id < b.id);
    });
    for (long at = 0; at < row.top; ++at)
        row.top_ids[at] = found[at].id, row.top_logprobs[at] = logprob(found[at].logit);
}

// --- Rows

template <class A, class M> void pick(Row& row, const M* x, long V, const Peaks<A>& peaks) {
    row.token = row.temperature == 0 ? largest_id(x, V, peaks) : Draw<A, M>(row, x, V, peaks).token();
}

template <class A, class M> void choose(Row& row, long V) {
    const M* own = static_cast<const M*>(row.own);
    const A* edited = static_cast<const A*>(row.edited);
    row.top = std::min<int64_t>(row.top, V);
    Peaks<A> peaks;
    find_peaks(own, V, peaks);
    row.fault = peaks.sound ? NONE : NOT_FINITE;
    if (!peaks.sound) return;
    if (row.token < 0 && edited) {
        Peaks<A> left;
        find_peaks(edited, V, left);
        row.fault = left.sound ? NONE : NO_TOKEN;
        if (!left.sound) return;
        pick(row, edited, V, left);
    } else if (row.token < 0) {
        pick(row, own, V, peaks);
    }
    if (row.top >= 0) score(row, own, V, peaks);
}

template <class A, class M> void choose_all(Row* rows, int count, long V, int threads) {
    double work = 0;  // tokens, one at which is only looked counted as one
    for (int i = 0; i < count; ++i) work += V * (rows[i].top >= 0 || rows[i].temperature > 0 ? 8.0 : 1.0);
    for_each(count, work > 3e5 * least() ? threads : 1, [&](int i) { choose<A, M>(rows[i], V); });
}

// The likeliest token of each row, -1 where it has none; rows lie `step` numbers apart.
template <class A, class M>
void likeliest(const M* logits, long step, int count, long V, int32_t* tokens, int threads) {
    for_each(count, double(count) * V > 3e5 * least() ? threads : 1, [=](int i) {
        Row row{logits + i * step, nullptr, nullptr, nullptr, nullptr, 0, 0, 1, 0, 1, 0, -1, -1, NONE, 0};
        choose<A, M>(row, V);
        tokens[i] = row.fault == NONE ? int32_t(row.token) : -1;
    });
}

}  // namespace

#define ENTRY(name, A, M)                                                      \
    extern "C" void choose_##name(Row* rows, int32_t count, int64_t V, int32_t threads) { \
        choose_all<A, M>(rows, count, V, threads);                             \
    }                                                                          \
    extern "C" void likeliest_##name(const M* logits, int64_t step, int32_t count, int64_t V, int32_t* tokens, \
                                     int32_t threads) {                        \
        likeliest<A, M>(logits, step, count, V, tokens, threads);              \
    }

ENTRY(float32, float, float)
ENTRY(bfloat16, float, bfloat16)
ENTRY(float16, float, float16)
ENTRY(float64, double, double)
