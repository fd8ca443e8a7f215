// Products of rows with a matrix of whole numbers that lies in panels; integers.py has the same in plain torch.
//
// A row is made whole numbers too, so that terms are added exactly: as many as share a scale, in any order.
// What such groups come to is scaled and added group by group, each operation rounded by itself, on every
// processor alike: a row's bits depend on nothing but the row and the matrix.
//
// R rows   I inputs   O outputs   G inputs of a group

#include <algorithm>
#include <cstdint>
#include <utility>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "fours.hpp"
#include "matrix.hpp"
#include "threads.hpp"
#include "vectors.hpp"

namespace {

constexpr int WIDTH = 32;        // outputs of a panel
constexpr int GROUP = 112;       // rows of one piece of work
constexpr long CHUNK = 1 << 19;  // bytes of the matrix that one thread reads in a row, at most
constexpr long PART = 1 << 13;   // bytes of a panel in turn for all rows, where these are few
constexpr long FEW = 4;          // blocks that are not
constexpr long AHEAD = 1 << 12;  // bytes from what is read to what is fetched
constexpr long SIDE = 64;        // places of each row in turn: what is written stays in the cache
constexpr double LITTLE = 1e6;   // products of numbers: waking other threads for them takes longer

// --- A row as whole numbers

inline void store_bytes(int8_t* to, Vec<int32_t> x) {
#if defined(__AVX512F__)
    const auto small = _mm512_cvtepi32_epi8((__m512i)x);
#else
    const auto small = __builtin_convertvector(x, Narrow<int8_t>);
#endif
    std::memcpy(to, &small, sizeof small);
}

// use(at, numbers of x from there) in vectors; the last is filled up with zeros.
template <class M, class Use> inline void in_vectors(const M* x, long count, const Use& use) {
    long at = 0;
    for (; at + LANES<float> <= count; at += LANES<float>) use(at, load<float>(x + at));
    if (at == count) return;
    M rest[LANES<float>] = {};
    std::copy(x + at, x + count, rest);
    use(at, load<float>(rest));
}

// x ≈ scale · q, to nearest; q has room for a vector more. Where x is not finite the scale is not: q is 0.
template <class M> float make_whole(const M* x, long count, int8_t* q, int32_t& sum) {
    using Bits = Vec<int32_t>;
    const float shift = 12582912.0f;  // 1.5 · 2^23: added, it leaves the nearest integer in the last bits
    Bits largest{}, total{};  // as bits, magnitudes are in order, with NaN last
    in_vectors(x, count, [&](long, Vec<float> part) {
        const Bits bits = bits_as<Bits>(part) & 0x7fffffff;
        largest = bits > largest ? bits : largest;
    });
    const float scale = bits_as<float>(largest_of(largest)) / 127;
    const bool usable = scale > 0 && scale < INFINITE<float>;
    if (!usable) std::fill(q, q + count, int8_t(0));
    else in_vectors(x, count, [&](long at, Vec<float> part) {
        part /= Vec<float>{} + scale;
        part = part > 127.0f ? Vec<float>{} + 127.0f : part;  // a scale below the normal numbers is coarse
        part = part < -127.0f ? Vec<float>{} - 127.0f : part;
        const Bits whole = bits_as<Bits>(part + shift) - bits_as<int32_t>(shift);
        total += whole;
        store_bytes(q + at, whole);
    });
    sum = added(total);
    return scale;
}

// --- Some rows and a panel

// Scales of a matrix, from some place on.
struct Scales {
    const void* from;
    int32_t kind;

