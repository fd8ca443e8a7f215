// Causal attention with rotary positions in blocks of queries and keys; causal_plain.py holds the same in torch.
//
// Scores lie turned: a row is a key's, a lane a query's. What a query has of its own (the largest score, the sum,
// where its keys begin) is then a vector, nothing is summed across lanes, and weights lie as the products that
// follow read them. Blocks that no query sees are not computed, and within a block only what stands near the edge
// is: rows by GROUP, queries by SIDE. In bfloat16 weights are rounded for products, whose sums are float32.
//
// Every sum is of one thread's making and in one order, for any number of threads. Of what one query of a group
// does not see the weight is 0, and 0 times what is not finite is NaN.
//
// B rows   T positions   N query heads   K key/value heads, G = N/K   H head width   P = H filled up with zeros
// I = 2 in bfloat16, else 1: numbers of a word

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "heads.hpp"
#include "threads.hpp"
#include "tiles.hpp"
#include "vectors.hpp"

namespace {

constexpr int QUERIES = 256;  // of all heads of a piece of work: what they sum stays in the cache
constexpr int HEADS = 4;      // query heads of such a piece, at most

template <class M> class Forward {
    const Call& call;
    const Sizes<M> size;
    const Sight& sight;
    const long heads, chunk;  // query heads and queries of a piece

public:
    Forward(const Call& call, const Sight& sight)
        : call(call), size(call), sight(sight), heads(std::min<long>(size.G, HEADS)),
          chunk(std::max<long>(BLOCK, floored(QUERIES / heads, BLOCK))) {}

    void run(int threads) const {
        const long parts = (size.G + heads - 1) / heads, chunks = (size.T + chunk - 1) / chunk;
        const long all = call.B * call.K * parts;
        for_each(int(all * chunks), threads, [&](int item) {  // the last chunks see most, and are the first taken
            const long which = item % all, first = item / all * chunk;
            Piece(*this, which / parts / call.K, which / parts % call.K, which % parts * heads, first).run();
        });
    }

private:
    struct Piece {
        const Forward& all;
        const Call& call;
        const Sizes<M>& size;
        const long b, key_head, first_head, count, first, end;
        const int32_t *starts, *ends;
        M *rows, *keys;
        Place<M> *values, *panels, *weights;
        float *scores, *sums, *largest, *totals, *factors;

        Piece(const Forward& all, long b, long key_head, long first_head, long first)
            : all(all), call(all.call), size(all.size), b(b), key_head(key_head), first_head(first_head),
              count(std::min(all.heads, size.G - first_head)), first(first),
              end(std::min(first + all.chunk, size.T)),
              starts(all.sight.starts(b)), ends(all.sight.ends(b)) {
            thread_local Buffer<float> memory;
            const long P = size.P, queries = all.heads * all.chunk;
            const long read = SIDE * P + 2 * BLOCK * P, square = BLOCK * BLOCK, gaps = 256;
            Room room(memory.of(read + queries * (2 * P + 2) + 2 * square + BLOCK + gaps));
            rows = room.take<M>(SIDE * P);
            keys = room.take<M>(BLOCK * P);
            values = room.take<Place<M>>(BLOCK / I<M> * P);
            panels = room.take<Place<M>>(queries * P / I<M>);
            weights = room.take<Place<M>>(BLOCK * BLOCK);
            scores = room.take<float>(BLOCK * BLOCK);
            sums = room.take<float>(queries * P);
            largest = room.take<float>(queries);
            totals = room.take<float>(queries);
            factors = room.take<float>(BLOCK);
        }

        void run() {
            const long queries = count * all.chunk;
            std::fill(sums, sums + queries * size.P, 0.0f);
            std::fill(largest, largest + queries, -INFINITE<float>);
            std::fill(totals, totals + queries, 0.0f);
            for (long h = 0; h < count; ++h) read_queries(h);
            for (long k = floored(starts[first], BLOCK); k < end; k += BLOCK) {
                read_keys(k);
                for (long h = 0; h < count; ++h)
                    for (long q = std::max(first, k); q < end && starts[q] < k + BLOCK; q += BLOCK)
                        attend(h, q, k);
            }
            for (long h = 0; h < count; ++h) write(h);
        }

        long query_head(long h) const { return key_head * size.G + first_head + h; }
        long place(long h, long q) const { return h * all.chunk + q - first; }  // of a query in this piece
        Place<M>* panel(long h, long q) const { return panels + place(h, q) * (size.P / I<M>); }  // of its block

        void read_queries(long h) {
            const auto head = head_of<M>(call, call.q, b, query_head(h), true);
            for (long q = first; q < end; q += SIDE) {
                head.read_rows(q, rows);
                into_panel<M>(rows, size.P, panel(h, floored(q, BLOCK)) + q % BLOCK);
            }
        }

        void read_keys(long k) {
            const auto key = head_of<M>(call, call.k, b, key_head, true);
            const auto value = head_of<M>(call, call.v, b, key_head, false);
            const long begin = std::max(0L, floored(starts[first], SIDE) - k);
            for (long r = begin; r < BLOCK && k + r < end; r += SIDE) {
                key.read_rows(k + r, keys + r * size.P);
                value.read_rows(k + r, rows);
                into_pairs<M>(rows, size.P, values + r / I<M> * size.P);
            }
        }

        // Queries q … and keys k …, a block of each.
        void attend(long h, long q, long k) {
            const Place<M>* const turned = panel(h, q);
            const long last = std::min(q + BLOCK, end), last_key = std::min(k + BLOCK, last);
            for (long key = k; key < last_key; key += GROUP) {
                const long from = std::max(q, floored(key, SIDE));
                const long to = rounded(std::min<long>(last, ends[key + GROUP - 1]), SIDE);
                if (from >= to) continue;
                const Sums score{scores + (key - k) * BLOCK + from - q, BLOCK, true, nullptr};
                multiply<M>({keys + (key - k) * size.P, size.P, I<M>}, {turned + from - q, BLOCK}, size.steps, score,
                            int((to - from) / L));
            }
            for (long from = q; from < last; from += SIDE) weigh(h, q, from, k);
            for (long from = q; from < last; from += GROUP) {
                const long begin = std::max<long>(k, floored(starts[from], I<M>));
                const long step = (begin - k) / I<M>, steps = (std::min(k + BLOCK, from + GROUP) - begin) / I<M>;
                if (steps <= 0) continue;
                const auto* const column = reinterpret_cast<const M*>(weights + step * BLOCK + from - q);
                multiply<M>({column, I<M>, BLOCK * I<M>}, {values + step * size.P, size.P}, steps,
                            {sums + place(h, from) * size.P, size.P, false, factors + from - q}, size.vectors);
            }
        }

        // Scores of SIDE queries become weights relative to the largest so far.
        void weigh(long h, long q, long from, long k) {
            const long begin = std::max<long>(k, floored(starts[from], GROUP));
            const long stop = std::min(k + BLOCK, from + SIDE);
            const bool edge = begin < starts[from + SIDE - 1] || stop - 1 > from;
            for (long query = from; query < from + SIDE; query += L) {
                float* const column = scores - k * BLOCK + query - q;
                if (edge) hide(column, query, begin, stop);
                weigh_vector(place(h, query), query - q, column, begin, stop, k);
            }
        }

        void hide(float* column, long query, long begin, long stop) const {
            const auto own = counting<int32_t>() + int32_t(query), earliest = read<Vec<int32_t>>(starts + query);
            for (long key = begin; key < stop; ++key) {
                const Vec<int32_t> at = Vec<int32_t>{} + int32_t(key), seen = (at <= own) & (at >= earliest);
                const Vec<float> hidden = Vec<float>{} - INFINITE<float>;
                store<float>(column + key * BLOCK, seen ? load<float>(column + key * BLOCK) : hidden);
            }
        }

        void weigh_vector(long at, long lane, const float* column, long begin, long stop, long k) {
            const Vec<float> unseen = Vec<float>{} - INFINITE<float>, before = load<float>(largest + at);
            Vec<float> top = before, total = {}, other = {};
            for (long key = begin; key < stop; ++key) {
                const Vec<float> score = load<float>(column + key * BLOCK);
                top = score > top ? score : top;
            }
            // Where nothing is seen so far all weights are 0, not those of -∞ beside -∞.
            const Vec<float> base = top == unseen ? Vec<float>{} : top;
            for (long key = begin; key < stop; key += 2) {
                const float* const score = column + key * BLOCK;
                const Vec<float> first = power_of_two<M>((load<float>(score) - base) * size.power);
                const Vec<float> second = power_of_two<M>((load<float>(score + BLOCK) - base) * size.power);
                total += first, other += second;
                Place<M>* const place = weights + (key - k) / I<M> * BLOCK + lane;
                if constexpr (I<M> == 2) put_pair(first, second, place);
                else store<float>(place, first), store<float>(place + BLOCK, second);
            }
            const Vec<float> rescaled = power_of_two<M>((before - base) * size.power);
            store<float>(factors + lane, rescaled);
            store<float>(totals + at, load<float>(totals + at) * rescaled + (total + other));
            store<float>(largest + at, top);
        }

        void write(long h) const {
            const auto out = head_of<M>(call, call.out, b, query_head(h), false);
            float* const lse = call.lse + (b * call.N + query_head(h)) * size.T;
            for (long q = first; q < end; ++q) {
                const long at = place(h, q);
                out.write_row(q, sums + at * size.P, 1 / totals[at]);
                lse[q] = largest[at] * size.scale + std::log(totals[at]);
            }
            settle();
        }
    };
};

}  // namespace

extern "C" void attend_float32(const Call* call) { run<Forward, float>(*call); }
extern "C" void attend_bfloat16(const Call* call) { run<Forward, bfloat16>(*call); }
