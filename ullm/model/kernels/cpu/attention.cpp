// Attention over paged keys and values: normalise and rotate, store, attend.
//
// Sums are taken in float32, in an order that depends neither on the batch, nor on how a prompt was cut
// into chunks, nor on the number of threads; see linear.cpp. Keys are taken in parts of about PART_KEYS, each with
// a softmax of its own, and the parts are merged in ascending order, as in FlashAttention
// (https://arxiv.org/abs/2205.14135): the scores of a part stay in the cache, and the parts of a long context can
// be computed on several threads.

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <type_traits>
#include <vector>

#include "dot.h"
#include "layer.h"
#include "pool.h"
#include "tiles.h"

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

// Whether keys and values are multiplied in pairs. Without an instruction for that it would only cost.
#ifdef ULLM_BF16
template <typename T>
constexpr bool PAIRED = std::is_same_v<std::remove_const_t<T>, bfloat16>;
#else
template <typename T>
constexpr bool PAIRED = false;
#endif

// What keys are multiplied by: queries, and values: weights.
template <typename T>
using Factor = std::conditional_t<PAIRED<T>, bfloat16, float>;

// The numbers of LANES neighbouring keys, or outputs, for one step.
template <typename T>
inline auto load_step(const T* from) {
    if constexpr (PAIRED<T>)
        return load_vector<uints>(from);
    else
        return load_floats(from);
}

// The pages of one layer are [block][KV head][keys, values]: keys as [head_dim][block_size], so that scores
// of neighbouring keys are computed side by side, and values as [block_size][head_dim]. Where they are paired,
// keys are [head_dim / 2][block_size][2] and values [block_size / 2][head_dim][2], with an even block_size.
template <typename T>
inline int64_t page_keys(int64_t block_size) {
    return PAIRED<T> ? (block_size + 1) / 2 * 2 : block_size;
}
template <typename T>
inline T* page_of(T* pages, const Step& step, const Layer& layer, int64_t block, int64_t head) {
    return pages + (block * layer.kv_heads + head) * 2 * page_keys<T>(step.block_size) * layer.head_dim;
}
template <typename T>
inline T* values_of(T* page, const Step& step, const Layer& layer) {
    return page + page_keys<T>(step.block_size) * layer.head_dim;
}

// Store the key or the value of one token at `offset` of its block.
template <typename T>
inline void store_key(T* page, const float* key, int64_t offset, int64_t keys, int64_t dim) {
    constexpr int EACH = PAIRED<T> ? 2 : 1;
    for (int64_t i = 0; i < dim; ++i) store(page + (i / EACH * keys + offset) * EACH + i % EACH, key[i]);
}
template <typename T>
inline void store_value(T* values, const float* value, int64_t offset, int64_t dim, bool is_last) {
    constexpr int EACH = PAIRED<T> ? 2 : 1;
    T* const to = values + offset / EACH * dim * EACH + offset % EACH;
    if (EACH == 1) {
        for (int64_t i = 0; i < dim; i += LANES) store_floats(to + i, load_floats(value + i));
    } else {
        for (int64_t i = 0; i < dim; ++i) store(to + i * EACH, value[i]);
    }
    // The other of the pair may be left over from another sequence, and its weight of 0 does not help against a NaN.
    if (PAIRED<T> && is_last && offset % 2 == 0)
        for (int64_t i = 0; i < dim; ++i) store(to + i * EACH + 1, 0.0f);
}