    Vec<float> at(long place) const {
        if (kind == 2) return load<float>(static_cast<const float16*>(from) + place);
        if (kind == 3) return load<float>(static_cast<const bfloat16*>(from) + place);
        return load<float>(static_cast<const float*>(from) + place);
    }
    Scales later(long places) const {
        return {static_cast<const char*>(from) + places * (kind == 1 ? 4 : 2), kind};
    }
};

// What is computed together: a part of some rows, and of a panel.
struct Tile {
    const Term* terms;       // (places, FOURS, R)
    const int32_t* starts;   // (groups, R): what sums begin at
    const float* scales;     // (groups, R)
    const uint32_t* places;  // (places, WIDTH)
    Scales factors;          // (groups, WIDTH)
    long groups, length;     // length of a group in places
    const char* ahead;       // what will be read next
    long pace;               // bytes of it to be fetched with each place
    void* sums;              // (R, WIDTH)
};

constexpr int VECTORS = BYTES == 16 ? 4 : 2;
constexpr int SLICE = VECTORS * LANES<float>;  // outputs computed together

template <class Kind, int R>
__attribute__((always_inline)) inline void add_places(
    Sums (&sum)[R][VECTORS], const Term*& x, const uint32_t*& y, const char*& ahead, const Tile& tile) {
    for (long place = 0; place < tile.length; ++place, y += WIDTH, ahead += tile.pace) {
        if constexpr (R > 1) {  // a processor sees by itself what one row reads next
            __builtin_prefetch(ahead);
            __builtin_prefetch(ahead + 64);
        }
#pragma GCC unroll 2
        for (int four = 0; four < Kind::FOURS; ++four, x += R) {
            Weights part[VECTORS];
            for (int v = 0; v < VECTORS; ++v) part[v] = Kind::read(y + v * LANES<float>, four);
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r)
                for (int v = 0; v < VECTORS; ++v) add(sum[r][v], x[r], part[v]);
        }
    }
}

// a + b · c, rounded twice: one rounding where a processor has it would make another number.
inline Vec<float> plus_product(Vec<float> a, Vec<float> b, Vec<float> c) {
    Vec<float> product = b * c;
#if defined(__x86_64__)
    asm("" : "+v"(product));
#elif defined(__aarch64__)
    asm("" : "+w"(product));
#else
    asm("" : "+m"(product));
#endif
    return a + product;
}

// sums[r][o] += Σ over groups in order of scale[r] · factor[o] · Σ x[r] · y[o], for R rows and a slice
template <class Kind, int R> void add_groups(const Tile& given, int slice) {
    const Tile tile = given;  // what is stored cannot change it
    float* const sums = static_cast<float*>(tile.sums) + slice;
    const Term* x = tile.terms;
    const uint32_t* y = tile.places + slice;
    const char* ahead = tile.ahead;
    Vec<float> held[R][VECTORS];  // in registers only where all loops over them are unrolled
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < VECTORS; ++v) held[r][v] = load<float>(sums + r * WIDTH + v * LANES<float>);
    for (long group = 0; group < tile.groups; ++group) {
        Sums sum[R][VECTORS];
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < VECTORS; ++v) sum[r][v] = Sums{} + tile.starts[group * R + r];
        add_places<Kind, R>(sum, x, y, ahead, tile);
        Vec<float> factor[VECTORS];
        for (int v = 0; v < VECTORS; ++v) factor[v] = tile.factors.at(group * WIDTH + slice + v * LANES<float>);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < VECTORS; ++v) {
                const Vec<float> scale = factor[v] * tile.scales[group * R + r];
                const Vec<float> exact = __builtin_convertvector(sum[r][v], Vec<float>);
                held[r][v] = plus_product(held[r][v], exact, scale);
            }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < VECTORS; ++v) store<float>(sums + r * WIDTH + v * LANES<float>, held[r][v]);
}

// sums[r][o] += Σ x[r] · y[o], of a part of the only group
template <class Kind, int R> void add_part(const Tile& tile, int slice) {
    int32_t* const sums = static_cast<int32_t*>(tile.sums) + slice;
    const Term* x = tile.terms;
    const uint32_t* y = tile.places + slice;
    const char* ahead = tile.ahead;
    Sums sum[R][VECTORS];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < VECTORS; ++v) sum[r][v] = load<int32_t>(sums + r * WIDTH + v * LANES<float>);
    add_places<Kind, R>(sum, x, y, ahead, tile);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < VECTORS; ++v) store<int32_t>(sums + r * WIDTH + v * LANES<float>, sum[r][v]);
}

using AddTile = void (*)(const Tile&, int);

template <class Kind, int... I>
constexpr AddTile add_tile(bool whole, int rows, std::integer_sequence<int, I...>) {
    constexpr AddTile groups[] = {add_groups<Kind, I + 1>...}, parts[] = {add_part<Kind, I + 1>...};
    return (whole ? parts : groups)[rows - 1];
}

// --- A call

template <class M> struct Product {
    const Matrix& matrix;
    const M* x;  // (R, I)
    M* out;      // (R, O), stride numbers from one row to the next
    int64_t rows, stride;
    int32_t threads;
};

// What is made of the rows of a call, block by block: see Tile.
struct Made {
    Term* terms;
    int32_t* starts;
    float* scales;
};

