// What Python tells the kernels of a step and of a layer's attention; see kernels.py.

#pragma once

#include "common.h"

extern "C" {

// One step: which tokens, whose they are, and where their keys and values live.
struct Step {
    int64_t tokens;
    int64_t num_tiles;    // rows of `tiles`
    int64_t table_width;  // blocks per row of `tables`
    int64_t block_size;
    const int64_t *positions, *slots;  // of each token
    const int32_t* tables;             // blocks of each sequence
    const int32_t* tiles;              // (sequence, first token, tokens): queries that are attended together
};

// One layer's attention. The rotary tables have one row of head_dim / 2 floats per position.
struct Layer {
    int64_t heads, kv_heads, head_dim;
    int64_t window;  // keys that a query sees, itself included; 0: all
    float scale, norm_eps;
    const float *cosines, *sines;
    const float *q_norm, *k_norm;  // null: no normalisation of queries and keys
};

// attention.cpp: rotate in place, store keys and values, attend.
void attend_float32(const Step*, const Layer*, float* qkv, float* pages, float* out);
void attend_bfloat16(const Step*, const Layer*, float* qkv, bfloat16* pages, bfloat16* out);

}  // extern "C"
