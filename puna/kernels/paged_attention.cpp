// Attention over blocks of keys and values where they lie; attention.py holds the same in plain torch.
//
// A query row's bits depend on its own query and on the keys and values that it sees, and on nothing else:
// every element of a product is one lane that sums in order, whatever is computed beside it; blocks are those
// of absolute positions, and every SPAN of them is summed apart before it is added to what came before, on one
// thread or on several. Positions that no row of a tile sees are never read as values, and the scores of those
// that one row does not see are set, not added to: what an earlier owner left in a block has no effect. A value
// of the same sequence that is not finite may reach rows of the tile that do not see it: 0 times it is NaN.
//
// In bfloat16 weights are rounded too, so that products are of pairs, and what they are divided by is the sum
// of the rounded ones: values that are all alike stay what they are.
//
// N query heads, K key/value heads, G = N/K, H head width, P = H rounded up to whole vectors of float,
// I = 2 in bfloat16, else 1: numbers that lie in pairs.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include "sums.hpp"
#include "threads.hpp"
#include "vectors.hpp"

namespace {

constexpr int BLOCK = 64;  // positions
constexpr int SPAN = 16;   // blocks summed apart
constexpr int TILE = 64;   // queries of one key/value head that share what is read

// As many accumulators as the registers hold, beside one row of vectors and what is broadcast.
constexpr int QUERIES = BYTES == 32 ? 6 : 4, VECTORS = BYTES == 32 ? 2 : 4;

// --- Arithmetic

// c[q] += Σ a[q][i] · b[i], over steps i in order, for Q rows of V vectors.
template <class D, class A, int Q, int V>
void product(const typename D::Term* a, long a_row, const typename D::Place* b, long b_row, int steps, A* c,
             long c_row) {
    Vec<A> sum[Q][V];  // in registers only where all loops over them are unrolled
#pragma GCC unroll 16
    for (int q = 0; q < Q; ++q)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sum[q][v] = load<A>(c + q * c_row + v * LANES<A>);
    for (int i = 0; i < steps; ++i) {
        decltype(D::read(b)) row[V];
        for (int v = 0; v < V; ++v) row[v] = D::read(b + i * b_row + v * LANES<A>);
#pragma GCC unroll 16
        for (int q = 0; q < Q; ++q)
#pragma GCC unroll 4
            for (int v = 0; v < V; ++v) D::add(sum[q][v], read<typename D::Term>(a + q * a_row + i), row[v]);
    }
#pragma GCC unroll 16
    for (int q = 0; q < Q; ++q)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) store<A>(c + q * c_row + v * LANES<A>, sum[q][v]);
}

template <class D, class A>
using Product = void (*)(const typename D::Term*, long, const typename D::Place*, long, int, A*, long);

template <class D, class A, int... I>
constexpr Product<D, A> product_of(int which, std::integer_sequence<int, I...>) {
    constexpr Product<D, A> all[] = {product<D, A, I / VECTORS + 1, I % VECTORS + 1>...};
    return all[which];
}

// The same for any number of rows, and any width that is a multiple of the lanes.
template <class D, class A>
void products(const typename D::Term* a, long a_row, const typename D::Place* b, long b_row, int steps, A* c,
              long c_row, int rows, int width) {
    constexpr int STRIDE = VECTORS * LANES<A>;
    for (int at = 0; at < width; at += STRIDE)
        for (int q = 0; q < rows; q += QUERIES) {
            const int vectors = std::min(STRIDE, width - at) / LANES<A>;
            const int which = (std::min(QUERIES, rows - q) - 1) * VECTORS + vectors - 1;
            product_of<D, A>(which, std::make_integer_sequence<int, QUERIES * VECTORS>{})(
                a + q * a_row, a_row, b + at, b_row, steps, c + q * c_row + at, c_row);
        }
}

// --- What a call is given

extern "C" struct Pages {  // one layer's
    void* keys;            // (blocks, K, H / I, BLOCK, I)
    void* values;          // (blocks, K, BLOCK / I, P, I)
    float* key_scales;     // (blocks, K, BLOCK), for int8
    float* value_scales;
    int32_t kv_heads, width, padded;  // K, H, P
};

