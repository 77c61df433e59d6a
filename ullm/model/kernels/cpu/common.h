// Floats and bfloat16, and vectors of them.
//
// This is plain C++20 with the vector extensions that GCC and Clang share, and intrinsics where a compiler
// makes slow code of those. A vector is one register: GCC computes vectors that are wider than a register
// element by element (measured with GCC 12: a tenth of the speed).
//
// The compiler's target decides what is used: ULLM_AVX512, ULLM_AVX2, ULLM_SSE or ULLM_NEON, else plain vectors
// of four.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) && defined(__AVX512BW__)
#include <immintrin.h>
#define ULLM_AVX512 1
#define ULLM_LANES 16
#define ULLM_REGISTERS 32
#elif defined(__AVX2__)
#include <immintrin.h>
#define ULLM_AVX2 1
#define ULLM_LANES 8
#define ULLM_REGISTERS 16
#elif defined(__aarch64__)
#include <arm_neon.h>
#define ULLM_NEON 1
#define ULLM_LANES 4
#define ULLM_REGISTERS 32
#else
#ifdef __SSSE3__
#include <immintrin.h>
#define ULLM_SSE 1
#endif
#define ULLM_LANES 4
#define ULLM_REGISTERS 16
#endif

#if defined(ULLM_AVX512)
#define ULLM_VECTORS "AVX-512"
#elif defined(ULLM_AVX2)
#define ULLM_VECTORS "AVX2"
#elif defined(ULLM_SSE)
#define ULLM_VECTORS "SSSE3"
#elif defined(ULLM_NEON)
#define ULLM_VECTORS "NEON"
#else
#define ULLM_VECTORS "plain C++"
#endif
#if (defined(ULLM_AVX512) && defined(__AVX512VNNI__)) || (defined(ULLM_AVX2) && defined(__AVXVNNI__))
#define ULLM_VNNI 1
#define ULLM_DOTS ", VNNI"
#elif defined(ULLM_NEON) && defined(__ARM_FEATURE_DOTPROD) && defined(__ARM_FEATURE_MATMUL_INT8)
#define ULLM_I8MM 1
#define ULLM_DOTS ", dotprod, i8mm"
#elif defined(ULLM_NEON) && defined(__ARM_FEATURE_DOTPROD)
#define ULLM_DOTS ", dotprod"
#else
#define ULLM_DOTS ""
#endif
#if (defined(ULLM_AVX512) && defined(__AVX512BF16__)) || \
    (defined(ULLM_NEON) && defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC))
#define ULLM_BF16 1
#define ULLM_PAIRS_OF_BF16 ", BF16"
#else
#define ULLM_PAIRS_OF_BF16 ""
#endif
#if defined(ULLM_AVX512) && defined(ULLM_BF16) && defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__linux__)
#define ULLM_AMX 1
#define ULLM_TILES ", AMX"
#else
#define ULLM_TILES ""
#endif

// The instructions that are used, for users; ULLM_TILES too where the process may use them, see tiles.h.
#define VARIANT ULLM_VECTORS ULLM_DOTS ULLM_PAIRS_OF_BF16

constexpr int LANES = ULLM_LANES;
constexpr int REGISTERS = ULLM_REGISTERS;

// How many of `vectors` neighbouring vectors to compute at once for `rows` rows, so that the sums, the
// weights and an input fit into registers. A divisor of `vectors`.
constexpr int at_once(int rows, int vectors) {
    while (vectors > 1 && rows * vectors > REGISTERS * 3 / 4) vectors /= 2;
    return vectors;
}

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t uints __attribute__((vector_size(4 * LANES)));
typedef uint16_t shorts __attribute__((vector_size(2 * LANES)));

// A vector in memory of any alignment: compilers make one instruction of the copy.
template <typename V>
inline V load_vector(const void* from) {
    V vector;
    std::memcpy(&vector, from, sizeof vector);
    return vector;
}

struct bfloat16 {
    uint16_t bits;
};
struct float16 {
    uint16_t bits;
};

