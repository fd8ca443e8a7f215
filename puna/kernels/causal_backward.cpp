// Gradients of causal attention with rotary positions; causal_plain.py holds the same in torch.
//
// Weights are computed again, from the logarithms of their sums. As in causal.cpp a row of scores is a key's, a
// lane a query's, and what no query sees is not computed. In bfloat16 weights and gradients of scores are rounded
// for products, whose sums are float32.
//
// Every sum is put together in one order, for any number of threads.
//
// B rows   T positions   N query heads   K key/value heads, G = N/K   H head width   P = H filled up with zeros
// I = 2 in bfloat16, else 1: numbers of a word

#include <algorithm>
#include <cstdint>

#include "heads.hpp"
#include "threads.hpp"
#include "tiles.hpp"
#include "vectors.hpp"

namespace {

template <class M> class Backward {
    const Call& call;
    const Sizes<M> size;
    const Sight& sight;
    const long chunk;  // queries, and keys, that are read together

public:
    // Fewer where there is little, so that all threads have some.
    Backward(const Call& call, const Sight& sight)
        : call(call), size(call), sight(sight),
          chunk(call.B * call.K < 8 && call.B * call.K * call.T < 1 << 14 ? 128 : 256) {}

    // By heads, where threads wait for each other a fifth of the time at most, since what is read then stays in
    // the cache. Either way every sum has its terms in the same order.
    void run(int threads) const {
        const long heads = call.B * call.K, rounds = (heads + threads - 1) / threads;
        if (heads * 5 >= rounds * threads * 4 || size.T <= chunk)
            for_each(int(heads), threads, [&](int head) { by_head(head); });
        else
            in_chunks(threads);
    }

private:
    // A key/value head by itself: its queries chunk by chunk, each with the chunks of keys that it sees, the
    // nearest first, as in_chunks does it.
    void by_head(long item) const {
        thread_local Buffer<float> memory;
        const long chunks = (size.T + chunk - 1) / chunk, part = chunk * size.P;
        const long b = item / call.K, key_head = item % call.K;
        float* const dq = memory.of((1 + 2 * chunks) * part);
        float *const dk = dq + part, *const dv = dk + chunks * part;
        Piece piece(*this, b, key_head);
        for (long i = 0, written = 0; i < chunks; ++i) {
            std::fill(dk + i * part, dk + (i + 1) * part, 0.0f);
            std::fill(dv + i * part, dv + (i + 1) * part, 0.0f);
            for (long g = 0; g < size.G; ++g) {
                std::fill(dq, dq + part, 0.0f);
                piece.read_queries(g, i * chunk);
                for (long j = i; j >= 0 && sees(b, i, j); --j) {
                    piece.read_keys(j * chunk, i * chunk);
                    piece.add(dq, dk + j * part, dv + j * part);
                }
                piece.write(call.dq, key_head * size.G + g, dq, i * chunk);
            }
            for (; written <= i && (i + 1 == chunks || !sees(b, i + 1, written)); ++written) {
                piece.write(call.dk, key_head, dk + written * part, written * chunk);
                piece.write(call.dv, key_head, dv + written * part, written * chunk);
            }
        }
    }

    // Chunks of queries with chunks of keys that lie the same distance back, all at once: no two of them add
    // to the same sums. Then those of the next distance.
    void in_chunks(int threads) const {
        thread_local Buffer<float> memory;
        const long chunks = (size.T + chunk - 1) / chunk, part = chunks * chunk * size.P;
        const long heads = call.B * call.K, most = std::min<long>(heads, (MANY + chunks - 1) / chunks);
        float* const sums = memory.of(most * (size.G + 2) * part);
        for (long first = 0; first < heads; first += most) {
            const long some = std::min(most, heads - first);
            const auto sums_of = [&](long item, long which, long at) {  // dq of each query head, dk, dv
                return sums + ((item % most) * (size.G + 2) + which) * part + at * chunk * size.P;
            };
            for_each(int(some * chunks), threads, [&](int at) {
                for (long which = 0; which < size.G + 2; ++which) {
                    float* const begin = sums_of(at % some, which, at / some);
                    std::fill(begin, begin + chunk * size.P, 0.0f);
                }
            });
            for (long back = 0; back < chunks; ++back) {
                if (!any_sees(back)) continue;
                for_each(int(some * (chunks - back)), threads, [&](int at) {
                    const long head = first + at % some, i = at / some + back, j = i - back;
                    if (!sees(head / call.K, i, j)) return;
                    Piece piece(*this, head / call.K, head % call.K);
                    piece.read_keys(j * chunk, i * chunk);
                    for (long g = 0; g < size.G; ++g) {
                        piece.read_queries(g, i * chunk);
                        piece.add(sums_of(at % some, g, i), sums_of(at % some, size.G, j),
                                  sums_of(at % some, size.G + 1, j));
                    }
                });
            }
            for_each(int(some * chunks), threads, [&](int at) {
                const long head = first + at % some, i = at / some, b = head / call.K, key_head = head % call.K;
                const Piece piece(*this, b, key_head);
                for (long g = 0; g < size.G; ++g)
                    piece.write(call.dq, key_head * size.G + g, sums_of(at % some, g, i), i * chunk);
                piece.write(call.dk, key_head, sums_of(at % some, size.G, i), i * chunk);
                piece.write(call.dv, key_head, sums_of(at % some, size.G + 1, i), i * chunk);
            });
        }
    }

    static constexpr long MANY = 64;  // chunks that are worked on together, or those of one head

    bool sees(long b, long i, long j) const { return sight.starts(b)[i * chunk] < (j + 1) * chunk; }
    bool any_sees(long back) const {
        const long chunks = (size.T + chunk - 1) / chunk;
        for (long b = 0; b < (call.start_row ? call.B : 1); ++b)
            for (long i = back; i < chunks; ++i)
                if (sees(b, i, i - back)) return true;
        return false;
    }

    // Queries of a chunk with the keys of one.
    struct Piece {
        const Call& call;
        const Sizes<M>& size;
        const long b, key_head, chunk;
        const int32_t *starts, *ends;
        long first = -1, end = -1, first_key = -1, end_key = -1;
        M *rows, *keys, *values, *weights, *gradients;
        Place<M> *key_pairs, *query_panels, *grad_panels, *query_pairs, *grad_pairs, *gradient_pairs;
        float *scores, *slopes, *logs, *means;

        Piece(const Backward& all, long b, long key_head)
            : call(all.call), size(all.size), b(b), key_head(key_head), chunk(all.chunk),
              starts(all.sight.starts(b)), ends(all.sight.ends(b)) {
            thread_local Buffer<float> memory;
            const long many = chunk * size.P;
            const long squares = 3 * BLOCK * BLOCK + 2 * GROUP * BLOCK, gaps = 256;
            Room room(memory.of(SIDE * size.P + 7 * many + squares + 2 * chunk + gaps));
            rows = room.take<M>(SIDE * size.P);
            keys = room.take<M>(many);
            values = room.take<M>(many);
            key_pairs = room.take<Place<M>>(many / I<M>);
            query_panels = room.take<Place<M>>(many / I<M>);
            grad_panels = room.take<Place<M>>(many / I<M>);
            query_pairs = room.take<Place<M>>(many / I<M>);
            grad_pairs = room.take<Place<M>>(many / I<M>);
            weights = room.take<M>(BLOCK * BLOCK);
            gradients = room.take<M>(BLOCK * BLOCK);
            gradient_pairs = room.take<Place<M>>(BLOCK * BLOCK / I<M>);
            scores = room.take<float>(GROUP * BLOCK);
            slopes = room.take<float>(GROUP * BLOCK);
            logs = room.take<float>(chunk);
            means = room.take<float>(chunk);
        }

        // Of the chunk that begins at `from`, those that some query from `query` on sees.
        void read_keys(long from, long query) {
            if (first_key == from) return;  // again the queries' own chunk, read whole for another query head
            first_key = from, end_key = std::min(from + chunk, size.T);
            const auto key = head_of<M>(call, call.k, b, key_head, true);
            const auto value = head_of<M>(call, call.v, b, key_head, false);
            for (long k = std::max(first_key, floored(starts[query], SIDE)); k < end_key; k += SIDE) {
                const long at = (k - first_key) * size.P;
                key.read_rows(k, keys + at);
                into_pairs<M>(keys + at, size.P, key_pairs + at / I<M>);
                value.read_rows(k, values + at);
            }
        }

        void read_queries(long g, long from) {
            first = from, end = std::min(from + chunk, size.T);
            const long which = key_head * size.G + g;
            const auto query = head_of<M>(call, call.q, b, which, true);
            const auto out = head_of<M>(call, call.out, b, which, false);
            const auto grad = head_of<M>(call, call.grad, b, which, false);
            const float* const lse = call.lse + (b * call.N + which) * size.T;
            for (long q = first; q < end; q += SIDE) {
                const long at = (q - first) * size.P / I<M>;
                const long panel = floored(q - first, BLOCK) * size.P / I<M> + q % BLOCK;
                query.read_rows(q, rows);
                into_panel<M>(rows, size.P, query_panels + panel);
                into_pairs<M>(rows, size.P, query_pairs + at);
                grad.read_rows(q, rows);
                into_panel<M>(rows, size.P, grad_panels + panel);
                into_pairs<M>(rows, size.P, grad_pairs + at);
                for (int r = 0; r < SIDE; ++r) {  // beyond the last query nothing is seen
                    const bool real = q + r < size.T;
                    logs[q - first + r] = real ? lse[q + r] * 1.44269504f : 0.0f;
                    means[q - first + r] = real ? product(rows + r * size.P, out.row(q + r)) : 0.0f;
                }
            }
        }

        // Adds what the queries and the keys give each other.
        void add(float* dq, float* dk, float* dv) {
            for (long k = first_key; k < end_key; k += BLOCK)
                for (long q = std::max(first, k); q < end && starts[q] < k + BLOCK; q += BLOCK)
                    attend(q, k, dq, dk, dv);
        }

        void write(const Heads& to, long which, const float* sums, long begin) const {
            const bool values = &to == &call.dv;
            const auto head = head_of<M>(call, to, b, which, !values);
            for (long t = begin; t < std::min(begin + chunk, size.T); ++t)
                head.write_row(t, sums + (t - begin) * size.P, values ? 1.0f : size.scale);
            settle();
        }

    private:
        float product(const M* a, const M* b) const {
            Vec<float> sum = {};
            long h = 0;
            for (; h + L <= size.H; h += L) sum += load<float>(a + h) * load<float>(b + h);
            float rest = 0;
            for (; h < size.H; ++h) rest += widen(a[h]) * widen(b[h]);
            return added(sum) + rest;
        }

        void attend(long q, long k, float* dq, float* dk, float* dv) {
            const long stop = std::min(q + BLOCK, end), stop_key = std::min({k + BLOCK, end_key, stop});
            for (long key = k; key < stop_key; key += GROUP) {
                const long from = std::max(q, floored(key, SIDE));
                const long to = rounded(std::min<long>(stop, ends[key + GROUP - 1]), SIDE);
                if (from < to) differentiate(key, key - k, q, from, to);
            }
            add_to_keys(q, k, stop, stop_key, dk, dv);
            add_to_queries(q, k, stop, dq);
        }

        void add_to_keys(long q, long k, long stop, long stop_key, float* dk, float* dv) const {
            const long P = size.P;
            for (long key = k; key < stop_key; key += GROUP) {
                const long from = std::max(q, key), to = std::min<long>(stop, ends[key + GROUP - 1]);
                if (from >= to) continue;
                const long at = (key - k) * BLOCK + from - q, steps = (to - from + I<M> - 1) / I<M>;
                const long row = (key - first_key) * P, other = (from - first) / I<M> * P;
                multiply<M>({weights + at, BLOCK, I<M>}, {grad_pairs + other, P}, steps,
                            {dv + row, P, false, nullptr}, size.vectors);
                multiply<M>({gradients + at, BLOCK, I<M>}, {query_pairs + other, P}, steps,
                            {dk + row, P, false, nullptr}, size.vectors);
            }
        }

        void add_to_queries(long q, long k, long stop, float* dq) const {
            const long P = size.P;
            const M* const pairs = I<M> == 1 ? gradients : reinterpret_cast<const M*>(gradient_pairs);
            for (long from = q; from < stop; from += GROUP) {
                const long begin = std::max<long>(k, floored(starts[from], I<M>));
                const long steps = (std::min(k + BLOCK, from + GROUP) - begin) / I<M>;
                if (steps <= 0) continue;
                const M* const column = pairs + ((begin - k) / I<M> * BLOCK + from - q) * I<M>;
                multiply<M>({column, I<M>, BLOCK * I<M>}, {key_pairs + (begin - first_key) / I<M> * P, P}, steps,
                            {dq + (from - first) * P, P, false, nullptr}, size.vectors);
            }
        }

        // Weights, and gradients of scores, of GROUP keys and queries from … to of the block at q.
        void differentiate(long key, long at, long q, long from, long to) {
            const long panel = (q - first) * size.P / I<M> + from - q, row = (key - first_key) * size.P;
            const int vectors = int((to - from) / L);
            multiply<M>({keys + row, size.P, I<M>}, {query_panels + panel, BLOCK}, size.steps,
                        {scores + from - q, BLOCK, true, nullptr}, vectors);
            multiply<M>({values + row, size.P, I<M>}, {grad_panels + panel, BLOCK}, size.steps,
                        {slopes + from - q, BLOCK, true, nullptr}, vectors);
            for (long query = from; query < to; query += L) {
                const bool edge = key + GROUP - 1 > query || key < starts[query + L - 1];
                if (edge) differentiate_vector<true>(key, at, q, query);
                else differentiate_vector<false>(key, at, q, query);
            }
        }

        template <bool EDGE> void differentiate_vector(long key, long at, long q, long query) {
            const Vec<float> log = load<float>(logs + query - first), mean = load<float>(means + query - first);
            const auto own = counting<int32_t>() + int32_t(query), earliest = read<Vec<int32_t>>(starts + query);
            for (int r = 0; r < GROUP; r += 2) {
                Vec<float> gradient[2];
                for (int i = 0; i < 2; ++i) {
                    const long place = (r + i) * BLOCK + query - q;
                    Vec<float> weight = power_of_two<M>(load<float>(scores + place) * size.power - log);
                    gradient[i] = weight * (load<float>(slopes + place) - mean);
                    if constexpr (EDGE) {
                        const Vec<int32_t> here = Vec<int32_t>{} + int32_t(key + r + i);
                        const Vec<int32_t> seen = (here <= own) & (here >= earliest);
                        weight = seen ? weight : Vec<float>{};
                        gradient[i] = seen ? gradient[i] : Vec<float>{};
                    }
                    store_narrow(weights + at * BLOCK + place, weight);
                    store_narrow(gradients + at * BLOCK + place, gradient[i]);
                }
                if constexpr (I<M> == 2)
                    put_pair(gradient[0], gradient[1], gradient_pairs + (at + r) / 2 * BLOCK + query - q);
            }
        }
    };
};

}  // namespace

extern "C" void attend_backward_float32(const Call* call) { run<Backward, float>(*call); }
extern "C" void attend_backward_bfloat16(const Call* call) { run<Backward, bfloat16>(*call); }