extern "C" struct Step {
    const int32_t* tables;   // blocks of all sequences, one after the other
    const int32_t* offsets;  // where a sequence's begin
    const int32_t* starts;   // position of its first row
    const int32_t* counts;   // how many rows it has
    int32_t sequences, rows, window, threads;
};

struct Shape {
    int K, G, H, P;
};

// --- Storing

// A row of one key/value head into its place: element h goes to to[h].
template <class M> void store_row(const M* from, int H, int8_t* to, float* scale) {
    decltype(widen(*from)) largest = 0;
    for (int h = 0; h < H; ++h) largest = std::max(largest, std::abs(widen(from[h])));
    *scale = float(largest / 127);
    for (int h = 0; h < H; ++h) {
        const auto scaled = *scale > 0 ? std::nearbyint(widen(from[h]) / *scale) : 0;
        to[h] = int8_t(std::max<double>(-127, std::min<double>(127, scaled)));
    }
}
template <class M> void store_row(const M* from, int H, M* to, float*) { std::copy(from, from + H, to); }

// Values of some positions from `slot` on, two positions side by side.
template <class M> void store_pairs(const M* from, long next, int H, M* values, int P, int slot, int some) {
    for (int at = slot; at < slot + some; from += next, ++at) {
        M* const to = values + at / 2 * 2 * P;
        if (at % 2 == 0 && at + 1 < slot + some) {  // both at once
            const M* const later = from + next;
            for (int h = 0; h < H; ++h) to[2 * h] = from[h], to[2 * h + 1] = later[h];
            from += next, ++at;
        } else {
            for (int h = 0; h < H; ++h) to[2 * h + at % 2] = from[h];
        }
    }
}

struct Rows {  // a sequence's share of a step
    const int32_t* table;
    int start, count, first;  // position of the first row, number of rows, its place in the step
};

template <class S, class M>
void store_rows(const Pages& pages, const Shape& shape, const Rows& rows, int head, const M* k, const M* v) {
    constexpr int I = SumStep<float, S>::INPUTS, SIDE = 16;
    const auto [K, G, H, P] = shape;
    thread_local Buffer<S> room;
    S* const square = room.of(long(SIDE) * H);  // rows: written one by one they would drive others from the cache
    for (int row = 0; row < rows.count;) {
        const int position = rows.start + row, slot = position % BLOCK;
        const int some = std::min({SIDE, rows.count - row, BLOCK - slot});
        const long place = long(rows.table[position / BLOCK]) * K + head, scale = place * BLOCK + slot;
        const long next = long(K) * H, first = (rows.first + row) * next + head * H;
        const M *key = k + first, *value = v + first;
        for (int r = 0; r < some; ++r) store_row(key + r * next, H, square + r * H, pages.key_scales + scale + r);
        S* const keys = static_cast<S*>(pages.keys) + (place * H * BLOCK + slot * I);
        for (int h = 0; h < H; h += I)
            for (int r = 0; r < some; ++r)
                std::memcpy(keys + h * BLOCK + r * I, square + r * H + h, I * sizeof(S));
        S* const values = static_cast<S*>(pages.values) + place * BLOCK * P;
        if constexpr (I == 1)
            for (int r = 0; r < some; ++r)
                store_row(value + r * next, H, values + (slot + r) * P, pages.value_scales + scale + r);
        else store_pairs(value, next, H, values, P, slot, some);
        row += some;
    }
}

// --- Attending

template <class A> struct Partial {  // of a tile's queries, over one span or all so far
    A* out;      // (TILE, P): sums of values by weights that are relative to the largest score
    A* largest;  // (TILE,)
    A* total;    // (TILE,): sums of weights
    static long size(int queries, int P) { return long(queries) * (P + 2); }
    static Partial at(A* memory, int queries, int P) {
        return {memory, memory + long(queries) * P, memory + long(queries) * (P + 1)};
    }
};