template <class Kind, class M> class Work {
    const Product<M>& call;
    const Made made;
    const long groups = call.matrix.inputs / call.matrix.group;
    const long length = call.matrix.group / (4 * Kind::FOURS);  // of a group, in places
    const long places = groups * length, blocks = (call.rows + ROWS - 1) / ROWS;

public:
    Work(const Product<M>& call, const Made& made) : call(call), made(made) {}

    // A block's rows as whole numbers, what a step takes of them put together.
    void make(long which) const {
        thread_local Buffer<int8_t> room;
        const long inputs = call.matrix.inputs, group = call.matrix.group, width = inputs + LANES<float>;
        const Block block = block_of(call.rows, blocks, which);
        int8_t* const q = room.of(block.count * width);
        for (int r = 0; r < block.count; ++r) {
            const M* const x = call.x + (block.first + r) * inputs;
            for (long g = 0; g < groups; ++g) {
                const long at = block.first * groups + g * block.count + r;
                int32_t sum = 0;
                made.scales[at] = make_whole(x + g * group, group, q + r * width + g * group, sum);
                made.starts[at] = -Kind::OFFSET * sum;
            }
        }
        Term* const terms = made.terms + block.first * places * Kind::FOURS;
        for (long first = 0; first < places; first += SIDE)
            for (int r = 0; r < block.count; ++r)
                for (long place = first; place < std::min(places, first + SIDE); ++place)
                    for (int four = 0; four < Kind::FOURS; ++four)
                        terms[(place * Kind::FOURS + four) * block.count + r] =
                            term(Kind::four(q + r * width + place * 4 * Kind::FOURS, four));
    }

    // A panel's outputs for some of the blocks.
    void panel(long which, long begin, long end) const {
        thread_local Buffer<float> room;
        const long first = block_of(call.rows, blocks, begin).first;
        const Block last = block_of(call.rows, blocks, end - 1);
        const long rows = last.first + last.count - first;
        float* const sums = room.of(rows * WIDTH);
        const Scales all{call.matrix.scales, call.matrix.scale_kind};
        const Scales factors = all.later(which * groups * WIDTH);
        if (groups == 1) one_group(which, begin, end, sums, factors);
        else several_groups(which, begin, end, sums, factors);
        for (long r = 0; r < rows; ++r) give(sums + r * WIDTH, first + r, which * WIDTH);
    }

private:
    const uint32_t* places_of(long panel) const {
        return static_cast<const uint32_t*>(call.matrix.panels) + panel * places * WIDTH;
    }

    // count places for each block in turn; groups and factors are those that begin there.
    template <class T> void in_turn(Tile tile, bool whole, long place, long begin, long end, T* sums) const {
        const long first = block_of(call.rows, blocks, begin).first;
        const long group = place / length, count = tile.groups * tile.length;
        tile.pace = WIDTH * 4 / (end - begin);
        for (long at = begin; at < end; ++at) {
            const Block block = block_of(call.rows, blocks, at);
            tile.terms = made.terms + (block.first * places + place * block.count) * Kind::FOURS;
            tile.starts = made.starts + block.first * groups + group * block.count;
            tile.scales = made.scales + block.first * groups + group * block.count;
            tile.ahead = reinterpret_cast<const char*>(tile.places) +
                         (end - begin == 1 ? AHEAD : count * (WIDTH * 4 + (at - begin) * tile.pace));
            tile.sums = sums + (block.first - first) * WIDTH;
            const auto add = add_tile<Kind>(whole, block.count, std::make_integer_sequence<int, ROWS>{});
            for (int slice = 0; slice < WIDTH; slice += SLICE) add(tile, slice);
        }
    }

    void several_groups(long which, long begin, long end, float* sums, Scales factors) const {
        const long most = part(begin, end), step = std::max(1L, most / length);
        std::fill(sums, sums + rows_of(begin, end) * WIDTH, 0.0f);
        for (long group = 0; group < groups; group += step) {
            Tile tile{};
            tile.places = places_of(which) + group * length * WIDTH;
            tile.factors = factors.later(group * WIDTH);
            tile.groups = std::min(step, groups - group);
            tile.length = length;
            in_turn(tile, false, group * length, begin, end, sums);
        }
    }

    void one_group(long which, long begin, long end, float* sums, Scales factors) const {
        const long step = part(begin, end), rows = rows_of(begin, end);
        const long first = block_of(call.rows, blocks, begin).first;
        auto* const whole = reinterpret_cast<int32_t*>(sums);
        for (long r = 0; r < rows; ++r) std::fill_n(whole + r * WIDTH, WIDTH, made.starts[first + r]);
        for (long place = 0; place < places; place += step) {
            Tile tile{};
            tile.places = places_of(which) + place * WIDTH;
            tile.groups = 1;
            tile.length = std::min(step, places - place);
            in_turn(tile, true, place, begin, end, whole);
        }
        for (long r = 0; r < rows; ++r)
            for (int o = 0; o < WIDTH; o += LANES<float>) {
                const auto exact = __builtin_convertvector(load<int32_t>(whole + r * WIDTH + o), Vec<float>);
                const Vec<float> scale = factors.at(o) * made.scales[first + r];
                store<float>(sums + r * WIDTH + o, plus_product(Vec<float>{}, exact, scale));
            }
    }

    long rows_of(long begin, long end) const {
        const Block last = block_of(call.rows, blocks, end - 1);
        return last.first + last.count - block_of(call.rows, blocks, begin).first;
    }

    // Places in turn for all blocks. Some fetch the next part for all where memory takes as long as they do.
    long part(long begin, long end) const {
        return end - begin == 1 || end - begin >= FEW ? places : PART / (WIDTH * 4);
    }

    void give(float* sums, long row, long output) const {
        const long count = std::min<long>(WIDTH, call.matrix.outputs - output);
        if (const M* const bias = static_cast<const M*>(call.matrix.bias))
            for (long o = 0; o < count; ++o) sums[o] += widen(bias[output + o]);
        alignas(64) M small[WIDTH];
        M* to = call.out + row * call.stride + output;
        M* direct = count == WIDTH ? to : small;
        for (int o = 0; o < WIDTH; o += LANES<float>) store_narrow(direct + o, load<float>(sums + o));
        if (direct == small) std::copy(small, small + count, to);
    }
};

