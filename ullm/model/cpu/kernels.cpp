// What happens between the matrix products of a decoder layer, fused: PyTorch does it in some thirty
// calls per layer, which at one row cost as much time as the products themselves.
//
// Plain C++17 and OpenMP behind a C interface, so that it compiles in a second or two and needs no
// headers but the standard ones. Sums are taken in float32, in an order that depends neither on the batch
// nor on the number of threads: a sequence gets the same result alone and among others.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace {

struct bfloat16 {
    uint16_t bits;
};

inline float load(float x) { return x; }
inline float load(bfloat16 x) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline void store(float* to, float value) { *to = value; }
inline void store(bfloat16* to, float value) {  // rounds to nearest, ties to even
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    to->bits = uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// exp(x) as 2^n * 2^f, with |f| <= 1/2 and 2^f by its Taylor series to the sixth power: a relative error
// below 3e-7, in operations that the compiler vectorizes.
inline float fast_exp(float x) {
    x = std::min(std::max(x, -87.0f), 88.0f) * 1.44269504f;
    const float n = std::nearbyint(x), f = (x - n) * 0.693147181f;
    const float p =
        1 + f * (1 + f * (0.5f + f * (1 / 6.0f + f * (1 / 24.0f + f * (1 / 120.0f + f * (1 / 720.0f))))));
    const int32_t bits = (int32_t(n) + 127) << 23;
    float scale;
    std::memcpy(&scale, &bits, 4);
    return p * scale;
}

constexpr int LANES = 16;  // floats in a vector register of AVX-512; head_dim must be a multiple

// Sums of squares and products go into LANES partial sums, which makes their order explicit.
inline float total(const float* lanes) {
    float sum = 0;
    for (int i = 0; i < LANES; ++i) sum += lanes[i];
    return sum;
}

template <typename T>
float sum_of_squares(const T* x, int64_t size) {
    float lanes[LANES] = {};
    int64_t i = 0;
    for (; i + LANES <= size; i += LANES)
        for (int j = 0; j < LANES; ++j) lanes[j] += load(x[i + j]) * load(x[i + j]);
    for (; i < size; ++i) lanes[0] += load(x[i]) * load(x[i]);
    return total(lanes);
}

template <typename T>
void add_rms_norm(float* x, const T* delta, const float* weight, T* out, int64_t rows, int64_t size, float eps) {
#pragma omp parallel for if (rows >= 16)
    for (int64_t row = 0; row < rows; ++row) {
        float* values = x + row * size;
        if (delta)
            for (int64_t i = 0; i < size; ++i) values[i] += load(delta[row * size + i]);
        const float factor = 1 / std::sqrt(sum_of_squares(values, size) / size + eps);
        for (int64_t i = 0; i < size; ++i) store(out + row * size + i, values[i] * factor * weight[i]);
    }
}

template <typename T>
void silu_and_mul(const T* gate_up, T* out, int64_t rows, int64_t size) {
#pragma omp parallel for if (rows >= 8)
    for (int64_t row = 0; row < rows; ++row) {
        const T *gate = gate_up + row * 2 * size, *up = gate + size;
        for (int64_t i = 0; i < size; ++i) {
            const float g = load(gate[i]);
            store(out + row * size + i, g / (1 + fast_exp(-g)) * load(up[i]));
        }
    }
}

}  // namespace

extern "C" {

// One step: which tokens, and where their keys and values live. The layout of the pages of one layer is
// [block][keys, values][KV head][offset in the block][head_dim].
struct Step {
    int64_t tokens, decodes;      // the first `decodes` tokens are sequences of one query each
    int64_t table_width;          // blocks per row of `tables`
    int64_t block_size;
    const int64_t *positions, *slots;  // of each token
    const int32_t *tables, *lens;      // of each sequence
};

// One layer's attention. The rotary tables have one row of head_dim / 2 floats per position.
struct Layer {
    int64_t heads, kv_heads, head_dim;
    int64_t window;  // keys that a query sees, itself included; 0: all
    float scale, norm_eps;
    const float *cosines, *sines;
    const float *q_norm, *k_norm;  // null: no normalisation of queries and keys
};

}  // extern "C"

