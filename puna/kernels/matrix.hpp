// A matrix in panels as every product's entry is told of it, and how its rows are divided; products.py has
// the first for Python.

#pragma once

#include <cstdint>

extern "C" struct Matrix {
    const void *panels, *scales, *bias;  // bias in the type of x, or null
    int64_t inputs, outputs, group;      // group: inputs that share a scale
    int32_t scale_kind;                  // 0 none, 1 float32, 2 float16, 3 bfloat16
};

// (matrix, x, out, rows, out_stride, threads): x (rows, inputs) times the matrix, and the bias. From one row of
// out to the next are out_stride ≥ outputs numbers.
extern "C" typedef void Multiply(const Matrix*, const void*, void*, int64_t, int64_t, int32_t);

namespace {

// Rows first..first + count of a call, as products work on them together.
struct Block {
    long first;
    int count;
};

// Several blocks of about as many rows each.
inline Block block_of(long rows, long blocks, long which) {
    const long first = rows * which / blocks;
    return {first, int(rows * (which + 1) / blocks - first)};
}

}  // namespace
