// Decoder layers, and the operations between their linear layers.
//
// Sums are taken in float32, in an order that depends neither on the batch, nor on how a prompt was cut
// into chunks, nor on the number of threads; see linear.cpp.

#include <algorithm>
#include <cmath>
#include <vector>

#include "exchange.h"
#include "layer.h"
#include "matrix.h"
#include "pool.h"

extern "C" {

// A decoder layer: adds `delta` and the attention's output to x; the MLP's output is added by the next layer.
// A norm is null where there is none: before attention and MLP, or of what they return.
struct Block {
    Layer attention;
    int64_t hidden, intermediate;
    int64_t gelu;  // 0: the MLP's gate is SiLU; 1: GELU, approximated by tanh
    Matrix qkv, output, gate_up, down;
    const float *attention_norm, *attended_norm, *mlp_norm, *made_norm;
    float eps;
    float scale;  // of what attention and MLP return
};

}  // extern "C"

namespace {

template <typename T>
void add_rms_norm(float* x, const float* delta, const float* weight, T* out, int64_t rows, int64_t size,
                  float eps) {
    in_pieces(rows, 16, [&](int64_t row, int64_t end) {
        for (; row < end; ++row) {
            float* values = x + row * size;
            if (delta)
                for (int64_t i = 0; i < size; ++i) values[i] += delta[row * size + i];
            if (!weight) {
                for (int64_t i = 0; i < size; i += LANES)
                    store_floats(out + row * size + i, load_floats(values + i));
                continue;
            }
            const float factor = 1 / std::sqrt(sum_of_squares(values, size) / size + eps);
            for (int64_t i = 0; i < size; i += LANES)
                store_floats(out + row * size + i, load_floats(values + i) * factor * load_floats(weight + i));
        }
    });
}

// Normalise and scale what attention or MLP return, in place.
void finish(float* added, const float* weight, float eps, float scale, int64_t rows, int64_t size) {
    if (weight) add_rms_norm(added, nullptr, weight, added, rows, size, eps);
    if (scale != 1)
        for (int64_t i = 0; i < rows * size; ++i) added[i] *= scale;
}

// GELU by tanh, arXiv:1606.08415, is x times the sigmoid of 2 sqrt(2 / pi) (x + 0.044715 x^3).
inline floats slope(floats x, bool gelu) {
    return gelu ? x * (1.5957691216057308f + 0.07135481282556487f * x * x) : x;
}

template <typename T>
void gate_and_mul(const float* gate_up, T* out, int64_t rows, int64_t size, bool gelu) {
    in_pieces(rows, 8, [&](int64_t row, int64_t end) {
        for (; row < end; ++row) {
            const float *gates = gate_up + row * 2 * size, *ups = gates + size;
            for (int64_t i = 0; i < size; i += LANES) {
                const floats gate = load_floats(gates + i);
                const floats product = gate / (1 + exponential(-slope(gate, gelu))) * load_floats(ups + i);
                store_floats(out + row * size + i, product);
            }
        }
    });
}

void attend(const Step& step, const Layer& layer, float* qkv, float* pages, float* out) {
    attend_float32(&step, &layer, qkv, pages, out);
}
void attend(const Step& step, const Layer& layer, float* qkv, bfloat16* pages, bfloat16* out) {
    attend_bfloat16(&step, &layer, qkv, pages, out);
}

// `delta` is the previous layer's MLP output, or null; `out` may be the same memory. Several ranks add up what
// each has computed with its heads, and with its hidden units; `exchange` is null with one.
template <typename T>
void decoder_layer(const Step& step, const Block& block, float* x, const float* delta, T* pages, float* out,
                   Exchange* exchange) {
    const int64_t rows = step.tokens, hidden = block.hidden, inner = block.intermediate;
    const int64_t heads = block.attention.heads * block.attention.head_dim;
    thread_local std::vector<T> normed, attended, activated;
    thread_local std::vector<float> wide, added;
    normed.resize(rows * hidden), attended.resize(rows * heads), activated.resize(rows * inner);
    wide.resize(rows * std::max(block.qkv.outputs, block.gate_up.outputs)), added.resize(rows * hidden);
    add_rms_norm(x, delta, block.attention_norm, normed.data(), rows, hidden, block.eps);
    multiply(block.qkv, normed.data(), wide.data(), rows);
    attend(step, block.attention, wide.data(), pages, attended.data());
    multiply(block.output, attended.data(), added.data(), rows);
    if (exchange) all_reduce(*exchange, added.data(), rows * hidden);
    finish(added.data(), block.attended_norm, block.eps, block.scale, rows, hidden);
    add_rms_norm(x, added.data(), block.mlp_norm, normed.data(), rows, hidden, block.eps);
    multiply(block.gate_up, normed.data(), wide.data(), rows);
    gate_and_mul(wide.data(), activated.data(), rows, inner, block.gelu);
    multiply(block.down, activated.data(), out, rows);
    if (exchange) all_reduce(*exchange, out, rows * hidden);
    finish(out, block.made_norm, block.eps, block.scale, rows, hidden);
}

template <typename T>
void decoder_layers(const Step& step, const Block* blocks, int64_t first, int64_t end, float* x,
                    const float* delta, T* const* pages, float* out, Exchange* exchange) {
    for (int64_t i = first; i < end; ++i, delta = out)
        decoder_layer(step, blocks[i], x, delta, pages[i], out, exchange);
}

}  // namespace

extern "C" {

#define FOR_NUMBERS(T, NAME)                                                                          \
    void add_rms_norm_##NAME(float* x, const float* delta, const float* weight, T* out, int64_t rows, \
                             int64_t size, float eps) {                                               \
        add_rms_norm(x, delta, weight, out, rows, size, eps);                                         \
    }                                                                                                 \
    void gate_and_mul_##NAME(const float* gate_up, T* out, int64_t rows, int64_t size, int64_t gelu) { \
        gate_and_mul(gate_up, out, rows, size, gelu);                                                 \
    }                                                                                                 \
    void decoder_layers_##NAME(const Step* step, const Block* blocks, int64_t first, int64_t end,     \
                               float* x, const float* delta, T* const* pages, float* out,             \
                               Exchange* exchange) {                                                  \
        decoder_layers(*step, blocks, first, end, x, delta, pages, out, exchange);                    \
    }

FOR_NUMBERS(float, float32)
FOR_NUMBERS(bfloat16, bfloat16)

}  // extern "C"
