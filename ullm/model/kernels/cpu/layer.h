// Descriptions of a step and of a layer's attention, which Python passes; see kernels.py.

#pragma once

#include "common.h"

extern "C" {

// One step: its tokens, their sequences, and the places of their keys and values.
struct Step {
    int64_t tokens;
    int64_t num_tiles;    // rows of `tiles`
    int64_t table_width;  // blocks per row of `tables`
    int64_t block_size;
    const int64_t *positions, *slots;  // per token
    const int32_t* tables;             // block ids of each sequence
    const int32_t* tiles;              // (sequence, first token, tokens) of queries that share a pass
};

// One layer's attention. The rotary tables have one row of rotary / 2 floats per position.
struct Layer {
    int64_t heads, kv_heads, head_dim;
    int64_t rotary;     // numbers at the beginning of each head that are rotated; 0: none
    int64_t window;     // keys that a query sees, itself included; 0: all
    int64_t norm_heads; // 1: queries and keys are normalised head by head; 0: all heads together
    float scale, norm_eps;
    float softcap;      // scores become softcap * tanh(score / softcap); 0: they do not
    const float *cosines, *sines;
    const float *q_norm, *k_norm;  // null: no normalisation of queries and keys
};

// Defined in attention.cpp: rotate in place, store keys and values, compute attention.
void attend_float32(const Step*, const Layer*, float* qkv, float* pages, float* out);
void attend_bfloat16(const Step*, const Layer*, float* qkv, bfloat16* pages, bfloat16* out);

}  // extern "C"
