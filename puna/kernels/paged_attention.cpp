// Attention over blocks of keys and values where they lie; attention.py holds the same in plain torch.
//
// A query row's bits depend on its own query and on the keys and values that it sees, and on nothing else:
// every element of a product is one lane that sums in order, whatever is computed beside it; blocks are those
// of absolute positions, and every SPAN of them is summed apart before it is added to what came before, on one
// thread or on several. Positions that no row of a tile sees are never read as values, and the scores of those
// that one row does not see are set, not added to: what an earlier owner left in a block has no effect.
//
// N query heads, K key/value heads, G = N/K, H head width, P = H rounded up to whole vectors of float.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include "threads.hpp"
#include "vectors.hpp"

namespace {

constexpr int BLOCK = 64;  // positions
constexpr int SPAN = 16;   // blocks summed apart
constexpr int TILE = 64;   // queries of one key/value head that share what is read

// As many accumulators as the registers hold, beside one row of vectors and what is broadcast.
constexpr int QUERIES = BYTES == 32 ? 6 : 4, VECTORS = BYTES == 32 ? 2 : 4;

// --- Arithmetic

// c[q] += Σ a[q][i] · b[i], over i in order, for Q rows of V vectors.
template <class A, class S, int Q, int V>
void product(const A* a, long a_row, const S* b, long b_row, int count, A* c, long c_row) {
    Vec<A> sum[Q][V];
    for (int q = 0; q < Q; ++q)
        for (int v = 0; v < V; ++v) sum[q][v] = load<A>(c + q * c_row + v * LANES<A>);
    for (int i = 0; i < count; ++i) {
        Vec<A> row[V];
        for (int v = 0; v < V; ++v) row[v] = load<A>(b + i * b_row + v * LANES<A>);
        for (int q = 0; q < Q; ++q)
            for (int v = 0; v < V; ++v) sum[q][v] += a[q * a_row + i] * row[v];
    }
    for (int q = 0; q < Q; ++q)
        for (int v = 0; v < V; ++v) store<A>(c + q * c_row + v * LANES<A>, sum[q][v]);
}

template <class A, class S> using Product = void (*)(const A*, long, const S*, long, int, A*, long);

template <class A, class S, int... I>
constexpr Product<A, S> product_of(int which, std::integer_sequence<int, I...>) {
    constexpr Product<A, S> all[] = {product<A, S, I / VECTORS + 1, I % VECTORS + 1>...};
    return all[which];
}

// The same for any number of rows, and any width that is a multiple of the lanes.
template <class A, class S>
void products(const A* a, long a_row, const S* b, long b_row, int count, A* c, long c_row, int rows,
              int width) {
    constexpr int STRIDE = VECTORS * LANES<A>;
    for (int at = 0; at < width; at += STRIDE)
        for (int q = 0; q < rows; q += QUERIES) {
            const int vectors = std::min(STRIDE, width - at) / LANES<A>;
            const int which = (std::min(QUERIES, rows - q) - 1) * VECTORS + vectors - 1;
            product_of<A, S>(which, std::make_integer_sequence<int, QUERIES * VECTORS>{})(
                a + q * a_row, a_row, b + at, b_row, count, c + q * c_row + at, c_row);
        }
}

// --- What a call is given

extern "C" struct Pages {  // one layer's
    void* keys;            // (blocks, K, H, BLOCK)
    void* values;          // (blocks, K, BLOCK, P)
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

// Row (heads of one key/value head) into its place: element h goes to to[h * stride].
template <class S, class M> void store_row(const M* from, int H, S* to, long stride, float* scale) {
    if constexpr (std::is_same_v<S, int8_t>) {
        decltype(widen(*from)) largest = 0;
        for (int h = 0; h < H; ++h) largest = std::max(largest, std::abs(widen(from[h])));
        *scale = float(largest / 127);
        for (int h = 0; h < H; ++h) {
            const auto scaled = *scale > 0 ? std::nearbyint(widen(from[h]) / *scale) : 0;
            to[h * stride] = int8_t(std::max<double>(-127, std::min<double>(127, scaled)));
        }
    } else {
        for (int h = 0; h < H; ++h) to[h * stride] = from[h];
    }
}

struct Rows {  // a sequence's share of a step
    const int32_t* table;
    int start, count, first;  // position of the first row, number of rows, its place in the step
};

template <class S, class M>
void store_rows(const Pages& pages, const Shape& shape, const Rows& rows, int head, const M* k, const M* v) {
    const auto [K, G, H, P] = shape;
    for (int row = 0; row < rows.count; ++row) {
        const int position = rows.start + row, slot = position % BLOCK;
        const long place = long(rows.table[position / BLOCK]) * K + head, scale = place * BLOCK + slot;
        const long from = (long(rows.first + row) * K + head) * H;
        S* key = static_cast<S*>(pages.keys) + place * H * BLOCK + slot;
        S* value = static_cast<S*>(pages.values) + scale * P;
        store_row(k + from, H, key, BLOCK, pages.key_scales + scale);
        store_row(v + from, H, value, 1, pages.value_scales + scale);
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
    const Pages& pages;
    const Shape& shape;
    const Rows& rows;
    int window, head, first, queries;  // queries first … of this sequence and head, counted row by row
    static constexpr bool scaled = std::is_same_v<S, int8_t>;
    static constexpr bool widened = !std::is_same_v<S, A>;

    int own(int query) const { return rows.start + (first + query) / shape.G; }
    int earliest(int query) const { return std::max(0, own(query) - window + 1); }
    int first_block() const { return earliest(0) / BLOCK; }
    int last_block() const { return own(queries - 1) / BLOCK; }

    void read_queries(const M* q, A* to) const {
        const A scale = A(1) / std::sqrt(A(shape.H));
        for (int query = 0; query < queries; ++query)
            for (int h = 0; h < shape.H; ++h) to[query * shape.H + h] = A(widen(q[place(query) + h])) * scale;
    }
    long place(int query) const {
        const int row = rows.first + (first + query) / shape.G, group = (first + query) % shape.G;
        return ((long(row) * shape.K + head) * shape.G + group) * shape.H;
    }

    // The queries' attention to one span of blocks.
    void attend(int span, const A* q, const Partial<A>& partial, A* scratch) const {
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
        const long place = long(rows.table[block]) * shape.K + head;
        const char* keys = static_cast<const char*>(pages.keys) + place * shape.H * BLOCK * sizeof(S);
        const char* values = static_cast<const char*>(pages.values) + place * BLOCK * shape.P * sizeof(S);
        const long key_bytes = long(shape.H * BLOCK * sizeof(S)), value_bytes = long(BLOCK * shape.P * sizeof(S));
        for (long at = 0; at < key_bytes; at += 64) __builtin_prefetch(keys + at, 0, 2);
        for (long at = 0; at < value_bytes; at += 64) __builtin_prefetch(values + at, 0, 2);
    }

    void attend_block(int block, const A* q, const Partial<A>& partial, A* scratch) const {
        const auto [K, G, H, P] = shape;
        const long place = long(rows.table[block]) * K + head;
        A *weights = scratch, *wide = scratch + long(queries) * BLOCK;
        const int base = block * BLOCK;
        const int from = std::max(0, earliest(0) - base), to = std::min(BLOCK - 1, own(queries - 1) - base);

        std::fill(weights, weights + long(queries) * BLOCK, A(0));
        const S* keys = static_cast<const S*>(pages.keys) + place * H * BLOCK;
        multiply(q, H, keys, BLOCK, H, weights, BLOCK, BLOCK, wide);
        const float* scales = scaled ? pages.key_scales + place * BLOCK : nullptr;
        for (int query = 0; query < queries; ++query) weigh(query, base, weights + query * BLOCK, scales, partial);
        if constexpr (scaled)
            for (int query = 0; query < queries; ++query)
                for (int slot = from; slot <= to; ++slot)
                    weights[query * BLOCK + slot] *= pages.value_scales[place * BLOCK + slot];
        const S* values = static_cast<const S*>(pages.values) + (place * BLOCK + from) * P;
        multiply(weights + from, BLOCK, values, P, to - from + 1, partial.out, P, P, wide);
    }

    // Where many queries read the same, it is widened once for all of them; the numbers are the same.
    void multiply(const A* a, long a_row, const S* b, long b_row, int count, A* c, long c_row, int width,
                  A* wide) const {
        if constexpr (widened) {
            if (queries > 2 * QUERIES) {
                for (long i = 0; i < long(count) * b_row; i += LANES<A>) store<A>(wide + i, load<A>(b + i));
                products<A, A>(a, a_row, wide, b_row, count, c, c_row, queries, width);
                return;
            }
        }
        products<A, S>(a, a_row, b, b_row, count, c, c_row, queries, width);
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
        for (int slot = 0; slot < from; ++slot) scores[slot] = -INFINITE<A>;
        for (int slot = to + 1; slot < BLOCK; ++slot) scores[slot] = -INFINITE<A>;

        Vec<A> top = load<A>(scores);
        for (int at = LANES<A>; at < BLOCK; at += LANES<A>) {
            const Vec<A> next = load<A>(scores + at);
            top = next > top ? next : top;
        }
        const A largest = std::max(partial.largest[query], largest_of(top));
        Vec<A> sum = {};
        for (int at = 0; at < BLOCK; at += LANES<A>) {
            const Vec<A> weight = exponential(load<A>(scores + at) - largest);
            store<A>(scores + at, weight);
            sum += weight;
        }
        if (largest != partial.largest[query])
            rescale(query, exponential_of<A>(partial.largest[query] - largest), partial);
        partial.largest[query] = largest;
        partial.total[query] += added(sum);
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
        for (int query = 0; query < queries; ++query)
            for (int h = 0; h < shape.H; ++h)
                out[place(query) + h] = narrow<M>(partial.out[long(query) * shape.P + h] / partial.total[query]);
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
        else
            for_each(items, threads, [&](int item) {
                if (whole) store_rows<S, M>(pages, shape, rows[item / shape.K], item % shape.K, k, v);
                attend_whole(tile(item));
            });
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
        A *work, *q;
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
        return {work, q, Partial<A>::at(one, most, shape.P), Partial<A>::at(all, most, shape.P)};
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
