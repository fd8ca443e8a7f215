// Attention over blocks of keys and values where they lie; attention.py holds the same in plain torch.
//
// A query row's bits depend on its own query and on the keys and values that it sees, and on nothing else:
// every element of a product is one lane that sums in order, whatever is computed beside it; blocks are those
// of absolute positions, and every SPAN of them is summed apart before it is added to what came before, on one
// thread or on several. Positions that no row of a tile sees are never read as values, and the scores of those
// that one row does not see are set, not added to: what an earlier owner left in a block has no effect.
//
// N query heads, K key/value heads, G = N/K, H head width, P = H rounded up to whole vectors of float.
// A vector is a GCC vector extension, so that one source serves every processor.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace {

constexpr int BLOCK = 64;  // positions
constexpr int SPAN = 16;   // blocks summed apart
constexpr int TILE = 64;   // queries of one key/value head that share what is read

// As many accumulators as the registers hold, beside one row of vectors and what is broadcast.
#if defined(__AVX512F__)
constexpr int BYTES = 64, QUERIES = 4, VECTORS = 4;
#elif defined(__AVX__)
constexpr int BYTES = 32, QUERIES = 6, VECTORS = 2;
#else
constexpr int BYTES = 16, QUERIES = 4, VECTORS = 4;
#endif

struct bfloat16 { uint16_t bits; };
struct float16 { uint16_t bits; };

template <class T> struct Vector { typedef T type __attribute__((vector_size(BYTES))); };
template <class T> using Vec = typename Vector<T>::type;
template <class A> constexpr int LANES = BYTES / int(sizeof(A));

// As many small numbers as there are lanes of float.
template <class T> struct NarrowVector { typedef T type __attribute__((vector_size(BYTES / 4 * sizeof(T)))); };
template <class T> using Narrow = typename NarrowVector<T>::type;

template <class To, class From> inline To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From), "a reinterpretation keeps the size");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

template <class V> inline V read(const void* from) {
    V found;
    std::memcpy(&found, from, sizeof found);
    return found;
}

// --- Number types

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(bfloat16 x) { return bits_as<float>(uint32_t(x.bits) << 16); }
inline float widen(float16 x) {
    const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13, sign = uint32_t(x.bits & 0x8000) << 16;
    uint32_t wide = magnitude + (112u << 23);  // the exponent's bias is 15 there and 127 here
    if (magnitude >= 0x7c00u << 13) wide += 112u << 23;  // infinity and NaN
    if (magnitude < 1u << 23)  // zero and subnormal: the leading bit that is implied is taken away again
        wide = bits_as<uint32_t>(bits_as<float>(wide + (1u << 23)) - bits_as<float>(113u << 23));
    return bits_as<float>(wide | sign);
}

