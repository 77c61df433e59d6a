// Attention over paged keys and values: normalise and rotate, store, attend.
//
// Sums are taken in float32, in an order that depends neither on the batch, nor on how a prompt was cut
// into chunks, nor on the number of threads; see linear.cpp.

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

#include "layer.h"
#include "pool.h"

namespace {

void normalize(float* head, const float* weight, float eps, int64_t size) {
    const float factor = 1 / std::sqrt(sum_of_squares(head, size) / size + eps);
    for (int64_t i = 0; i < size; ++i) head[i] *= factor * weight[i];
}

void rotate(float* head, const float* cosines, const float* sines, int64_t half) {
    for (int64_t i = 0; i < half; ++i) {
        const float a = head[i], b = head[i + half];
        head[i] = a * cosines[i] - b * sines[i];
        head[i + half] = b * cosines[i] + a * sines[i];
    }
}

// The pages of one layer are [block][KV head][keys, values]: keys as [head_dim][block_size], so that scores
// of neighbouring keys are computed side by side, and values as [block_size][head_dim].
template <typename T>
inline T* page_of(T* pages, const Step& step, const Layer& layer, int64_t block, int64_t head) {
    return pages + (block * layer.kv_heads + head) * 2 * step.block_size * layer.head_dim;
}

// Normalise and rotate queries and keys in place, and store keys and values in their pages.
template <typename T>
void rotate_and_store(const Step& step, const Layer& layer, float* qkv, T* pages) {
    const int64_t dim = layer.head_dim, half = dim / 2, size = step.block_size;
    const int64_t all = layer.heads + 2 * layer.kv_heads;
    in_pieces(step.tokens, 8, [&](int64_t token, int64_t end) {
        for (; token < end; ++token) {
            float* row = qkv + token * all * dim;
            const float* cosines = layer.cosines + step.positions[token] * half;
            const float* sines = layer.sines + step.positions[token] * half;
            for (int64_t head = 0; head < layer.heads + layer.kv_heads; ++head) {
                const float* weight = head < layer.heads ? layer.q_norm : layer.k_norm;
                if (weight) normalize(row + head * dim, weight, layer.norm_eps, dim);
                rotate(row + head * dim, cosines, sines, half);
            }
            const int64_t block = step.slots[token] / size, offset = step.slots[token] % size;
            for (int64_t head = 0; head < layer.kv_heads; ++head) {
                const float* key = row + (layer.heads + head) * dim;
                const float* value = key + layer.kv_heads * dim;
                T* keys = page_of(pages, step, layer, block, head) + offset;
                T* values = keys - offset + size * dim + offset * dim;
                for (int64_t i = 0; i < dim; ++i) store(keys + i * size, key[i]);
                for (int64_t i = 0; i < dim; ++i) store(values + i, value[i]);
            }
        }
    });
}

// The range of blocks that a tile sees: the first one, and the end of the last.
inline std::pair<int64_t, int64_t> blocks_of(const Step& step, const Layer& layer, const int32_t* tile) {
    const int64_t first = step.positions[tile[1]] + 1, last = step.positions[tile[1] + tile[2] - 1] + 1;
    const int64_t seen = layer.window ? std::max<int64_t>(0, first - layer.window) : 0;
    return {seen / step.block_size, (last + step.block_size - 1) / step.block_size};
}

// The pages of the next tile, prefetched line by line while this one is computed. They are scattered over the
// memory, so the processor cannot predict them, and it would stall on too many prefetches at once.
template <typename T>
class NextPages {
  public:
    NextPages(const Step& step, const Layer& layer, const int32_t* tile, int64_t head, const T* pages)
        : step_(step), layer_(layer), head_(head), pages_(pages) {
        if (!tile || tile[2] > 1) return;  // neighbouring tiles of a prompt have almost the same pages
        std::tie(block_, end_) = blocks_of(step, layer, tile);
        table_ = step.tables + tile[0] * step.table_width;
    }

    void fetch(int lines) {
        for (; lines > 0; --lines, line_ += 64) {
            if (line_ == page_end_) {
                if (block_ >= end_) return;
                line_ = reinterpret_cast<const char*>(page_of(pages_, step_, layer_, table_[block_++], head_));
                page_end_ = line_ + 2 * step_.block_size * layer_.head_dim * sizeof(T);
            }
            __builtin_prefetch(line_, 0, 2);
        }
    }