// Normalise and rotate queries and keys in place, and store keys and values in their pages.
template <typename T>
void rotate_and_store(const Step& step, const Layer& layer, float* qkv, T* pages) {
    const int64_t dim = layer.head_dim, half = layer.rotary / 2, size = step.block_size;
    const int64_t all = layer.heads + 2 * layer.kv_heads;
    in_pieces(step.tokens, 8, [&](int64_t token, int64_t end) {
        for (; token < end; ++token) {
            float* row = qkv + token * all * dim;
            const float* cosines = layer.cosines + step.positions[token] * half;
            const float* sines = layer.sines + step.positions[token] * half;
            if (layer.q_norm && !layer.norm_heads) {
                normalize(row, layer.q_norm, layer.norm_eps, layer.heads * dim);
                normalize(row + layer.heads * dim, layer.k_norm, layer.norm_eps, layer.kv_heads * dim);
            }
            for (int64_t head = 0; head < layer.heads + layer.kv_heads; ++head) {
                const float* weight = head < layer.heads ? layer.q_norm : layer.k_norm;
                if (weight && layer.norm_heads) normalize(row + head * dim, weight, layer.norm_eps, dim);
                rotate(row + head * dim, cosines, sines, half);
            }
            const int64_t block = step.slots[token] / size, offset = step.slots[token] % size;
            const bool is_last = offset + 1 == size || token + 1 == step.tokens ||
                                 step.slots[token + 1] != step.slots[token] + 1;
            for (int64_t head = 0; head < layer.kv_heads; ++head) {
                const float* key = row + (layer.heads + head) * dim;
                T* page = page_of(pages, step, layer, block, head);
                store_key(page, key, offset, page_keys<T>(size), dim);
                store_value(values_of(page, step, layer), key + layer.kv_heads * dim, offset, dim, is_last);
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
                page_end_ = line_ + 2 * page_keys<T>(step_.block_size) * layer_.head_dim * sizeof(T);
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
void score(const Factor<T>* queries, const T* const* keys, const int64_t* places, float* scores,
           int64_t score_stride, int64_t dim, int64_t size, NextPages<T>& next) {
    constexpr int N = at_once(R, K), EACH = STEP<Factor<T>>;
    for (int first = 0; first < K; first += N) {
        floats sums[R][N] = {};
        for (int64_t i = 0; i < dim; i += EACH) {
            if (first == 0) next.fetch(K * LANES * EACH / 32);
            for (int k = 0; k < N; ++k) {
                const auto key = load_step(keys[first + k] + i * size);
                for (int r = 0; r < R; ++r) sums[r][k] = multiply_add(sums[r][k], key, queries + r * dim + i);
            }
        }
        for (int r = 0; r < R; ++r)
            for (int k = 0; k < N; ++k) store_floats(scores + r * score_stride + places[first + k], sums[r][k]);
    }
}

// Add `count` weighted values to LANES * V neighbouring outputs of R queries.
template <int R, int V, typename T>
void add_values(const Factor<T>* weights, int64_t weight_stride, const T* values, float* out, int64_t count,
                int64_t dim, NextPages<T>& next) {
    constexpr int N = at_once(R, V), EACH = STEP<Factor<T>>;
    for (int first = 0; first < V; first += N) {
        floats sums[R][N];
        float* const to = out + first * LANES;
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < N; ++v) sums[r][v] = load_floats(to + r * dim + v * LANES);
        for (int64_t key = 0; key < count; key += EACH) {
            if (first == 0) next.fetch(V * LANES * EACH / 32);
            for (int v = 0; v < N; ++v) {
                const auto value = load_step(values + key * dim + (first + v) * LANES * EACH);
                for (int r = 0; r < R; ++r)
                    sums[r][v] = multiply_add(sums[r][v], value, weights + r * weight_stride + key);
            }
        }
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < N; ++v) store_floats(to + r * dim + v * LANES, sums[r][v]);
    }
}

template <int R, typename T>
void add_all_values(const Factor<T>* weights, int64_t weight_stride, const T* values, float* out, int64_t count,
                    int64_t dim, NextPages<T>& next) {
    constexpr int EACH = STEP<Factor<T>>;
    int64_t i = 0;
    for (; i + BESIDE * LANES <= dim; i += BESIDE * LANES)
        add_values<R, BESIDE>(weights, weight_stride, values + i * EACH, out + i, count, dim, next);
    for (; i < dim; i += LANES)
        add_values<R, 1>(weights, weight_stride, values + i * EACH, out + i, count, dim, next);
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

// Soft caps of Gemma 2, arXiv:2408.00118: cap * tanh(score / cap), with tanh(x) = 1 - 2 / (1 + exp(2 x)).
void cap_scores(float* scores, int64_t first, int64_t end, float cap) {
    const auto capped = [cap](floats x) { return cap - 2 * cap / (1 + exponential(x * (2 / cap))); };
    int64_t i = first;
    for (; i + LANES <= end; i += LANES) store_floats(scores + i, capped(load_floats(scores + i)));
    for (; i < end; ++i) scores[i] = capped(floats{} + scores[i])[0];
}

// Turn the scores of the keys first ... end - 1, of which there is one at least, into weights and all others into
// zeros; return the sum of the weights. `most` becomes the largest score.
float softmax(float* scores, int64_t first, int64_t end, int64_t width, float& most) {
    std::fill(scores, scores + first, 0.0f), std::fill(scores + end, scores + width, 0.0f);
    most = largest(scores + first, end - first);
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

constexpr int64_t PART_KEYS = 512;

// The queries of one tile that share one KV head: `tokens` neighbouring tokens of a sequence times the query
// heads of the group.
template <typename T>
struct Queries {
    const Step& step;
    const Layer& layer;
    const T* pages;
    const int32_t* table;
    int64_t head, token, dim, group, rows, first_block, last_block, part_blocks;

    Queries(const Step& step, const Layer& layer, const int32_t* tile, int64_t head, const T* pages)
        : step(step), layer(layer), pages(pages), table(step.tables + tile[0] * step.table_width), head(head),
          token(tile[1]), dim(layer.head_dim), group(layer.heads / layer.kv_heads), rows(tile[2] * group),
          part_blocks(std::max<int64_t>(1, PART_KEYS / step.block_size)) {
        std::tie(first_block, last_block) = blocks_of(step, layer, tile);
    }

    // Parts have fixed places in the context, so that no result depends on where a tile begins.
    int64_t first_part() const { return first_block / part_blocks; }
    int64_t end_part() const { return (last_block + part_blocks - 1) / part_blocks; }

    // The keys that a row sees: the first, and the end.
    std::pair<int64_t, int64_t> sees(int64_t row) const {
        const int64_t end = step.positions[token + row / group] + 1;
        return {layer.window ? std::max<int64_t>(0, end - layer.window) : 0, end};
    }
};

// For each row of some queries: weighted values, the sum of the weights, and the largest score. A sum of 0 means
// that the row sees no key.
struct Attended {
    float *values, *sums, *most;

    static int64_t size(int64_t rows, int64_t dim) { return rows * (dim + 2); }
    Attended(float* memory, int64_t rows, int64_t dim)
        : values(memory), sums(memory + rows * dim), most(sums + rows) {}

    void merge(const Attended& part, int64_t rows, int64_t dim) {
        for (int64_t row = 0; row < rows; ++row) {
            if (part.sums[row] == 0) continue;
            const float next = sums[row] == 0 ? part.most[row] : std::max(most[row], part.most[row]);
            const float old_scale = sums[row] == 0 ? 0 : exponential(floats{} + (most[row] - next))[0];
            const float scale = exponential(floats{} + (part.most[row] - next))[0];
            float *to = values + row * dim, *from = part.values + row * dim;
            for (int64_t i = 0; i < dim; ++i) to[i] = to[i] * old_scale + from[i] * scale;
            sums[row] = sums[row] * old_scale + part.sums[row] * scale;
            most[row] = next;
        }
    }
};

template <typename F>
void by_rows(int64_t rows, const F& function) {
    int64_t row = 0;
    for (; row + TOGETHER <= rows; row += TOGETHER) function(std::integral_constant<int, TOGETHER>{}, row);
    if (rows - row >= 3) function(std::integral_constant<int, 3>{}, row), row += 3;
    if (rows - row == 2) function(std::integral_constant<int, 2>{}, row);
    if (rows - row == 1) function(std::integral_constant<int, 1>{}, row);
}

#ifdef ULLM_AMX
constexpr int64_t STRIP = 2 * TILE;  // rows that tiles compute at once

// Whether tiles fit. That depends on the model and the size of blocks alone, never on what is computed beside.
inline bool tiles_fit(const Step& step, const Layer& layer) {
    return has_tiles() && step.block_size % TILE == 0 && layer.head_dim % (2 * TILE) == 0;
}

// Scores of all queries with the keys of some blocks: [rows][stride], TILE keys after TILE keys.
inline void score_tiles(const Queries<bfloat16>& q, const bfloat16* queries, int64_t first_block, int64_t vectors,
                        float* scores, int64_t stride, NextPages<bfloat16>& next) {
    const int64_t dim = q.dim, size = q.step.block_size, each = size / TILE;
    const auto keys_of = [&](int64_t vector) {
        return page_of(q.pages, q.step, q.layer, q.table[first_block + vector / each], q.head) +
               vector % each * 2 * TILE;
    };
    for (int64_t row = 0; row < q.rows; row += STRIP) {
        const int64_t rows = std::min(q.rows - row, STRIP), further = std::max<int64_t>(0, rows - TILE);
        const Tiles tiles(rows - further, further);
        for (int64_t vector = 0; vector < vectors; vector += 2) {
            const int64_t other = std::min(vector + 1, vectors - 1);  // the last one may be alone
            const bfloat16 *keys = keys_of(vector), *next_keys = keys_of(other);
            clear_sums();
            for (int64_t i = 0; i < dim; i += 2 * TILE) {
                if (row == 0) next.fetch(2 * TILE);
                const bfloat16* const from = queries + row * dim + i;
                add_tiles_of_two(from, further ? from + TILE * dim : nullptr, 2 * dim, keys + i * size,
                                 next_keys + i * size, 4 * size);
            }
            float* const to = scores + row * stride;
            store_tiles_of_two(to + vector * TILE, to + other * TILE, stride, further > 0);
        }
    }
}

// Weighted values of the keys from `begin` to `end`, of which the first is that of a block: [rows][dim]. Weights are
// [rows][stride].
inline void add_value_tiles(const Queries<bfloat16>& q, const bfloat16* weights, int64_t stride, int64_t begin,
                            int64_t end, float* out, NextPages<bfloat16>& next) {
    const int64_t dim = q.dim, size = q.step.block_size;
    // What is behind the last key may be left over from another sequence; see store_value().
    thread_local std::vector<bfloat16> last;
    const auto values_at = [&](int64_t key) {
        const bfloat16* page = page_of(q.pages, q.step, q.layer, q.table[key / size], q.head);
        return values_of(page, q.step, q.layer) + key % size * dim;
    };
    const int64_t whole = begin + (end - begin) / TILE * TILE;
    if (whole < end) {
        last.assign(TILE * dim, bfloat16{});
        std::copy_n(values_at(whole), (end - whole + 1) / 2 * 2 * dim, last.data());
    }
    for (int64_t row = 0; row < q.rows; row += STRIP) {
        const int64_t rows = std::min(q.rows - row, STRIP), further = std::max<int64_t>(0, rows - TILE);
        const Tiles tiles(rows - further, further, TILE / 2);
        for (int64_t first = 0; first < dim; first += 2 * TILE) {
            clear_sums();
            for (int64_t key = begin; key < end; key += TILE) {
                if (row == 0) next.fetch(TILE);
                const bfloat16* const values = (key < whole ? values_at(key) : last.data()) + 2 * first;
                const bfloat16* const from = weights + row * stride + key - begin;
                add_tiles_of_two(from, further ? from + TILE * stride : nullptr, 2 * stride, values,
                                 values + 2 * TILE, 4 * dim);
            }
            float* const to = out + row * dim + first;
            store_tiles_of_two(to, to + TILE, dim, further > 0);
        }
    }
}
#endif

// Attend to the keys of one part.
template <typename T>
void attend_part(const Queries<T>& q, const float* qkv, int64_t part, NextPages<T>& next, Attended to) {
    const int64_t dim = q.dim, size = q.step.block_size, rows = q.rows;
    const int64_t first_block = std::max(q.first_block, part * q.part_blocks);
    const int64_t last_block = std::min(q.last_block, (part + 1) * q.part_blocks);
    const int64_t width = (last_block - first_block) * size, begin = first_block * size;
    const int64_t stride = width + LANES;  // scores are stored LANES at a time
    constexpr int EACH = STEP<Factor<T>>;
    const int64_t keys_of_page = page_keys<T>(size);
    thread_local std::vector<float> scratch;
    thread_local std::vector<Factor<T>> factors;
    scratch.resize(rows * stride), factors.resize(rows * (PAIRED<T> ? stride + dim : dim));
    float* scores = scratch.data();
    Factor<T>* queries = factors.data();
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t all = q.layer.heads + 2 * q.layer.kv_heads;
        const float* query = qkv + ((q.token + row / q.group) * all + q.head * q.group + row % q.group) * dim;
        for (int64_t i = 0; i < dim; i += LANES)
            store_floats(queries + row * dim + i, load_floats(query + i) * q.layer.scale);
    }
    bool with_tiles = false;
#ifdef ULLM_AMX
    if constexpr (PAIRED<T>)
        if ((with_tiles = tiles_fit(q.step, q.layer)))
            score_tiles(q, queries, first_block, width / TILE, scores, stride, next);
#endif
    // In ascending order: in blocks smaller than a vector, the following scores overwrite the excess.
    const int64_t each = (size + LANES - 1) / LANES, vectors = (last_block - first_block) * each;
    for (int64_t vector = 0; !with_tiles && vector < vectors; vector += BESIDE) {
        const T* keys[BESIDE];
        int64_t places[BESIDE];
        const int64_t count = std::min<int64_t>(BESIDE, vectors - vector);
        for (int64_t k = 0; k < count; ++k) {
            const int64_t block = (vector + k) / each, lane = (vector + k) % each * LANES;
            keys[k] = page_of(q.pages, q.step, q.layer, q.table[first_block + block], q.head) +
                      lane * EACH;
            places[k] = block * size + lane;
        }
        by_rows(rows, [&](auto r, int64_t row) {
            constexpr int R = r.value;
            const Factor<T>* from = queries + row * dim;
            float* to = scores + row * stride;
            if (count == BESIDE) return score<R, BESIDE>(from, keys, places, to, stride, dim, keys_of_page, next);
            for (int64_t k = 0; k < count; ++k)
                score<R, 1>(from, keys + k, places + k, to, stride, dim, keys_of_page, next);
        });
    }
    int64_t seen = begin;  // the end of the keys that some row sees
    for (int64_t row = 0; row < rows; ++row) {
        auto [from, end] = q.sees(row);
        from = std::max(from, begin), end = std::min(end, begin + width), seen = std::max(seen, end);
        float* const row_scores = scores + row * stride;
        to.sums[row] = to.most[row] = 0;
        if (from < end && q.layer.softcap) cap_scores(row_scores, from - begin, end - begin, q.layer.softcap);
        if (from < end)
            to.sums[row] = softmax(row_scores, from - begin, end - begin, width, to.most[row]);
        else
            std::fill(row_scores, row_scores + width, 0.0f);
        std::fill(row_scores + width, row_scores + stride, 0.0f);
        if constexpr (PAIRED<T>)
            for (int64_t i = 0; i < width + EACH; i += LANES)
                store_floats(queries + rows * dim + row * stride + i, load_floats(row_scores + i));
    }
    const Factor<T>* weights;
    if constexpr (PAIRED<T>)
        weights = queries + rows * dim;
    else
        weights = scores;
#ifdef ULLM_AMX
    if constexpr (PAIRED<T>)
        if (with_tiles) return add_value_tiles(q, weights, stride, begin, seen, to.values, next);
#endif
    std::fill(to.values, to.values + rows * dim, 0.0f);
    for (int64_t block = first_block; block * size < seen; ++block) {
        const T* page = page_of(q.pages, q.step, q.layer, q.table[block], q.head);
        const T* values = values_of(page, q.step, q.layer);
        by_rows(rows, [&](auto r, int64_t row) {
            add_all_values<r.value>(weights + row * stride + block * size - begin, stride, values,
                                    to.values + row * dim, std::min(size, seen - block * size), dim, next);
        });
    }
}

template <typename T>
void store_attended(const Queries<T>& q, const Attended& attended, T* out) {
    for (int64_t row = 0; row < q.rows; ++row) {
        T* to = out + ((q.token + row / q.group) * q.layer.heads + q.head * q.group + row % q.group) * q.dim;
        for (int64_t i = 0; i < q.dim; i += LANES)
            store_floats(to + i, load_floats(attended.values + row * q.dim + i) / attended.sums[row]);
    }
}

// Attend to all keys, part by part.
template <typename T>
void attend_tile(const Queries<T>& q, const float* qkv, NextPages<T> next, T* out) {
    thread_local std::vector<float> memory;
    const int64_t size = Attended::size(q.rows, q.dim);
    memory.resize(2 * size);
    Attended all(memory.data(), q.rows, q.dim), other(memory.data() + size, q.rows, q.dim);
    attend_part(q, qkv, q.first_part(), next, all);
    for (int64_t part = q.first_part() + 1; part < q.end_part(); ++part) {
        attend_part(q, qkv, part, next, other);
        all.merge(other, q.rows, q.dim);
    }
    store_attended(q, all, out);
}

// Attend with the parts of each tile on any thread.
template <typename T>
void attend_parts(const std::vector<Queries<T>>& tiles, const float* qkv, T* out) {
    struct Piece {
        int64_t tile, part;
        float* memory;
    };
    thread_local std::vector<float> scratch;
    std::vector<Piece> pieces;
    std::vector<int64_t> first(1);  // piece of each tile
    int64_t total = 0;
    for (const Queries<T>& q : tiles) {
        total += (q.end_part() - q.first_part()) * Attended::size(q.rows, q.dim);
        first.push_back(first.back() + q.end_part() - q.first_part());
    }
    scratch.resize(total);
    float* memory = scratch.data();
    for (size_t tile = 0; tile < tiles.size(); ++tile)
        for (int64_t part = tiles[tile].first_part(); part < tiles[tile].end_part(); ++part) {
            pieces.push_back({int64_t(tile), part, memory});
            memory += Attended::size(tiles[tile].rows, tiles[tile].dim);
        }
    pool().run(int64_t(pieces.size()), [&](int64_t i) {
        const Queries<T>& q = tiles[pieces[i].tile];
        NextPages<T> none(q.step, q.layer, nullptr, q.head, q.pages);
        attend_part(q, qkv, pieces[i].part, none, Attended(pieces[i].memory, q.rows, q.dim));
    });
    for (size_t tile = 0; tile < tiles.size(); ++tile) {
        const Queries<T>& q = tiles[tile];
        Attended all(pieces[first[tile]].memory, q.rows, q.dim);
        for (int64_t piece = first[tile] + 1; piece < first[tile + 1]; ++piece)
            all.merge(Attended(pieces[piece].memory, q.rows, q.dim), q.rows, q.dim);
        store_attended(q, all, out);
    }
}

constexpr int64_t FEW = 4;  // tiles per thread, below which some threads would wait long for the last one

template <typename T>
void attend(const Step& step, const Layer& layer, float* qkv, T* pages, T* out) {
    rotate_and_store(step, layer, qkv, pages);
    const int64_t count = step.num_tiles * layer.kv_heads, threads = pool().threads();
    const auto tile = [&](int64_t index) { return step.tiles + 3 * (index / layer.kv_heads); };
    const auto queries = [&](int64_t i) { return Queries<T>(step, layer, tile(i), i % layer.kv_heads, pages); };
    if (threads > 1 && count < FEW * threads) {
        std::vector<Queries<T>> tiles;
        for (int64_t i = 0; i < count; ++i) tiles.push_back(queries(i));
        return attend_parts(tiles, qkv, out);
    }
    // The longest first: a prompt's tiles are in ascending order, so start at the end.
    pool().run(count, [&](int64_t number) {
        const int64_t i = count - 1 - number, then = i - threads;
        NextPages<T> next(step, layer, then < 0 ? nullptr : tile(then), then % layer.kv_heads, pages);
        attend_tile(queries(i), qkv, next, out);
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