template <class Kind, class M> void multiply(const Product<M>& call) {
    thread_local Buffer<Term> terms;
    thread_local Buffer<int32_t> starts;
    thread_local Buffer<float> scales;
    const Matrix& matrix = call.matrix;
    if (call.rows == 0 || matrix.outputs == 0) return;
    const long groups = matrix.inputs / matrix.group;
    const Made made{terms.of(call.rows * matrix.inputs / 4), starts.of(call.rows * groups),
                    scales.of(call.rows * groups)};
    const Work<Kind, M> work(call, made);
    const long blocks = (call.rows + ROWS - 1) / ROWS, panels = (matrix.outputs + WIDTH - 1) / WIDTH;
    const long pieces_of_rows = (call.rows + GROUP - 1) / GROUP;
    const long bytes = matrix.inputs / Kind::FOURS * WIDTH;
    const long chunk = std::max(1L, std::min(CHUNK / bytes, panels / (8 * call.threads)));
    const long chunks = (panels + chunk - 1) / chunk;
    for_each(int(blocks), blocks > 4 ? call.threads : 1, [&](int which) { work.make(which); });
    const double products = double(matrix.inputs) * matrix.outputs * std::max<int64_t>(call.rows, 4);
    const bool little = products < LITTLE * least();
    const int pieces = int(chunks * pieces_of_rows);
    for_stretches(pieces, little ? 1 : call.threads, [&](int piece) {
        const long some = piece % pieces_of_rows, first = piece / pieces_of_rows * chunk;
        for (long panel = first; panel < std::min(panels, first + chunk); ++panel)
            work.panel(panel, blocks * some / pieces_of_rows, blocks * (some + 1) / pieces_of_rows);
    });
}

}  // namespace

#define ENTRY(name, Kind, M)                                                                              \
    extern "C" void name(const Matrix* matrix, const void* x, void* out, int64_t rows, int64_t out_stride, \
                         int32_t threads) {                                                               \
        multiply<Kind, M>(                                                                                \
            {*matrix, static_cast<const M*>(x), static_cast<M*>(out), rows, out_stride, threads});        \
    }

ENTRY(multiply_int8_float32, Int8, float)
ENTRY(multiply_int8_bfloat16, Int8, bfloat16)
ENTRY(multiply_int8_float16, Int8, float16)
ENTRY(multiply_int4_float32, Int4, float)
ENTRY(multiply_int4_bfloat16, Int4, bfloat16)
ENTRY(multiply_int4_float16, Int4, float16)
