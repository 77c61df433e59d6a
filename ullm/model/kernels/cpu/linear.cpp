// out = x * weight^T + bias, for few rows and for many.
//
// Inputs in float32 are multiplied by weights in float32 or in 16 bits, which are widened in registers:
// exactly, so the outputs are those of a copy of the weights in float32, which would take twice as long to read.
//
// Each output is summed over the inputs in ascending order, whatever is computed beside it, so a row has the
// same result alone and in any batch, bit by bit, on any number of threads. A text that is resumed after the
// loss of a worker, beside other texts and in other chunks, therefore continues unchanged.

#include <algorithm>

#include "dot.h"
#include "matrix.h"
#include "pool.h"
#include "tiles.h"

namespace {

// 4 vectors of outputs times 6 rows use 24 of the 32 registers of AVX-512. Measured with 512 rows in
// bfloat16 on two cores of Zen 5: 2 x 12 takes 1.7 times as long, 3 x 8 1.5 times. AVX2 has 16 registers of
// half the size, NEON 32 of a quarter: there the vectors of a tile are computed in several passes, see `at_once`.
constexpr int COLUMNS = 64;
constexpr int VECTORS = COLUMNS / LANES;
constexpr int ROWS = 6;

// Weights are packed in groups of COLUMNS outputs: for each step of the inputs, see dot.h, the weights of each
// output.

// The weights of LANES neighbouring outputs for one step.
template <typename W>
inline floats load_step(const float*, const W* weights) {
    return load_floats(weights);
}
inline uints load_step(const bfloat16*, const bfloat16* weights) {
    return load_vector<uints>(weights);
}

template <int R, typename X, typename W>
void tile(const X* x, int64_t stride, const W* weights, const Ahead& ahead, const float* bias, float* out,
          int64_t out_stride, int64_t steps, int64_t columns) {
    constexpr int V = at_once(R, VECTORS);
    float start[COLUMNS] = {}, all[R][COLUMNS];
    if (bias) std::copy(bias, bias + columns, start);
    for (int first = 0; first < VECTORS; first += V) {
        floats sums[R][V];
        for (int row = 0; row < R; ++row)
            for (int v = 0; v < V; ++v) sums[row][v] = load_floats(start + (first + v) * LANES);
        for (int64_t step = 0; step < steps; ++step) {
            if (first == 0) ahead.fetch(step);
            const W* here = weights + (step * COLUMNS + first * LANES) * STEP<X>;
            decltype(load_step(x, here)) vectors[V];
            for (int v = 0; v < V; ++v) vectors[v] = load_step(x, here + v * LANES * STEP<X>);
            for (int row = 0; row < R; ++row) {
                const X* inputs = x + row * stride + step * STEP<X>;
                for (int v = 0; v < V; ++v) sums[row][v] = multiply_add(sums[row][v], vectors[v], inputs);
            }
        }
        for (int row = 0; row < R; ++row)
            for (int v = 0; v < V; ++v) store_floats(all[row] + (first + v) * LANES, sums[row][v]);
    }
    for (int row = 0; row < R; ++row) std::copy(all[row], all[row] + columns, out + row * out_stride);
}

template <int R = ROWS, typename X, typename W>
void rows_tile(int64_t rows, const X* x, int64_t stride, const W* weights, const Ahead& ahead,
               const float* bias, float* out, int64_t out_stride, int64_t steps, int64_t columns) {
    if constexpr (R > 0) {
        if (rows == R) return tile<R>(x, stride, weights, ahead, bias, out, out_stride, steps, columns);
        rows_tile<R - 1>(rows, x, stride, weights, ahead, bias, out, out_stride, steps, columns);
    }
}

// How many rows `multiply_rows` takes at once at most.
template <typename X>
int64_t rows_at_once() {
#ifdef ULLM_AMX
    if (STEP<X> == 2 && has_tiles()) return 2 * TILE;
#endif
    return ROWS;
}

template <typename X, typename W>
void multiply_rows(int64_t rows, const X* x, int64_t stride, const W* weights, const Ahead& ahead,
                   const float* bias, float* out, int64_t out_stride, int64_t steps, int64_t columns) {
#ifdef ULLM_AMX
    if constexpr (STEP<X> == 2)
        if (has_tiles()) {
            float start[COLUMNS] = {}, all[2 * TILE * COLUMNS];
            if (bias) std::copy(bias, bias + columns, start);
            const bool whole = columns == COLUMNS;
            multiply_tiles({x, stride, weights, ahead, start, whole ? out : all, whole ? out_stride : COLUMNS}, rows);
            for (int64_t row = 0; !whole && row < rows; ++row)
                std::copy_n(all + row * COLUMNS, columns, out + row * out_stride);
            return;
        }
#endif
    rows_tile(rows, x, stride, weights, ahead, bias, out, out_stride, steps, columns);
}

inline int64_t groups(int64_t out_features) { return (out_features + COLUMNS - 1) / COLUMNS; }

template <typename X, typename W>
void linear(const Matrix& matrix, const X* x, float* out, int64_t rows) {
    const W* packed = static_cast<const W*>(matrix.packed);
    const int64_t in = matrix.inputs, steps = in / STEP<X>, group_size = in * COLUMNS;
    const int64_t threads = pool().threads(), at_once = rows_at_once<X>();
    const int64_t chunk = tuning.chunk_tiles * at_once, chunks = (rows + chunk - 1) / chunk;
    const int64_t all = groups(matrix.outputs);
    const bool fetch = rows > ROWS && tuning.prefetch;
    pool().run(chunks * all, [&](int64_t i) {
        const int64_t part = i / all * chunk, end = std::min(rows, part + chunk), group = i % all;
        const int64_t first = group * COLUMNS, columns = std::min<int64_t>(COLUMNS, matrix.outputs - first);
        const int64_t tiles = (end - part + at_once - 1) / at_once, lines = COLUMNS * STEP<X> * sizeof(W) / 64;
        // The weights that this thread multiplies next. Few rows are limited by memory bandwidth anyway, and
        // later chunks find the weights in the cache.
        const W* next =
            fetch && !part && group + threads < all ? packed + (group + threads) * group_size : nullptr;
        Ahead ahead{reinterpret_cast<const char*>(next), (lines + tiles - 1) / tiles};
        for (int64_t row = part; row < end; row += at_once) {
            multiply_rows(std::min(at_once, end - row), x + row * in, in, packed + group * group_size, ahead,
                          matrix.bias ? matrix.bias + first : nullptr, out + row * matrix.outputs + first,
                          matrix.outputs, steps, columns);
            if (next) ahead.from += steps * ahead.lines * 64;
        }
    });
}

// [out_features][in] -> groups, steps, COLUMNS, `each` inputs of a step; the last group is padded with zeros.
template <typename W>
void pack(const W* weight, W* packed, int64_t in, int64_t out_features, int64_t each) {
    const int64_t steps = in / each;
    for (int64_t group = 0; group < groups(out_features); ++group)
        for (int64_t step = 0; step < steps; ++step)
            for (int64_t column = 0; column < COLUMNS; ++column)
                for (int64_t i = 0; i < each; ++i) {
                    const int64_t row = group * COLUMNS + column;
                    *packed++ = row < out_features ? weight[row * in + step * each + i] : W{};
                }
}

}  // namespace