template <class A, class S, class M> struct Tile {
    using Held = SumStep<A, S>;  // how the cache is summed, and what it takes of queries and weights
    using Term = typename Held::Term;
    using Place = typename Held::Place;
    const Pages& pages;
    const Shape& shape;
    const Rows& rows;
    int window, head, first, queries;  // queries first … of this sequence and head, counted row by row
    static constexpr bool scaled = std::is_same_v<S, int8_t>;
    static constexpr int I = Held::INPUTS;
    static constexpr bool widened = !std::is_same_v<S, A> && I == 1;
    static constexpr long WEIGHTS = BLOCK * long(sizeof(A)) / long(sizeof(Term));  // from one query's to the next

    int own(int query) const { return rows.start + (first + query) / shape.G; }
    int earliest(int query) const { return std::max(0, own(query) - window + 1); }
    int first_block() const { return earliest(0) / BLOCK; }
    int last_block() const { return own(queries - 1) / BLOCK; }

    void read_queries(const M* q, Term* to) const {
        const int terms = shape.H / I;
        for (int query = 0; query < queries; ++query, to += terms) {
            const M* const from = q + place(query);
            for (int at = 0; at < terms; ++at) to[at] = Held::term(from + at * I);
        }
    }
    long place(int query) const {
        const int row = rows.first + (first + query) / shape.G, group = (first + query) % shape.G;
        return ((long(row) * shape.K + head) * shape.G + group) * shape.H;
    }

    // The queries' attention to one span of blocks.
    void attend(int span, const Term* q, const Partial<A>& partial, A* scratch) const {
        std::fill(partial.out, partial.out + long(queries) * shape.P, A(0));
        std::fill(partial.largest, partial.largest + queries, -INFINITE<A>);
        std::fill(partial.total, partial.total + queries, A(0));
        const int begin = std::max(first_block(), span * SPAN);
        const int end = std::min(last_block(), span * SPAN + SPAN - 1);
        for (int block = begin; block <= end; ++block) {
            if (block < end) fetch(block + 1);
            attend_block(block, q, partial, scratch);
        }
    }

    // The processor follows addresses within a page; where the next block lies only the table knows.
    void fetch(int block) const {
        const long place = long(rows.table[block]) * shape.K + head, row = BLOCK * I * long(sizeof(S));
        const int slots = block == last_block() ? own(queries - 1) % BLOCK + 1 : BLOCK;
        const char* keys = static_cast<const char*>(pages.keys) + place * (shape.H / I) * row;
        const char* values = static_cast<const char*>(pages.values) + place * BLOCK * shape.P * long(sizeof(S));
        for (int h = 0; h < shape.H; h += I, keys += row)
            for (long at = 0; at < slots * I * long(sizeof(S)); at += 64) __builtin_prefetch(keys + at, 0, 2);
        for (long at = 0; at < slots * shape.P * long(sizeof(S)); at += 64) __builtin_prefetch(values + at, 0, 2);
    }

    // Of another tile, which comes next.
    void fetch_first() const { fetch(first_block()); }

    void attend_block(int block, const Term* q, const Partial<A>& partial, A* scratch) const {
        const auto [K, G, H, P] = shape;
        const long place = long(rows.table[block]) * K + head;
        A *scores = scratch, *wide = scratch + long(queries) * BLOCK;
        const int base = block * BLOCK;
        const int from = std::max(0, earliest(0) - base), to = std::min(BLOCK - 1, own(queries - 1) - base);

        std::fill(scores, scores + long(queries) * BLOCK, A(0));
        const auto* keys = static_cast<const Place*>(pages.keys) + place * (H / I) * BLOCK;
        const int end = int(rounded(to + 1, LANES<A>));  // beyond it nothing is seen, nor read
        multiply(q, H / I, keys, BLOCK, H / I, scores, BLOCK, end, wide);
        const float* scales = scaled ? pages.key_scales + place * BLOCK : nullptr;
        for (int query = 0; query < queries; ++query) weigh(query, base, scores + query * BLOCK, scales, partial);
        if constexpr (scaled)
            for (int query = 0; query < queries; ++query)
                for (int slot = from; slot <= to; ++slot)
                    scores[query * BLOCK + slot] *= pages.value_scales[place * BLOCK + slot];
        add_values(place, from, to + 1, reinterpret_cast<const Term*>(scores), partial.out, wide);
    }

    // out += weights · values of slots begin … end - 1
    void add_values(long place, int begin, int end, const Term* weights, A* out, A* wide) const {
        const int P = shape.P;
        const auto* const values = static_cast<const Place*>(pages.values) + place * (BLOCK / I) * P;
        const auto add = [&](int step, int steps, const Place* from) {
            multiply(weights + step, WEIGHTS, from, P, steps, out, P, P, wide);
        };
        if constexpr (I == 1) {
            add(begin, end - begin, values + begin * P);
        } else {  // of a pair that is seen in part the other value counts as zero
            const auto half = [&](int step, Place seen) {
                auto* const one = reinterpret_cast<Place*>(wide);
                for (int p = 0; p < P; ++p) one[p] = values[step * P + p] & seen;
                add(step, 1, one);
            };
            constexpr Place EARLIER = 0x0000ffff, LATER = 0xffff0000;
            const int first = (begin + 1) / I, last = end / I;
            if (begin % I) half(begin / I, LATER);
            if (first < last) add(first, last - first, values + first * P);
            if (end % I) half(last, EARLIER);
        }
    }

    // Where many queries read the same, it is widened once for all of them; the numbers are the same.
    void multiply(const Term* a, long a_row, const Place* b, long b_row, int steps, A* c, long c_row, int width,
                  A* wide) const {
        if constexpr (widened) {
            if (queries > 2 * QUERIES) {
                for (long i = 0; i < long(steps) * b_row; i += LANES<A>) store<A>(wide + i, load<A>(b + i));
                products<SumStep<A, A>, A>(a, a_row, wide, b_row, steps, c, c_row, queries, width);
                return;
            }
        }
        products<Held, A>(a, a_row, b, b_row, steps, c, c_row, queries, width);
    }

    // Scores of one query become weights relative to the largest so far, as does what was summed before.
    void weigh(int query, int base, A* scores, const float* scales, const Partial<A>& partial) const {
        const int from = std::max(0, earliest(query) - base), to = std::min(BLOCK - 1, own(query) - base);
        if (from > to) {  // this query sees nothing here: another of the tile does
            std::fill(scores, scores + BLOCK, A(0));
            return;
        }
        if constexpr (scaled)
            for (int slot = 0; slot < BLOCK; ++slot) scores[slot] *= scales[slot];
        const A scale = A(1) / std::sqrt(A(shape.H)), first_seen = A(from), last_seen = A(to);
        const Vec<A> unseen = Vec<A>{} - INFINITE<A>;
        Vec<A> held[BLOCK / LANES<A>], top = unseen, slots = counting<A>();
        for (int at = 0, v = 0; at < BLOCK; at += LANES<A>, ++v, slots += A(LANES<A>)) {
            held[v] = load<A>(scores + at) * scale;
            held[v] = slots < first_seen ? unseen : held[v];
            held[v] = slots > last_seen ? unseen : held[v];
            top = held[v] > top ? held[v] : top;
        }
        const A largest = std::max(partial.largest[query], largest_of(top));
        Vec<A> sum = {};
        for (int at = 0, v = 0; at < BLOCK; at += LANES<A>, ++v)
            sum += put_weights(scores, at, exponential(held[v] - largest));
        if (largest != partial.largest[query])
            rescale(query, exponential_of<A>(partial.largest[query] - largest), partial);
        partial.largest[query] = largest;
        partial.total[query] += added(sum);
    }

    // Over the scores that they were made of, as products take them.
    static Vec<A> put_weights(A* to, int at, Vec<A> weights) {
        if constexpr (I > 1) weights = rounded_to<S>(weights);
        if constexpr (sizeof(Term) < I * sizeof(A)) store_narrow(reinterpret_cast<S*>(to) + at, weights);
        else store<A>(to + at, weights);
        return weights;
    }

    void rescale(int query, A factor, const Partial<A>& partial) const {
        for (int p = 0; p < shape.P; ++p) partial.out[long(query) * shape.P + p] *= factor;
        partial.total[query] *= factor;
    }

    // Add a later span to what came before it.
    void merge(int span, const Partial<A>& later, const Partial<A>& sofar) const {
        const int begin = span * SPAN * BLOCK, end = begin + SPAN * BLOCK;
        for (int query = 0; query < queries; ++query) {
            if (own(query) < begin || earliest(query) >= end) continue;
            const A largest = std::max(sofar.largest[query], later.largest[query]);
            rescale(query, exponential_of<A>(sofar.largest[query] - largest), sofar);
            rescale(query, exponential_of<A>(later.largest[query] - largest), later);
            const long at = long(query) * shape.P;
            for (int p = 0; p < shape.P; ++p) sofar.out[at + p] += later.out[at + p];
            sofar.total[query] += later.total[query];
            sofar.largest[query] = largest;
        }
    }

    void write(const Partial<A>& partial, M* out) const {
        for (int query = 0; query < queries; ++query) {
            const A* const from = partial.out + long(query) * shape.P;
            M* const to = out + place(query);
            const A total = partial.total[query];
            int h = 0;
            if constexpr (std::is_same_v<A, float>)
                for (; h + LANES<A> <= shape.H; h += LANES<A>) store_narrow(to + h, load<A>(from + h) / total);
            for (; h < shape.H; ++h) to[h] = narrow<M>(from[h] / total);
        }
    }
};