  private:
    const Step& step_;
    const Layer& layer_;
    int64_t head_, block_ = 0, end_ = 0;
    const T* pages_;
    const int32_t* table_ = nullptr;
    const char *line_ = nullptr, *page_end_ = nullptr;
};

constexpr int BESIDE = 64 / LANES;  // vectors of keys, or of values, that are computed side by side

// Scores of R queries with K times LANES neighbouring keys. The sums are independent of each other, which
// hides the latency of each addition.
template <int R, int K, typename T>
void score(const float* queries, const T* const* keys, const int64_t* places, float* scores,
           int64_t score_stride, int64_t dim, int64_t size, NextPages<T>& next) {
    constexpr int N = at_once(R, K);
    for (int first = 0; first < K; first += N) {
        floats sums[R][N] = {};
        for (int64_t i = 0; i < dim; ++i) {
            if (first == 0) next.fetch(K * LANES / 32);
            for (int k = 0; k < N; ++k) {
                const floats key = load_floats(keys[first + k] + i * size);
                for (int r = 0; r < R; ++r) sums[r][k] += queries[r * dim + i] * key;
            }
        }
        for (int r = 0; r < R; ++r)
            for (int k = 0; k < N; ++k) store_floats(scores + r * score_stride + places[first + k], sums[r][k]);
    }
}

// Add `count` weighted values to LANES * V neighbouring outputs of R queries.
template <int R, int V, typename T>
void add_values(const float* weights, int64_t weight_stride, const T* values, float* out, int64_t count,
                int64_t dim, NextPages<T>& next) {
    constexpr int N = at_once(R, V);
    for (int first = 0; first < V; first += N) {
        floats sums[R][N];
        float* const to = out + first * LANES;
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < N; ++v) sums[r][v] = load_floats(to + r * dim + v * LANES);
        for (int64_t key = 0; key < count; ++key) {
            if (first == 0) next.fetch(V * LANES / 32);
            for (int v = 0; v < N; ++v) {
                const floats value = load_floats(values + key * dim + (first + v) * LANES);
                for (int r = 0; r < R; ++r) sums[r][v] += weights[r * weight_stride + key] * value;
            }
        }
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < N; ++v) store_floats(to + r * dim + v * LANES, sums[r][v]);
    }
}

template <int R, typename T>
void add_all_values(const float* weights, int64_t weight_stride, const T* values, float* out, int64_t count,
                    int64_t dim, NextPages<T>& next) {
    int64_t i = 0;
    for (; i + BESIDE * LANES <= dim; i += BESIDE * LANES)
        add_values<R, BESIDE>(weights, weight_stride, values + i, out + i, count, dim, next);
    for (; i < dim; i += LANES) add_values<R, 1>(weights, weight_stride, values + i, out + i, count, dim, next);
}

float largest(const float* values, int64_t count) {
    floats vector = floats{} - std::numeric_limits<float>::infinity();
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        const floats here = load_floats(values + i);
        vector = here > vector ? here : vector;
    }
    float most = vector[0];
    for (int lane = 1; lane < LANES; ++lane) most = std::max(most, vector[lane]);
    for (; i < count; ++i) most = std::max(most, values[i]);
    return most;
}

// Turn the scores of the keys first ... end - 1 into weights and all others into zeros; return the divisor of
// the sum of weighted values.
float softmax(float* scores, int64_t first, int64_t end, int64_t width) {
    std::fill(scores, scores + first, 0.0f), std::fill(scores + end, scores + width, 0.0f);
    const float most = largest(scores + first, end - first);
    floats sums = {};
    int64_t i = first;
    for (; i + LANES <= end; i += LANES) {
        const floats weights = exponential(load_floats(scores + i) - most);
        store_floats(scores + i, weights);
        sums += weights;
    }
    if (i < end) {
        float rest[LANES];
        for (int j = 0; j < LANES; ++j) rest[j] = i + j < end ? scores[i + j] - most : -100.0f;
        floats weights = exponential(load_floats(rest));
        for (int j = 0; j < LANES; ++j) weights[j] = i + j < end ? weights[j] : 0.0f;
        for (int j = 0; i + j < end; ++j) scores[i + j] = weights[j];
        sums += weights;
    }
    return total(sums);
}

constexpr int TOGETHER = 6;  // query vectors that share the loads of keys and values