namespace {

template <typename T>
void normalize(T* head, const float* weight, float eps, int64_t size) {
    const float factor = 1 / std::sqrt(sum_of_squares(head, size) / size + eps);
    for (int64_t i = 0; i < size; ++i) store(head + i, load(head[i]) * factor * weight[i]);
}

template <typename T>
void rotate(T* head, const float* cosines, const float* sines, int64_t half) {
    for (int64_t i = 0; i < half; ++i) {
        const float a = load(head[i]), b = load(head[i + half]);
        store(head + i, a * cosines[i] - b * sines[i]);
        store(head + i + half, b * cosines[i] + a * sines[i]);
    }
}

// Where a slot's keys of one head begin in the pages; its values are `kv_heads` rows of blocks further.
inline int64_t page_offset(const Step& step, const Layer& layer, int64_t block, int64_t head) {
    return (block * 2 * layer.kv_heads + head) * step.block_size * layer.head_dim;
}

// Normalise and rotate queries and keys in place, and copy keys and values into their pages.
template <typename T>
void rotate_and_store(const Step& step, const Layer& layer, T* qkv, T* pages) {
    const int64_t dim = layer.head_dim, half = dim / 2, all = layer.heads + 2 * layer.kv_heads;
    const int64_t values = layer.kv_heads * step.block_size * dim;
#pragma omp parallel for if (step.tokens >= 16)
    for (int64_t token = 0; token < step.tokens; ++token) {
        T* row = qkv + token * all * dim;
        const float* cosines = layer.cosines + step.positions[token] * half;
        const float* sines = layer.sines + step.positions[token] * half;
        for (int64_t head = 0; head < layer.heads + layer.kv_heads; ++head) {
            const float* weight = head < layer.heads ? layer.q_norm : layer.k_norm;
            if (weight) normalize(row + head * dim, weight, layer.norm_eps, dim);
            rotate(row + head * dim, cosines, sines, half);
        }
        const int64_t block = step.slots[token] / step.block_size, offset = step.slots[token] % step.block_size;
        for (int64_t head = 0; head < layer.kv_heads; ++head) {
            T* keys = pages + page_offset(step, layer, block, head) + offset * dim;
            const T* key = row + (layer.heads + head) * dim;
            std::memcpy(keys, key, dim * sizeof(T));
            std::memcpy(keys + values, key + layer.kv_heads * dim, dim * sizeof(T));
        }
    }
}

template <typename T>
inline float dot(const float* query, const T* key, int64_t dim) {
    float lanes[LANES] = {};
    for (int64_t i = 0; i < dim; i += LANES)
        for (int j = 0; j < LANES; ++j) lanes[j] += query[i + j] * load(key[i + j]);
    return total(lanes);
}

template <typename T>
inline void add_weighted(float* out, const float* weights, const T* values, int64_t count, int64_t dim) {
    for (int64_t i = 0; i < dim; i += LANES) {
        float lanes[LANES];
        for (int j = 0; j < LANES; ++j) lanes[j] = out[i + j];
        for (int64_t key = 0; key < count; ++key)
            for (int j = 0; j < LANES; ++j) lanes[j] += weights[key] * load(values[key * dim + i + j]);
        for (int j = 0; j < LANES; ++j) out[i + j] = lanes[j];
    }
}

// Turn scores into weights, in place; returns what their sum must be divided by.
inline float softmax(float* scores, int64_t count) {
    float most = scores[0];
    for (int64_t i = 1; i < count; ++i) most = std::max(most, scores[i]);
    float lanes[LANES] = {};
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES)
        for (int j = 0; j < LANES; ++j) lanes[j] += scores[i + j] = fast_exp(scores[i + j] - most);
    for (; i < count; ++i) lanes[0] += scores[i] = fast_exp(scores[i] - most);
    return total(lanes);
}