template <class A, class S, class M> struct Call {
    const Pages& pages;
    const Step& step;
    Shape shape;
    const M *q, *k, *v;
    M* out;

    struct Part {
        int rows, first, queries;  // which sequence, its first query, how many
    };
    std::vector<Rows> rows = {};
    std::vector<Part> parts = {};
    double work = 0;        // multiplications
    bool whole = true;      // whether every sequence is one tile
    int most = 1;           // queries of a tile
    int longest_spans = 1;

    Tile<A, S, M> tile(int item) const {
        const Part& part = parts[item / shape.K];
        return {pages, shape, rows[part.rows], step.window, item % shape.K, part.first, part.queries};
    }

    void run() {
        plan();
        const int threads = work > (2.5e5 + 2e4 * step.threads) * least() ? step.threads : 1;
        const int items = int(parts.size()) * shape.K;
        const bool split = threads > items && longest_spans > 1;
        if (!whole || split)
            for_each(int(rows.size()) * shape.K, threads, [&](int item) {
                store_rows<S, M>(pages, shape, rows[item / shape.K], item % shape.K, k, v);
            });
        if (split) attend_split(items, threads);
        else if (whole)
            for_stretches(items, threads, [&](int item) {
                const auto tile = this->tile(item);
                if (item + 1 < items) this->tile(item + 1).fetch_first();
                store_rows<S, M>(pages, shape, rows[item / shape.K], item % shape.K, k, v);
                attend_whole(tile);
            });
        else
            for_each(items, threads, [&](int item) { attend_whole(tile(item)); });
    }

    void plan() {
        int first = 0;
        for (int i = 0; i < step.sequences; ++i) {
            rows.push_back({step.tables + step.offsets[i], step.starts[i], step.counts[i], first});
            first += step.counts[i];
            const int all = step.counts[i] * shape.G, height = std::max(1, TILE / shape.G) * shape.G;
            for (int query = 0; query < all; query += height) {
                parts.push_back({i, query, std::min(height, all - query)});
                most = std::max(most, parts.back().queries);
            }
            whole &= all <= height && all > 0;
            const double seen = std::min(step.window, step.starts[i] + step.counts[i]);
            work += 2.0 * all * seen * shape.K * shape.H;
            longest_spans = std::max(longest_spans, (int(seen) + SPAN * BLOCK - 1) / (SPAN * BLOCK));
        }
        const long row = long(shape.K) * shape.G * shape.H;
        std::memset(static_cast<void*>(out + first * row), 0, size_t((step.rows - first) * row) * sizeof(M));
    }

    long scratch_size() const {
        return long(most) * BLOCK + long(BLOCK) * std::max(shape.H, shape.P) + long(most) * shape.H +
               2 * Partial<A>::size(most, shape.P) + 3 * 64;
    }
    struct Scratch {
        A* work;
        typename SumStep<A, S>::Term* q;
        Partial<A> one, all;
    };
    Scratch scratch() const {
        thread_local Buffer<A> memory;
        A* at = memory.of(scratch_size());
        const auto take = [&](long count) { return std::exchange(at, at + rounded(count, 16)); };
        A* work = take(long(most) * BLOCK + long(BLOCK) * std::max(shape.H, shape.P));
        A* q = take(long(most) * shape.H);
        A* one = take(Partial<A>::size(most, shape.P));
        A* all = take(Partial<A>::size(most, shape.P));
        return {work, reinterpret_cast<typename SumStep<A, S>::Term*>(q), Partial<A>::at(one, most, shape.P), Partial<A>::at(all, most, shape.P)};
    }

    void attend_whole(const Tile<A, S, M>& tile) const {
        const Scratch scratch = this->scratch();
        tile.read_queries(q, scratch.q);
        const int first = tile.first_block() / SPAN, last = tile.last_block() / SPAN;
        if (first == last) {
            tile.attend(first, scratch.q, scratch.all, scratch.work);
        } else {
            start(tile, scratch.all);
            for (int span = first; span <= last; ++span) {
                tile.attend(span, scratch.q, scratch.one, scratch.work);
                tile.merge(span, scratch.one, scratch.all);
            }
        }
        tile.write(scratch.all, out);
    }

    void start(const Tile<A, S, M>& tile, const Partial<A>& all) const {
        std::fill(all.out, all.out + long(tile.queries) * shape.P, A(0));
        std::fill(all.largest, all.largest + tile.queries, -INFINITE<A>);
        std::fill(all.total, all.total + tile.queries, A(0));
    }

    // A long context and few heads: the spans of a tile by different threads, then put together in order.
    void attend_split(int items, int threads) const {
        thread_local Buffer<A> memory;
        const long size = Partial<A>::size(most, shape.P);
        struct Share { int item, span; };
        std::vector<Share> shares;
        std::vector<int> begins;
        for (int item = 0; item < items; ++item) {
            begins.push_back(int(shares.size()));
            const auto tile = this->tile(item);
            for (int span = tile.first_block() / SPAN; span <= tile.last_block() / SPAN; ++span)
                shares.push_back({item, span});
        }
        A* partials = memory.of(size * long(shares.size()));
        for_each(int(shares.size()), threads, [&](int i) {
            const auto tile = this->tile(shares[i].item);
            const Scratch scratch = this->scratch();
            tile.read_queries(q, scratch.q);
            const auto partial = Partial<A>::at(partials + size * i, most, shape.P);
            tile.attend(shares[i].span, scratch.q, partial, scratch.work);
        });
        for_each(items, threads, [&](int item) {
            const auto tile = this->tile(item);
            const Scratch scratch = this->scratch();
            const int first = tile.first_block() / SPAN, last = tile.last_block() / SPAN;
            start(tile, scratch.all);
            for (int span = first; span <= last; ++span) {
                A* later = partials + size * (begins[item] + span - first);
                tile.merge(span, Partial<A>::at(later, most, shape.P), scratch.all);
            }
            tile.write(scratch.all, out);
        });
    }
};