void multiply(const Matrix& matrix, const float* x, float* out, int64_t rows) {
    switch (matrix.format) {
        case Format::FLOAT32: return linear<float, float>(matrix, x, out, rows);
        case Format::BFLOAT16: return linear<float, bfloat16>(matrix, x, out, rows);
        case Format::FLOAT16: return linear<float, float16>(matrix, x, out, rows);
        case Format::QUANTIZED: return multiply_quantized(matrix, x, out, rows);
    }
}

void multiply(const Matrix& matrix, const bfloat16* x, float* out, int64_t rows) {
    if (matrix.format == Format::QUANTIZED) return multiply_quantized(matrix, x, out, rows);
    linear<bfloat16, bfloat16>(matrix, x, out, rows);
}

extern "C" {

const char* variant() { return has_tiles() ? VARIANT ULLM_TILES : VARIANT; }

void use_tuning(int64_t chunk_tiles, int64_t piece, int64_t prefetch) {
    tuning.chunk_tiles = chunk_tiles, tuning.piece = piece, tuning.prefetch = prefetch;
}

void use_threads(int64_t threads, int64_t cores) { pool().resize(int(threads), int(cores)); }

void linear_float32(const Matrix* matrix, const float* x, float* out, int64_t rows) {
    multiply(*matrix, x, out, rows);
}
void linear_bfloat16(const Matrix* matrix, const bfloat16* x, float* out, int64_t rows) {
    multiply(*matrix, x, out, rows);
}

// Pack weights for inputs in float32, or pairs of them for inputs in bfloat16.
void pack_float32(const void* weight, void* packed, int64_t bytes, int64_t in, int64_t out_features) {
    if (bytes == 4)
        pack(static_cast<const float*>(weight), static_cast<float*>(packed), in, out_features, 1);
    else
        pack(static_cast<const uint16_t*>(weight), static_cast<uint16_t*>(packed), in, out_features, 1);
}
void pack_bfloat16(const void* weight, void* packed, int64_t, int64_t in, int64_t out_features) {
    pack(static_cast<const uint16_t*>(weight), static_cast<uint16_t*>(packed), in, out_features, 2);
}

}  // extern "C"