template <class M> inline M narrow(double x) { return M(x); }
template <> inline bfloat16 narrow<bfloat16>(double x) {
    const uint32_t bits = bits_as<uint32_t>(float(x));
    if ((bits & 0x7fffffff) > 0x7f800000) return {uint16_t(bits >> 16 | 0x40)};  // NaN stays NaN
    return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};  // to nearest, ties to even
}
template <> inline float16 narrow<float16>(double x) {
    const uint32_t bits = bits_as<uint32_t>(float(x));
    const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return {uint16_t(sign | 0x7e00)};
    if (magnitude >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // from 65520 on: infinity
    if (magnitude < 113u << 23) {  // subnormal: adding 1/2 puts the last bit that stays at the float's end
        const float rounded = bits_as<float>(magnitude) + 0.5f;
        return {uint16_t(sign | (bits_as<uint32_t>(rounded) - bits_as<uint32_t>(0.5f)))};
    }
    return {uint16_t(sign | ((magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13))};
}

// Small numbers read as wide ones. GCC takes a vector conversion apart on x86: there it is one instruction.
#if defined(__AVX512F__)
inline Vec<uint32_t> read_wide(const uint16_t* from) {
    return bits_as<Vec<uint32_t>>(_mm512_cvtepu16_epi32(read<__m256i>(from)));
}
inline Vec<int32_t> read_wide(const int8_t* from) {
    return bits_as<Vec<int32_t>>(_mm512_cvtepi8_epi32(read<__m128i>(from)));
}
inline Vec<float> read_half(const float16* from) {
    return bits_as<Vec<float>>(_mm512_cvtph_ps(read<__m256i>(from)));
}
#elif defined(__AVX2__) && defined(__F16C__)
inline Vec<uint32_t> read_wide(const uint16_t* from) {
    return bits_as<Vec<uint32_t>>(_mm256_cvtepu16_epi32(read<__m128i>(from)));
}
inline Vec<int32_t> read_wide(const int8_t* from) {
    return bits_as<Vec<int32_t>>(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(read<long long>(from))));
}
inline Vec<float> read_half(const float16* from) {
    return bits_as<Vec<float>>(_mm256_cvtph_ps(read<__m128i>(from)));
}
#else
inline Vec<uint32_t> read_wide(const uint16_t* from) {
    return __builtin_convertvector(read<Narrow<uint16_t>>(from), Vec<uint32_t>);
}
inline Vec<int32_t> read_wide(const int8_t* from) {
    return __builtin_convertvector(read<Narrow<int8_t>>(from), Vec<int32_t>);
}
inline Vec<float> read_half(const float16* from) {
    Vec<float> found;
    for (int lane = 0; lane < LANES<float>; ++lane) found[lane] = widen(from[lane]);
    return found;
}
#endif

template <class A> inline Vec<A> load(const A* from) { return read<Vec<A>>(from); }
template <class A> inline Vec<A> load(const bfloat16* from) {
    return bits_as<Vec<float>>(read_wide(reinterpret_cast<const uint16_t*>(from)) << 16);
}
template <class A> inline Vec<A> load(const float16* from) { return read_half(from); }
template <class A> inline Vec<A> load(const int8_t* from) {
    if constexpr (std::is_same_v<A, float>) {
        return __builtin_convertvector(read_wide(from), Vec<float>);
    } else {
        Vec<A> found;
        for (int lane = 0; lane < LANES<A>; ++lane) found[lane] = from[lane];
        return found;
    }
}
template <class A> inline void store(A* to, Vec<A> x) { std::memcpy(to, &x, sizeof x); }

// --- Arithmetic

inline Vec<float> exponential(Vec<float> x) {
    // 2^n · e^r with |r| ≤ ln 2 / 2, where the series up to r^7 is exact to 6e-9. NaN stays NaN, and what is
    // below the normal numbers becomes 0.
    using Bits = Vec<int32_t>;
    const float shift = 12582912.0f;  // 1.5 · 2^23: added, it leaves the nearest integer in the last bits
    const Vec<float> shifted = x * 1.44269504f + shift;
    const Vec<float> n = shifted - shift;
    const Vec<float> r = (x - n * 0.693359375f) - n * -2.12194440e-4f;  // ln 2 in two parts
    Vec<float> sum = r * (1.0f / 5040) + 1.0f / 720;
    sum = sum * r + 1.0f / 120;
    sum = sum * r + 1.0f / 24;
    sum = sum * r + 1.0f / 6;
    sum = sum * r + 0.5f;
    sum = sum * r + 1.0f;
    sum = sum * r + 1.0f;
    const Bits power = (bits_as<Bits>(shifted) - bits_as<int32_t>(shift) + 127) << 23;
    const Bits vanished = x < -87.3f;
    return bits_as<Vec<float>>(~vanished & bits_as<Bits>(sum * bits_as<Vec<float>>(power)));
}
inline Vec<double> exponential(Vec<double> x) {
    for (int lane = 0; lane < LANES<double>; ++lane) x[lane] = std::exp(x[lane]);
    return x;
}
template <class A> inline A exponential_of(A x) { return exponential(Vec<A>{} + x)[0]; }

// All lanes put together by halves, in one order for every caller.
template <class V, class Two> inline auto fold(V x, const Two& two) {
    using A = std::decay_t<decltype(x[0])>;
    if constexpr (sizeof(V) == 2 * sizeof(A)) {
        return two(x[0], x[1]);
    } else {
        typedef A Half __attribute__((vector_size(sizeof(V) / 2)));
        Half halves[2];
        std::memcpy(halves, &x, sizeof x);
        return fold(two(halves[0], halves[1]), two);
    }
}

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

// --- Threads

using Fork = void (*)(void (*)(void*), void*, unsigned, unsigned);
Fork fork_threads = nullptr;  // GOMP_parallel of the runtime that torch has loaded: one pool for both

template <class Work> struct Queue {
    std::atomic<int> taken{0};
    int size;
    const Work& work;
    static void run(void* self) {
        auto& queue = *static_cast<Queue*>(self);
        // The last come first: those of a prompt see the most keys, and would otherwise be waited for.
        for (int i; (i = queue.taken++) < queue.size;) queue.work(queue.size - 1 - i);
    }
};

template <class Work> void for_each(int size, int threads, const Work& work) {
    Queue<Work> queue{{}, size, work};
    if (threads > 1 && size > 1 && fork_threads) fork_threads(Queue<Work>::run, &queue, unsigned(threads), 0);
    else Queue<Work>::run(&queue);
}

template <class T> T* aligned(std::vector<char>& memory, size_t count) {
    memory.resize(std::max(memory.size(), count * sizeof(T) + 64));
    const auto address = reinterpret_cast<uintptr_t>(memory.data());
    return reinterpret_cast<T*>((address + 63) / 64 * 64);
}

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
        std::fill(partial.largest, partial.largest + queries, -std::numeric_limits<A>::infinity());
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
        const A nothing = -std::numeric_limits<A>::infinity();
        for (int slot = 0; slot < from; ++slot) scores[slot] = nothing;
        for (int slot = to + 1; slot < BLOCK; ++slot) scores[slot] = nothing;

        Vec<A> top = load<A>(scores);
        for (int at = LANES<A>; at < BLOCK; at += LANES<A>) {
            const Vec<A> next = load<A>(scores + at);
            top = next > top ? next : top;
        }
        const auto larger = [](auto a, auto b) { return a > b ? a : b; };
        const A largest = larger(fold(top, larger), partial.largest[query]);
        Vec<A> sum = {};
        for (int at = 0; at < BLOCK; at += LANES<A>) {
            const Vec<A> weight = exponential(load<A>(scores + at) - largest);
            store<A>(scores + at, weight);
            sum += weight;
        }
        if (largest != partial.largest[query])
            rescale(query, exponential_of<A>(partial.largest[query] - largest), partial);
        partial.largest[query] = largest;
        partial.total[query] += fold(sum, [](auto a, auto b) { return a + b; });
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
        // Waking a team costs microseconds, more for a large one; and its size never changes, since that
        // would make the runtime end threads and start others.
        const int threads = work > 2.5e5 + 2e4 * step.threads ? step.threads : 1;
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
        thread_local std::vector<char> memory;
        A* at = aligned<A>(memory, size_t(scratch_size()));
        const auto take = [&](long count) { return std::exchange(at, at + (count + 15) / 16 * 16); };
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
        std::fill(all.largest, all.largest + tile.queries, -std::numeric_limits<A>::infinity());
        std::fill(all.total, all.total + tile.queries, A(0));
    }

    // A long context and few heads: the spans of a tile by different threads, then put together in order.
    void attend_split(int items, int threads) const {
        thread_local std::vector<char> memory;
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
        A* partials = aligned<A>(memory, size_t(size) * shares.size());
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

extern "C" void use_threads(void* fork) { fork_threads = reinterpret_cast<Fork>(fork); }

// For tests: e^x.
extern "C" void exponentials(const float* x, float* out, long count) {
    for (long at = 0; at + LANES<float> <= count; at += LANES<float>)
        store<float>(out + at, exponential(load<float>(x + at)));
}