template <class A, class S, class M>
void call(const Pages* pages, const Step* step, const void* q, const void* k, const void* v, void* out,
          int heads) {
    const Shape shape{pages->kv_heads, heads / pages->kv_heads, pages->width, pages->padded};
    const auto *queries = static_cast<const M*>(q), *keys = static_cast<const M*>(k);
    Call<A, S, M>{*pages, *step, shape, queries, keys, static_cast<const M*>(v), static_cast<M*>(out)}.run();
}

}  // namespace

#define ENTRY(name, A, S, M)                                                                              \
    extern "C" void name(const Pages* pages, const Step* step, const void* q, const void* k, const void* v, \
                         void* out, int heads) {                                                            \
        call<A, S, M>(pages, step, q, k, v, out, heads);                                                    \
    }

ENTRY(attend_float32, float, float, float)
ENTRY(attend_bfloat16, float, bfloat16, bfloat16)
ENTRY(attend_float16, float, float16, float16)
ENTRY(attend_float64, double, double, double)
ENTRY(attend_float32_int8, float, int8_t, float)
ENTRY(attend_bfloat16_int8, float, int8_t, bfloat16)
ENTRY(attend_float16_int8, float, int8_t, float16)
ENTRY(attend_float64_int8, double, int8_t, double)

// For tests: e^x.
extern "C" void exponentials(const float* x, float* out, long count) {
    for (long at = 0; at + LANES<float> <= count; at += LANES<float>)
        store<float>(out + at, exponential(load<float>(x + at)));
}
