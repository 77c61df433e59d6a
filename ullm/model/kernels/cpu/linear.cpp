// out = x * weight^T + bias, for few rows and for many.
//
// Each output is summed over the inputs in ascending order, whatever is computed beside it, so a row has the
// same result alone and in any batch, bit by bit, on any number of threads. A text that is resumed after the
// loss of a worker, beside other texts and in other chunks, therefore continues unchanged.

#include <algorithm>

#include "common.h"
#include "pool.h"
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

// 4 vectors of outputs times 6 rows use 24 of the 32 registers of AVX-512. Measured with 512 rows in
// bfloat16 on two cores of Zen 5: 2 x 12 takes 1.7 times as long, 3 x 8 1.5 times. AVX2 has 16 registers of
// half the size: there the vectors of a tile are computed in several passes, see `at_once`.
constexpr int COLUMNS = 64;
constexpr int VECTORS = COLUMNS / LANES;
constexpr int ROWS = 6;

// Weights are packed in groups of COLUMNS outputs: for each step of the inputs, the weights of each output.
// In bfloat16 a step is two inputs, which one instruction of the processor multiplies.
template <typename T>
constexpr int STEP = 1;
template <>
constexpr int STEP<bfloat16> = 2;

inline floats multiply_add(floats sum, const float* weights, const float* x) {
    return sum + load_floats(weights) * *x;
}
inline floats multiply_add(floats sum, const bfloat16* weights, const bfloat16* x) {
#ifdef __AVX512BF16__
    int32_t pair;
    std::memcpy(&pair, x, 4);
    return (floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_loadu_si512(weights),
                                    (__m512bh)_mm512_set1_epi32(pair));
#else
    const uints pairs = *reinterpret_cast<const uints*>(weights);
    sum += (floats)(pairs << 16) * load(x);
    return sum + (floats)(pairs & 0xffff0000u) * load(x + 1);
#endif
}

template <typename T, int R>
void tile(const T* x, int64_t stride, const T* weights, const Ahead& ahead, const float* bias, float* out,
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
            const T* here = weights + (step * COLUMNS + first * LANES) * STEP<T>;
            for (int row = 0; row < R; ++row) {
                const T* inputs = x + row * stride + step * STEP<T>;
                for (int v = 0; v < V; ++v)
                    sums[row][v] = multiply_add(sums[row][v], here + v * LANES * STEP<T>, inputs);
            }
        }
        for (int row = 0; row < R; ++row)
            for (int v = 0; v < V; ++v) store_floats(all[row] + (first + v) * LANES, sums[row][v]);
    }
    for (int row = 0; row < R; ++row) std::copy(all[row], all[row] + columns, out + row * out_stride);
}

template <typename T, int R = ROWS>
void rows_tile(int64_t rows, const T* x, int64_t stride, const T* weights, const Ahead& ahead,
               const float* bias, float* out, int64_t out_stride, int64_t steps, int64_t columns) {
    if constexpr (R > 0) {
        if (rows == R) return tile<T, R>(x, stride, weights, ahead, bias, out, out_stride, steps, columns);
        rows_tile<T, R - 1>(rows, x, stride, weights, ahead, bias, out, out_stride, steps, columns);
    }
}

inline int64_t groups(int64_t out_features) { return (out_features + COLUMNS - 1) / COLUMNS; }

template <typename T>
void linear(const T* x, const T* packed, const float* bias, float* out, int64_t rows, int64_t in,
            int64_t out_features) {
    const int64_t steps = in / STEP<T>, group_size = in * COLUMNS, threads = pool().threads();
    const int64_t chunk = 8 * ROWS, chunks = (rows + chunk - 1) / chunk, all = groups(out_features);
    pool().run(chunks * all, [&](int64_t i) {
        const int64_t part = i / all * chunk, end = std::min(rows, part + chunk), group = i % all;
        const int64_t first = group * COLUMNS, columns = std::min<int64_t>(COLUMNS, out_features - first);
        const int64_t tiles = (end - part + ROWS - 1) / ROWS, lines = COLUMNS * STEP<T> * sizeof(T) / 64;
        // The weights that this thread multiplies next. Few rows are limited by memory bandwidth anyway, and
        // later chunks find the weights in the cache.
        const T* next = rows > ROWS && !part && group + threads < all ? packed + (group + threads) * group_size
                                                                     : nullptr;
        Ahead ahead{reinterpret_cast<const char*>(next), (lines + tiles - 1) / tiles};
        for (int64_t row = part; row < end; row += ROWS) {
            rows_tile<T>(std::min<int64_t>(ROWS, end - row), x + row * in, in, packed + group * group_size,
                         ahead, bias ? bias + first : nullptr, out + row * out_features + first, out_features,
                         steps, columns);
            if (next) ahead.from += steps * ahead.lines * 64;
        }
    });
}

// [out_features][in] -> groups, steps, COLUMNS, STEP; the last group is padded with zeros.
template <typename T>
void pack(const T* weight, T* packed, int64_t in, int64_t out_features) {
    const int64_t steps = in / STEP<T>;
    for (int64_t group = 0; group < groups(out_features); ++group)
        for (int64_t step = 0; step < steps; ++step)
            for (int64_t column = 0; column < COLUMNS; ++column)
                for (int i = 0; i < STEP<T>; ++i) {
                    const int64_t row = group * COLUMNS + column;
                    *packed++ = row < out_features ? weight[row * in + step * STEP<T> + i] : T{};
                }
}

}  // namespace

extern "C" {

void use_threads(int64_t threads) { pool().resize(int(threads)); }

void linear_float32(const float* x, const float* packed, const float* bias, float* out, int64_t rows,
                    int64_t in, int64_t out_features) {
    linear(x, packed, bias, out, rows, in, out_features);
}
void linear_bfloat16(const bfloat16* x, const bfloat16* packed, const float* bias, float* out, int64_t rows,
                     int64_t in, int64_t out_features) {
    linear(x, packed, bias, out, rows, in, out_features);
}
void pack_float32(const float* weight, float* packed, int64_t in, int64_t out_features) {
    pack(weight, packed, in, out_features);
}
void pack_bfloat16(const bfloat16* weight, bfloat16* packed, int64_t in, int64_t out_features) {
    pack(weight, packed, in, out_features);
}

}  // extern "C"
