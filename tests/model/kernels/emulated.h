// Instructions that this machine lacks, from SIMDe (https://github.com/simd-everywhere/simde), to be included before
// everything else. The kernels take them for the processor's own. For processors with AVX2.
//
// EMULATE_AVX512, EMULATE_VNNI, EMULATE_BF16 and EMULATE_AMX say which.

#pragma once

#include <immintrin.h>  // before the names below are macros

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

#ifdef EMULATE_AVX512
// What SIMDe does not have.
inline __m256i emulated_cvtepi32_epi16(simde__m512i wide) {
    typedef uint32_t wide_vector __attribute__((vector_size(64)));
    typedef uint16_t vector __attribute__((vector_size(32)));
    return (__m256i)__builtin_convertvector((wide_vector)wide, vector);
}
#define _mm512_cvtepi32_epi16 emulated_cvtepi32_epi16
#define __AVX512F__ 1
#define __AVX512BW__ 1
#ifdef EMULATE_VNNI
#define __AVX512VNNI__ 1
#endif
#ifdef EMULATE_BF16
#define __AVX512BF16__ 1
#endif
#ifdef EMULATE_AMX
// SIMDe has no tiles. These are as Intel's manual, volume 2, describes them, but keep subnormal numbers.
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstring>

struct EmulatedTile {
    int rows, row_bytes;
    uint8_t bytes[16][64];
};
inline thread_local EmulatedTile emulated_tiles[8];

template <typename T>
inline T emulated_at(const EmulatedTile& tile, int row, int column) {
    T value;
    std::memcpy(&value, tile.bytes[row] + column * sizeof(T), sizeof(T));
    return value;
}
inline void emulated_loadconfig(const void* from) {
    const uint8_t* config = static_cast<const uint8_t*>(from);
    for (int i = 0; i < 8; ++i) {
        emulated_tiles[i] = {};
        emulated_tiles[i].row_bytes = config[16 + 2 * i] | config[17 + 2 * i] << 8;
        emulated_tiles[i].rows = config[48 + i];
    }
}
inline void emulated_loadd(int to, const void* from, int64_t stride) {
    EmulatedTile& tile = emulated_tiles[to];
    std::memset(tile.bytes, 0, sizeof tile.bytes);
    for (int row = 0; row < tile.rows; ++row)
        std::memcpy(tile.bytes[row], static_cast<const char*>(from) + row * stride, tile.row_bytes);
}
inline void emulated_stored(int from, void* to, int64_t stride) {
    const EmulatedTile& tile = emulated_tiles[from];
    for (int row = 0; row < tile.rows; ++row)
        std::memcpy(static_cast<char*>(to) + row * stride, tile.bytes[row], tile.row_bytes);
}
inline float emulated_bfloat16(const EmulatedTile& tile, int row, int column) {
    const uint32_t bits = uint32_t(emulated_at<uint16_t>(tile, row, column)) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
inline void emulated_dpbf16ps(int to, int a, int b) {
    EmulatedTile& sums = emulated_tiles[to];
    const EmulatedTile &x = emulated_tiles[a], &weights = emulated_tiles[b];
    for (int row = 0; row < sums.rows; ++row)
        for (int column = 0; column < sums.row_bytes / 4; ++column) {
            float halves[2] = {};
            for (int k = 0; k < x.row_bytes / 4; ++k)
                for (int i = 0; i < 2; ++i)
                    halves[i] = std::fma(emulated_bfloat16(x, row, 2 * k + i),
                                         emulated_bfloat16(weights, k, 2 * column + i), halves[i]);
            const float sum = emulated_at<float>(sums, row, column) + (halves[0] + halves[1]);
            std::memcpy(sums.bytes[row] + 4 * column, &sum, 4);
        }
}
#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig emulated_loadconfig
#define _tile_release() ((void)0)
#define _tile_zero(tile) std::memset(emulated_tiles[tile].bytes, 0, sizeof emulated_tiles[tile].bytes)
#define _tile_loadd emulated_loadd
#define _tile_stored emulated_stored
#define _tile_dpbf16ps emulated_dpbf16ps
#define syscall(...) 0  // the request for tiles is granted
#define __AMX_TILE__ 1
#define __AMX_BF16__ 1
#endif
#elif defined(EMULATE_VNNI)
#define _mm256_dpbusd_avx_epi32 simde_mm256_dpbusd_epi32
#define __AVXVNNI__ 1
#endif