inline float load(const float* from) { return *from; }
inline float load(const bfloat16* from) {
    const uint32_t bits = uint32_t(from->bits) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// Round to nearest, ties to even.
inline void store(float* to, float value) { *to = value; }
inline void store(bfloat16* to, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    to->bits = uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline floats load_floats(const float* from) { return load_vector<floats>(from); }
inline floats load_floats(const bfloat16* from) {
#if defined(ULLM_AVX512)  // GCC 12 compiles the conversion below to five instructions
    return (floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from)), 16);
#elif defined(ULLM_AVX2)
    return (floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)from)), 16);
#elif defined(ULLM_NEON)
    return (floats)vshll_n_u16(vld1_u16(&from->bits), 16);
#else
    const shorts halves = load_vector<shorts>(from);
    return (floats)(__builtin_convertvector(halves, uints) << 16);
#endif
}
inline floats load_floats(const float16* from) {
#if defined(ULLM_AVX512)
    return (floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
#elif defined(ULLM_AVX2) && defined(__F16C__)
    return (floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
#elif defined(ULLM_NEON)
    return (floats)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&from->bits)));
#else
    const uints bits = __builtin_convertvector(load_vector<shorts>(from), uints);
    const floats size = (floats)((bits & 0x7fff) << 13) * 5.192296858534828e33f;  // 2^112: the exponents' bias
    // Infinity and NaN keep their largest exponent.
    const uints special = (bits & 0x7c00) == 0x7c00 ? uints{} + 0x7f800000 : uints{};
    return (floats)((uints)size | special | (bits & 0x8000) << 16);
#endif
}
inline void store_floats(float* to, floats values) { std::memcpy(to, &values, sizeof values); }
inline void store_floats(bfloat16* to, floats values) {  // as store() does
    const uints bits = (uints)values;
    const uints rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
#if defined(ULLM_AVX512)
    const __m256i narrow = _mm512_cvtepi32_epi16((__m512i)rounded);
#elif defined(ULLM_NEON)
    const uint16x4_t narrow = vmovn_u32((uint32x4_t)rounded);
#else
    const shorts narrow = __builtin_convertvector(rounded, shorts);
#endif
    std::memcpy(to, &narrow, sizeof narrow);
}

inline float total(floats values) {
    float sum = 0;
    for (int i = 0; i < LANES; ++i) sum += values[i];
    return sum;
}

inline float sum_of_squares(const float* x, int64_t size) {
    floats sums = {};
    for (int64_t i = 0; i < size; i += LANES) sums += load_floats(x + i) * load_floats(x + i);
    return total(sums);
}

// exp(x) as 2^n * 2^f, with |f| <= 1/2 and 2^f by its Taylor series to the sixth power: the relative error is
// below 3e-7. Below -87 the result is 1.6e-38, which is negligible beside a largest weight of 1.
inline floats exponential(floats x) {
    x = x < -87.0f ? floats{} - 87.0f : x;
    x = (x > 88.0f ? floats{} + 88.0f : x) * 1.44269504f;
    const floats shifted = x + 12582912.0f;  // 1.5 * 2^23: adding it rounds to integers
    const floats f = (x - (shifted - 12582912.0f)) * 0.693147181f;
    const floats p =
        1 + f * (1 + f * (0.5f + f * (1 / 6.0f + f * (1 / 24.0f + f * (1 / 120.0f + f * (1 / 720.0f))))));
    const ints exponent = ((ints)shifted - 0x4B400000 + 127) << 23;
    return p * (floats)exponent;
}

// Weights to prefetch into the cache while others are multiplied: some lines in each step.
struct Ahead {
    const char* from;  // null: nothing
    int64_t lines;     // per step

    void fetch(int64_t step) const {
        if (!from) return;
        const char* line = from + step * lines * 64;
        for (int64_t i = 0; i < lines; ++i) __builtin_prefetch(line + i * 64, 0, 2);
    }
};