// The queries of one tile that share one KV head: `tokens` neighbouring tokens of a sequence times the
// query heads of the group.
template <typename T>
void attend_tile(const Step& step, const Layer& layer, const int32_t* tile, int64_t head, const float* qkv,
                 const T* pages, NextPages<T> next, T* out, std::vector<float>& scratch) {
    const int64_t token = tile[1], tokens = tile[2], dim = layer.head_dim, size = step.block_size;
    const int64_t group = layer.heads / layer.kv_heads, rows = tokens * group,
                  all = layer.heads + 2 * layer.kv_heads;
    const int64_t end = step.positions[token + tokens - 1] + 1;
    const auto [first_block, last_block] = blocks_of(step, layer, tile);
    const int64_t width = (last_block - first_block) * size, begin = first_block * size;
    const int32_t* table = step.tables + tile[0] * step.table_width;
    scratch.resize(rows * (width + LANES + 2 * dim));
    const int64_t stride = width + LANES;  // scores are stored LANES at a time
    float *scores = scratch.data(), *queries = scores + rows * stride, *sums = queries + rows * dim;
    for (int64_t row = 0; row < rows; ++row) {
        const float* query = qkv + ((token + row / group) * all + head * group + row % group) * dim;
        for (int64_t i = 0; i < dim; ++i) queries[row * dim + i] = query[i] * layer.scale;
    }
    std::fill(sums, sums + rows * dim, 0.0f);

    const auto by_rows = [&](auto function) {
        int64_t row = 0;
        for (; row + TOGETHER <= rows; row += TOGETHER)
            function(std::integral_constant<int, TOGETHER>{}, row);
        if (rows - row >= 3) function(std::integral_constant<int, 3>{}, row), row += 3;
        if (rows - row == 2) function(std::integral_constant<int, 2>{}, row);
        if (rows - row == 1) function(std::integral_constant<int, 1>{}, row);
    };
    // In ascending order: in blocks smaller than a vector, the following scores overwrite the excess.
    const int64_t each = (size + LANES - 1) / LANES, vectors = (last_block - first_block) * each;
    for (int64_t vector = 0; vector < vectors; vector += BESIDE) {
        const T* keys[BESIDE];
        int64_t places[BESIDE];
        const int64_t count = std::min<int64_t>(BESIDE, vectors - vector);
        for (int64_t k = 0; k < count; ++k) {
            const int64_t block = (vector + k) / each, lane = (vector + k) % each * LANES;
            keys[k] = page_of(pages, step, layer, table[first_block + block], head) + lane;
            places[k] = block * size + lane;
        }
        by_rows([&](auto r, int64_t row) {
            constexpr int R = r.value;
            const float* from = queries + row * dim;
            float* to = scores + row * stride;
            if (count == BESIDE) return score<R, BESIDE>(from, keys, places, to, stride, dim, size, next);
            for (int64_t k = 0; k < count; ++k)
                score<R, 1>(from, keys + k, places + k, to, stride, dim, size, next);
        });
    }
    std::vector<float> divisors(rows);
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t sees = step.positions[token + row / group] + 1;
        const int64_t from = layer.window ? std::max<int64_t>(0, sees - layer.window) : 0;
        divisors[row] = softmax(scores + row * stride, from - begin, sees - begin, width);
    }
    for (int64_t block = first_block; block < last_block; ++block) {
        const T* values = page_of(pages, step, layer, table[block], head) + size * dim;
        by_rows([&](auto r, int64_t row) {
            add_all_values<r.value>(scores + row * stride + block * size - begin, stride, values,
                                    sums + row * dim, std::min(size, end - block * size), dim, next);
        });
    }
    for (int64_t row = 0; row < rows; ++row) {
        T* to = out + ((token + row / group) * layer.heads + head * group + row % group) * dim;
        for (int64_t i = 0; i < dim; ++i) store(to + i, sums[row * dim + i] / divisors[row]);
    }
}

template <typename T>
void attend(const Step& step, const Layer& layer, float* qkv, T* pages, T* out) {
    rotate_and_store(step, layer, qkv, pages);
    // The longest first: a prompt's tiles are in ascending order, so start at the end.
    const int64_t count = step.num_tiles * layer.kv_heads, threads = pool().threads();
    pool().run(count, [&](int64_t number) {
        thread_local std::vector<float> scratch;
        const int64_t i = count - 1 - number, then = i - threads;
        const auto tile = [&](int64_t index) { return step.tiles + 3 * (index / layer.kv_heads); };
        NextPages<T> next(step, layer, then < 0 ? nullptr : tile(then), then % layer.kv_heads, pages);
        attend_tile(step, layer, tile(i), i % layer.kv_heads, qkv, pages, next, out, scratch);
    });
}

}  // namespace

extern "C" {

void attend_float32(const Step* step, const Layer* layer, float* qkv, float* pages, float* out) {
    attend(*step, *layer, qkv, pages, out);
}
void attend_bfloat16(const Step* step, const Layer* layer, float* qkv, bfloat16* pages, bfloat16* out) {
    attend(*step, *layer, qkv, pages, out);
}

}  // extern "C"
