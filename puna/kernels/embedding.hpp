// A token's row of an embedding, from wherever it lies: as a matrix, or as one of the outputs of panels.

#pragma once

#include <cstdint>
#include <cstring>

#include "matrix.hpp"
#include "vectors.hpp"

extern "C" struct Embedding {
    const Matrix* matrix;  // panels, and the scales of whole numbers; of ROWS the panels are the matrix itself
    int32_t kind, width;   // a Kind; outputs of a panel
};

namespace {

enum Kind { ROWS, PANELS, PANELS_OF_PAIRS, INT8, INT4 };

// Words of one output, which lie `width` words apart: use(place, word).
template <class Word, class Use>
inline void for_words(const Embedding& from, long id, long places, const Use& use) {
    const Word* at = static_cast<const Word*>(from.matrix->panels);
    at += id / from.width * places * from.width + id % from.width;
    for (long place = 0; place < places; ++place, at += from.width) use(place, *at);
}

inline float scale_at(const Matrix& matrix, long place) {
    if (matrix.scale_kind == 2) return widen(static_cast<const float16*>(matrix.scales)[place]);
    if (matrix.scale_kind == 3) return widen(static_cast<const bfloat16*>(matrix.scales)[place]);
    return static_cast<const float*>(matrix.scales)[place];
}

// `to` (D,) becomes what a token is embedded as; whole numbers are multiplied in float32, and rounded to M.
template <class M> void embed(const Embedding& from, long id, M* to) {
    const Matrix& matrix = *from.matrix;
    const long D = matrix.inputs, groups = D / matrix.group;
    const auto scaled = [&](long at, int number) {
        const long place = (id / from.width * groups + at / matrix.group) * from.width + id % from.width;
        to[at] = narrow<M>(float(number) * scale_at(matrix, place));
    };
    if (from.kind == ROWS) {
        std::memcpy(to, static_cast<const M*>(matrix.panels) + id * D, size_t(D) * sizeof(M));
    } else if (from.kind == PANELS) {
        for_words<M>(from, id, D, [&](long place, M word) { to[place] = word; });
    } else if (from.kind == PANELS_OF_PAIRS) {
        for_words<uint32_t>(from, id, D / 2, [&](long place, uint32_t word) {
            std::memcpy(to + place * 2, &word, sizeof word);
        });
    } else if (from.kind == INT8) {
        for_words<uint32_t>(from, id, D / 4, [&](long place, uint32_t word) {
            for (int i = 0; i < 4; ++i) scaled(place * 4 + i, int8_t(word >> 8 * i));
        });
    } else {  // the low half of a byte comes first
        for_words<uint32_t>(from, id, D / 8, [&](long place, uint32_t word) {
            for (int i = 0; i < 8; ++i) scaled(place * 8 + i, int(word >> 4 * i & 15) - 8);
        });
    }
}

}  // namespace
