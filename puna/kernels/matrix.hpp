// A matrix in panels as every product's entry is told of it; products.py has the same for Python.

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
