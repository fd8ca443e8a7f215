// Rows of any width, read and written by vectors, and shared out among threads.

#pragma once

#include <algorithm>

#include "threads.hpp"
#include "vectors.hpp"

namespace {

constexpr double LITTLE_ROWS = 60000;  // numbers: waking other threads for them takes longer
constexpr long BLOCK_ROWS = 64;        // rows of one piece of work, whose sums are added up by themselves

// `count` numbers, or as many as a vector holds; beyond them zeros.
template <class M> inline Vec<float> some(const M* from, long count) {
    if (count >= LANES<float>) return load<float>(from);
    Vec<float> found = {};
    for (long at = 0; at < count; ++at) found[int(at)] = widen(from[at]);
    return found;
}

template <class M> inline void put(M* to, long count, Vec<float> x) {
    if (count >= LANES<float>) return store_narrow(to, x);
    for (long at = 0; at < count; ++at) to[at] = narrow<M>(x[int(at)]);
}

template <class Work> void for_rows(long rows, long width, int threads, const Work& work) {
    for_each(int(rows), double(rows) * width < LITTLE_ROWS * least() ? 1 : threads, work);
}

inline long row_blocks(long rows) { return (rows + BLOCK_ROWS - 1) / BLOCK_ROWS; }

// work(row, block) of every row; the rows of a block one after the other.
template <class Work> void for_row_blocks(long rows, long width, int threads, const Work& work) {
    const bool little = double(rows) * width < LITTLE_ROWS * least();
    for_stretches(int(row_blocks(rows)), little ? 1 : threads, [&](int block) {
        const long first = block * BLOCK_ROWS, end = std::min(rows, first + BLOCK_ROWS);
        for (long row = first; row < end; ++row) work(row, block);
    });
}

}  // namespace
