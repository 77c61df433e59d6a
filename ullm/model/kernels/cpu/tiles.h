// Products of bfloat16 in AMX: registers of up to 16 rows of 64 bytes, and an instruction that multiplies two of them.
//
// Intel's manual (volume 2, TDPBF16PS): for each output, the products of the even inputs of a tile are summed, those of
// the odd ones beside them, and both sums are added to the output. A row's outputs do not depend on the other rows, so
// here too a row has the same result alone and in any batch.

#pragma once

#include "common.h"

#ifdef ULLM_AMX

#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>

constexpr int TILE = 16;                // rows of a tile, and the floats or pairs of one of its rows
constexpr int TILE_COLUMNS = 4 * TILE;  // outputs whose weights are packed together

// Whether the kernel of the operating system lets this process use the tiles: it asks once, for all of its threads.
inline bool has_tiles() {
    constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    static const bool allowed = syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
    return allowed;
}

// Rows of bfloat16, of which an even number of pairs is not always a whole tile, and the packed weights of
// TILE_COLUMNS outputs: [inputs / 2][TILE_COLUMNS][2].
struct TileProduct {
    const bfloat16* x;
    int64_t inputs;
    const bfloat16* weights;
    Ahead ahead;
    const float* start;  // TILE_COLUMNS floats: the bias, or zeros
    float* out;
    int64_t out_stride;
};

class Tiles {
  public:
    // Set the sizes: sums 0 to 3 and inputs 4 and 5 have as many rows as there are, 4 and 5 as many pairs of inputs as
    // 6 and 7 have rows of weights. Sums 2 and 3 are those of further rows, if there are any, else of further outputs.
    Tiles(int64_t rows, int64_t further, int pairs = TILE) {
        const uint8_t one = uint8_t(rows), two = uint8_t(further ? further : rows);
        const uint8_t sizes[8] = {one, one, two, two, one, two, uint8_t(pairs), uint8_t(pairs)};
        std::copy(sizes, sizes + 8, rows_);
        std::fill(row_bytes_, row_bytes_ + 8, uint16_t(4 * TILE));
        row_bytes_[4] = row_bytes_[5] = uint16_t(4 * pairs);
        _tile_loadconfig(this);
    }
    ~Tiles() { _tile_release(); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;

  private:
    // As the instruction reads it.
    uint8_t palette_ = 1, start_row_ = 0, reserved_[14] = {};
    uint16_t row_bytes_[16] = {};
    uint8_t rows_[16] = {};
};

// 16 rows, and further ones if there are any, times two vectors of outputs. Strides are in bytes.
inline void add_tiles_of_two(const void* x, const void* further, int64_t stride, const bfloat16* weights,
                             const bfloat16* next, int64_t weight_stride) {
    _tile_loadd(6, weights, weight_stride);
    _tile_loadd(4, x, stride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, next, weight_stride);
    _tile_dpbf16ps(1, 4, 7);
    if (!further) return;
    _tile_loadd(5, further, stride);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
}

// The sums of two vectors of outputs, of 16 rows and of further ones. Strides are in floats.
inline void store_tiles_of_two(float* out, float* next, int64_t stride, bool further) {
    _tile_stored(0, out, stride * 4);
    _tile_stored(1, next, stride * 4);
    if (!further) return;
    _tile_stored(2, out + TILE * stride, stride * 4);
    _tile_stored(3, next + TILE * stride, stride * 4);
}

inline void clear_sums() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

// Up to 16 rows times four vectors of outputs.
inline void add_tiles(const void* x, int64_t stride, const bfloat16* weights) {
    constexpr int64_t NEXT = 2 * TILE, ROW = 4 * TILE_COLUMNS;
    _tile_loadd(4, x, stride);
    _tile_loadd(6, weights, ROW);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, weights + NEXT, ROW);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(6, weights + 2 * NEXT, ROW);
    _tile_dpbf16ps(2, 4, 6);
    _tile_loadd(7, weights + 3 * NEXT, ROW);
    _tile_dpbf16ps(3, 4, 7);
}

// Call add(inputs, their stride in bytes, weights) for whole tiles of inputs, and for the rest filled up with zeros.
template <typename F>
void over_inputs(const TileProduct& product, int64_t rows, const F& add) {
    constexpr int64_t ACROSS = 2 * TILE;
    int64_t done = 0;
    for (; done + ACROSS <= product.inputs; done += ACROSS) {
        for (int64_t step = done / 2; step < done / 2 + TILE; ++step) product.ahead.fetch(step);
        add(product.x + done, product.inputs * 2, product.weights + done * TILE_COLUMNS);
    }
    const int64_t left = product.inputs - done;
    if (!left) return;
    bfloat16 x[2 * TILE * ACROSS] = {}, weights[ACROSS * TILE_COLUMNS] = {};
    for (int64_t row = 0; row < rows; ++row)
        std::copy_n(product.x + row * product.inputs + done, left, x + row * ACROSS);
    std::copy_n(product.weights + done * TILE_COLUMNS, left * TILE_COLUMNS, weights);
    for (int64_t step = done / 2; step < product.inputs / 2; ++step) product.ahead.fetch(step);
    add(x, ACROSS * 2, weights);
}

// At most 32 rows times all outputs that are packed together.
inline void multiply_tiles(const TileProduct& product, int64_t rows) {
    const int64_t stride = product.out_stride * 4, further = std::max<int64_t>(0, rows - TILE);
    const Tiles tiles(std::min<int64_t>(rows, TILE), further);
    float* const out = product.out;
    if (!further) {
        _tile_loadd(0, product.start, 0);
        _tile_loadd(1, product.start + TILE, 0);
        _tile_loadd(2, product.start + 2 * TILE, 0);
        _tile_loadd(3, product.start + 3 * TILE, 0);
        over_inputs(product, rows, add_tiles);
        _tile_stored(0, out, stride);
        _tile_stored(1, out + TILE, stride);
        _tile_stored(2, out + 2 * TILE, stride);
        _tile_stored(3, out + 3 * TILE, stride);
        return;
    }
    for (int first = 0; first < TILE_COLUMNS; first += 2 * TILE) {
        _tile_loadd(0, product.start + first, 0);
        _tile_loadd(1, product.start + first + TILE, 0);
        _tile_loadd(2, product.start + first, 0);
        _tile_loadd(3, product.start + first + TILE, 0);
        TileProduct here = product;
        if (first) here.ahead.from = nullptr;
        over_inputs(here, rows, [&](const bfloat16* x, int64_t row_bytes, const bfloat16* weights) {
            const bfloat16* const here = weights + 2 * first;
            add_tiles_of_two(x, x + TILE * row_bytes / 2, row_bytes, here, here + 2 * TILE, 4 * TILE_COLUMNS);
        });
        store_tiles_of_two(out + first, out + first + TILE, product.out_stride, true);
    }
}

#else

inline bool has_tiles() { return false; }

#endif