// The queries of one sequence that share one KV head, over all of its keys.
template <typename T>
void attend_head(const Step& step, const Layer& layer, int64_t sequence, int64_t head, const T* qkv,
                 const T* pages, T* out, std::vector<float>& scratch) {
    const int64_t dim = layer.head_dim, group = layer.heads / layer.kv_heads, size = step.block_size;
    const int64_t all = layer.heads + 2 * layer.kv_heads, keys = step.lens[sequence];
    const int64_t first = layer.window ? std::max<int64_t>(0, keys - layer.window) : 0;
    const int32_t* table = step.tables + sequence * step.table_width;
    scratch.resize(group * (keys + 2 * dim));
    float *scores = scratch.data(), *queries = scores + group * keys, *sums = queries + group * dim;
    const T* q = qkv + (sequence * all + head * group) * dim;
    for (int64_t i = 0; i < group * dim; ++i) queries[i] = load(q[i]) * layer.scale, sums[i] = 0;

    for (int64_t block = first / size; block * size < keys; ++block) {
        const T* page = pages + page_offset(step, layer, table[block], head);
        const int64_t from = std::max(first - block * size, int64_t(0)), to = std::min(keys - block * size, size);
        for (int64_t g = 0; g < group; ++g)
            for (int64_t i = from; i < to; ++i)
                scores[g * keys + block * size + i] = dot(queries + g * dim, page + i * dim, dim);
    }
    float divisors[64];
    for (int64_t g = 0; g < group; ++g) divisors[g] = softmax(scores + g * keys + first, keys - first);
    const int64_t values = layer.kv_heads * size * dim;
    for (int64_t block = first / size; block * size < keys; ++block) {
        const T* page = pages + page_offset(step, layer, table[block], head) + values;
        const int64_t from = std::max(first - block * size, int64_t(0)), to = std::min(keys - block * size, size);
        for (int64_t g = 0; g < group; ++g)
            add_weighted(sums + g * dim, scores + g * keys + block * size + from, page + from * dim, to - from, dim);
    }
    T* to = out + (sequence * layer.heads + head * group) * dim;
    for (int64_t g = 0; g < group; ++g)
        for (int64_t i = 0; i < dim; ++i) store(to + g * dim + i, sums[g * dim + i] / divisors[g]);
}

// Everything between the projections: queries and keys are rotated, keys and values stored, and the
// sequences of one query attended. The queries of prefill chunks are left to the caller.
template <typename T>
void attend(const Step& step, const Layer& layer, T* qkv, T* pages, T* out) {
    rotate_and_store(step, layer, qkv, pages);
    int64_t keys = 0;
    for (int64_t i = 0; i < step.decodes; ++i) keys += step.lens[i];
#pragma omp parallel if (keys * layer.kv_heads >= 256)
    {
        std::vector<float> scratch;
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < step.decodes * layer.kv_heads; ++i)
            attend_head(step, layer, i / layer.kv_heads, i % layer.kv_heads, qkv, pages, out, scratch);
    }
}

}  // namespace

extern "C" {

#define ULLM_KERNELS(T, NAME)                                                                              \
    void add_rms_norm_##NAME(float* x, const T* delta, const float* weight, T* out, int64_t rows,          \
                             int64_t size, float eps) {                                                    \
        add_rms_norm(x, delta, weight, out, rows, size, eps);                                              \
    }                                                                                                      \
    void silu_and_mul_##NAME(const T* gate_up, T* out, int64_t rows, int64_t size) {                       \
        silu_and_mul(gate_up, out, rows, size);                                                            \
    }                                                                                                      \
    void attend_##NAME(const Step* step, const Layer* layer, T* qkv, T* pages, T* out) {                   \
        attend(*step, *layer, qkv, pages, out);                                                            \
    }

ULLM_KERNELS(float, float32)
ULLM_KERNELS(bfloat16, bfloat16)

}  // extern "C"
