// The embedding and the layers of a packed model over the rows of a step, and the output projection of some of
// them, in one call.
//
// Nothing is computed here but the residual sums: the rest are the very entries that the modules call one by
// one, so that bits are theirs. What is gained is that no interpreter and no sleeping thread stands between two
// of them.
//
// R rows   D width   F feed-forward width   N query heads   K key/value heads   H head width   V vocabulary

#include <algorithm>
#include <cstdint>

#include "embedding.hpp"
#include "matrix.hpp"
#include "threads.hpp"
#include "vectors.hpp"

namespace {

constexpr double LITTLE = 120000;  // numbers to be added: waking other threads for them takes longer

// --- What a call is given; decoder.py has the same for Python

extern "C" struct Kernels {  // of one number type
    void (*norm)(const void* x, const void* weight, void* out, int64_t R, int64_t D, double eps, int32_t threads);
    void (*turned)(const void* x, const float* cos, const float* sin, void* q, void* k, void* v, int64_t R,
                   int64_t N, int64_t K, int64_t H, int32_t threads);
    void (*attend)(const void* pages, const void* step, const void* q, const void* k, const void* v, void* out,
                   int32_t heads);
    void (*gated)(const void* x, void* out, int64_t R, int64_t F, int32_t threads);
};

extern "C" struct Norm {
    const void* weight;
    double eps;
};

extern "C" struct Product {
    const Matrix* matrix;
    Multiply* multiply;
};

extern "C" struct Linear {  // products whose outputs stand side by side
    const Product* products;
    int64_t count, outputs;
};

extern "C" struct Layer {
    Norm input_norm;
    Linear qkv, o_proj;
    const void* pages;
    Norm post_attention_norm;
    Linear gate_up, down_proj;
};

extern "C" struct Model {
    Kernels kernels;
    Embedding embedding;
    const Layer* layers;
    Norm norm;
    Linear head;
    int64_t D, F, N, K, H;
};

extern "C" struct Rows {
    const int64_t* ids;      // (R,); null: x holds what they are embedded as
    void* x;                 // (R, D); changed by each layer
    const float *cos, *sin;  // (positions, H): rows of both belong to rows of x by `angles`
    const int64_t* angles;   // (R,)
    const void* step;        // whose they are, as attention reads it
    void* hidden;            // (R, D), normalised
    const int64_t* chosen;   // rows that logits are wanted of
    void* logits;            // (C, V)
    int64_t R, C;
    int32_t threads;
};

// --- The pass

template <class M> class Pass {
    const Model& model;
    const Rows& rows;
    const Kernels& call = model.kernels;
    const long R = rows.R, D = model.D, F = model.F, N = model.N, K = model.K, H = model.H;
    const int threads = rows.threads;
    const float *cos, *sin;  // (R, H)
    M *x, *normed, *wide, *q, *k, *v, *mixed;

public:
    Pass(const Model& model, const Rows& rows) : model(model), rows(rows), x(static_cast<M*>(rows.x)) {
        thread_local Buffer<M> memory;
        const long heads = (N + 2 * K) * H, widest = std::max(heads, 2 * F);
        M* at = memory.of(rounded(R * D, 32) + rounded(R * widest, 32) + rounded(R * std::max(heads + N * H, F), 32));
        normed = at, wide = normed + rounded(R * D, 32);
        q = wide + rounded(R * widest, 32), k = q + R * N * H, v = k + R * K * H, mixed = v + R * K * H;
        thread_local Buffer<float> turns;
        float* here = turns.of(2 * R * H);
        cos = gathered(rows.cos, here), sin = gathered(rows.sin, here + R * H);
    }

    void embed() {
        for (long row = 0; row < R; ++row) ::embed(model.embedding, rows.ids[row], x + row * D);
    }

    void layer(const Layer& layer) {
        norm(layer.input_norm, x, normed);
        multiply(layer.qkv, normed, wide);
        call.turned(wide, cos, sin, q, k, v, R, N, K, H, threads);
        call.attend(layer.pages, rows.step, q, k, v, mixed, int32_t(N));
        multiply(layer.o_proj, mixed, normed);
        add(normed);
        norm(layer.post_attention_norm, x, normed);
        multiply(layer.gate_up, normed, wide);
        M* gated = q;
        call.gated(wide, gated, R, F, threads);
        multiply(layer.down_proj, gated, normed);
        add(normed);
    }

    void end() {
        M* hidden = static_cast<M*>(rows.hidden);
        norm(model.norm, x, hidden);
        if (rows.C == 0) return;
        for (long c = 0; c < rows.C; ++c) {
            const M* from = hidden + rows.chosen[c] * D;
            std::copy(from, from + D, normed + c * D);
        }
        multiply(model.head, normed, static_cast<M*>(rows.logits), rows.C);
    }

private:
    const float* gathered(const float* from, float* to) const {
        for (long row = 0; row < R; ++row) std::copy_n(from + rows.angles[row] * H, H, to + row * H);
        return to;
    }

    void norm(const Norm& norm, const M* from, M* to) {
        call.norm(from, norm.weight, to, R, D, norm.eps, threads);
    }

    void multiply(const Linear& linear, const M* from, M* to) { multiply(linear, from, to, R); }
    void multiply(const Linear& linear, const M* from, M* to, long count) {
        for (long part = 0; part < linear.count; ++part) {
            const Product& product = linear.products[part];
            product.multiply(product.matrix, from, to, count, linear.outputs, threads);
            to += product.matrix->outputs;
        }
    }

    // x += y, rounded to their type
    void add(const M* y) {
        constexpr long L = LANES<float>, PIECE = 64 * L;
        const long count = R * D, pieces = (count + PIECE - 1) / PIECE;
        M* to = x;
        for_each(int(pieces), double(count) < LITTLE * least() ? 1 : threads, [=](int piece) {
            long at = piece * PIECE;
            const long end = std::min(count, at + PIECE);
            for (; at + L <= end; at += L) store_narrow(to + at, load<float>(to + at) + load<float>(y + at));
            for (; at < end; ++at) to[at] = narrow<M>(widen(to[at]) + widen(y[at]));
        });
    }
};

template <class M> struct Call {
    const Model& model;
    const Rows& rows;
    long first, last;
    bool ends;
    static void run(void* self) {
        const auto& call = *static_cast<const Call*>(self);
        Pass<M> pass(call.model, call.rows);
        if (call.first == 0 && call.rows.ids) pass.embed();
        for (long layer = call.first; layer < call.last; ++layer) pass.layer(call.model.layers[layer]);
        if (call.ends) pass.end();
    }
};

template <class M> void decode(const Model* model, const Rows* rows, long first, long last, bool ends) {
    Call<M> call{*model, *rows, first, last, ends};
    if (with_team) with_team(Call<M>::run, &call, rows->threads);
    else Call<M>::run(&call);
}

}  // namespace

// Layers first … last - 1, before the first one the embedding, and where it `ends` what comes after the last one.
#define ENTRY(name, M)                                                                                 \
    extern "C" void name(const Model* model, const Rows* rows, int64_t first, int64_t last, int32_t ends) { \
        decode<M>(model, rows, first, last, ends != 0);                                                 \
    }

ENTRY(decode_float32, float)
ENTRY(decode_bfloat16, bfloat16)
ENTRY(decode_float16, float16)
