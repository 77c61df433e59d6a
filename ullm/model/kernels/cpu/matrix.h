// The weights of a linear layer, which Python passes; see kernels.py.

#pragma once

#include <atomic>

#include "common.h"

enum class Format : int64_t { FLOAT32, BFLOAT16, FLOAT16, QUANTIZED };

struct Matrix {
    const void* packed;
    const float* bias;  // null: none
    int64_t inputs, outputs;
    Format format;
};

// out [rows][outputs] = x [rows][inputs] * weight^T + bias. Inputs in bfloat16 take weights in bfloat16 or
// quantized ones, which are packed for them. Defined in linear.cpp.
void multiply(const Matrix&, const float* x, float* out, int64_t rows);
void multiply(const Matrix&, const bfloat16* x, float* out, int64_t rows);

// The same for quantized weights alone. Defined in quantized.cpp.
void multiply_quantized(const Matrix&, const float* x, float* out, int64_t rows);
void multiply_quantized(const Matrix&, const bfloat16* x, float* out, int64_t rows);

// How products are divided. No choice changes a result: each output is summed in one order in any case. Set by
// use_tuning, see calibration.py.
struct Tuning {
    std::atomic<int64_t> chunk_tiles{8};  // tiles of rows that are multiplied by the same weights in turn
    std::atomic<int64_t> piece{48};       // groups of quantized weights that a thread takes at a time
    std::atomic<int64_t> prefetch{1};     // 0: the next weights are not prefetched
};
inline Tuning tuning;
