// out = x * weight^T + bias, with weights of eight or four bits and inputs of eight.
//
// Weights and inputs are in groups of 32 neighbouring inputs, each group with a scale of its own, as in
// llama.cpp's Q8_0, Q4_1 and Q8_1. Sums within a group are integers and thus exact. Sums over the groups are
// float32, in ascending order, whatever is computed beside them; see linear.cpp.

#include <algorithm>
#include <vector>

#include "matrix.h"
#include "pool.h"

namespace {

// Neighbouring outputs whose weights have the same number of bits: `count` of them, from `first` on.
struct Part {
    int64_t bits, first, count;
    int64_t offset;  // of the weights, in bytes from the start of the packed data
};

// The start of packed weights. `num_parts` parts follow, and then, aligned, the weights.
struct Header {
    int64_t num_parts, reserved[7];

    const Part* parts() const { return reinterpret_cast<const Part*>(this + 1); }
    const uint8_t* weights(const Part& part) const {
        return reinterpret_cast<const uint8_t*>(this) + part.offset;
    }
};

constexpr int GROUP = 32;
constexpr int STEP = 4;  // inputs that one instruction of the processor multiplies
// 2 vectors of outputs times 6 rows, once as integers and once as float32, use 24 of the 32 registers of
// AVX-512. With 16 registers the vectors are computed in several passes, see `at_once`.
constexpr int COLUMNS = 32;
constexpr int VECTORS = COLUMNS / LANES;
constexpr int ROWS = 6;
constexpr int ZERO = 128;  // the eight-bit code of zero: the instruction takes unsigned weights

typedef uint8_t bytes __attribute__((vector_size(4 * LANES)));
typedef int8_t signed_bytes __attribute__((vector_size(LANES)));

// Bytes of a group of inputs for COLUMNS outputs: codes, and in float16 scales and, with four bits, minima.
// Four-bit codes of even steps are the low halves of bytes, those of odd steps the high halves.
constexpr int64_t code_bytes(int64_t bits) { return COLUMNS * GROUP * bits / 8; }
constexpr int64_t group_bytes(int64_t bits) { return code_bytes(bits) + (bits == 8 ? 2 : 4) * COLUMNS; }

inline int32_t load_four(const int8_t* from) {
    int32_t four;
    std::memcpy(&four, from, 4);
    return four;
}
inline bytes repeat(int32_t four) { return (bytes)(ints{} + four); }

// Whether the processor multiplies four unsigned codes by four signed ones and adds all products in 32 bits. If it
// does not, or only with signed codes, codes become signed, so that nothing has to be subtracted for their zero.
#if defined(ULLM_VNNI)
constexpr bool SIGNED_CODES = false;
#elif defined(ULLM_AVX512) || defined(ULLM_AVX2) || defined(ULLM_SSE)
#define ULLM_PAIRS 1
constexpr bool SIGNED_CODES = true;
#elif defined(ULLM_NEON)
constexpr bool SIGNED_CODES = true;
#else
constexpr bool SIGNED_CODES = false;
#endif

#ifndef ULLM_PAIRS
// sums + codes * x, four neighbouring products per sum; x repeats the same four inputs LANES times.
inline ints multiply_add(ints sums, bytes codes, int32_t four) {
#if defined(ULLM_AVX512)
    return (ints)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)codes, _mm512_set1_epi32(four));
#elif defined(ULLM_AVX2)
    return (ints)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)codes, _mm256_set1_epi32(four));
#elif defined(ULLM_NEON)
    const int8x16_t a = vreinterpretq_s8_u8((uint8x16_t)codes), b = vreinterpretq_s8_s32(vdupq_n_s32(four));
#ifdef __ARM_FEATURE_DOTPROD
    return (ints)vdotq_s32((int32x4_t)sums, a, b);
#else
    const int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(a), vget_low_s8(b)));
    const int32x4_t high = vpaddlq_s16(vmull_high_s8(a, b));
    return sums + (ints)vpaddq_s32(low, high);
#endif
#else
    typedef int16_t products __attribute__((vector_size(8 * LANES)));
    typedef int32_t pairs __attribute__((vector_size(8 * LANES)));
    typedef int8_t all __attribute__((vector_size(4 * LANES)));
    const products product = __builtin_convertvector(codes, products) *
                             __builtin_convertvector((all)(ints{} + four), products);
    const pairs two = ((pairs)product << 16 >> 16) + ((pairs)product >> 16);
    typedef int64_t quads __attribute__((vector_size(8 * LANES)));
    return sums + __builtin_convertvector((quads)two, ints) + __builtin_convertvector((quads)two >> 32, ints);
#endif
}
#else
// x86 processors without VNNI add pairs of products of bytes in 16 bits, which unsigned eight-bit codes can
// overflow. There the sign of the codes moves to the inputs.
typedef int16_t words __attribute__((vector_size(4 * LANES)));

#if defined(ULLM_AVX512)
inline words sums_of_two(bytes sizes, bytes inputs) {
    return (words)_mm512_maddubs_epi16((__m512i)sizes, (__m512i)inputs);
}
inline ints sums_of_two(words a) { return (ints)_mm512_madd_epi16((__m512i)a, _mm512_set1_epi16(1)); }
inline bytes sizes_of(bytes codes) { return (bytes)_mm512_abs_epi8((__m512i)codes); }
inline bytes with_signs_of(bytes codes, bytes inputs) {
    const __mmask64 negative = _mm512_movepi8_mask((__m512i)codes);
    return (bytes)_mm512_mask_sub_epi8((__m512i)inputs, negative, _mm512_setzero_si512(), (__m512i)inputs);
}
#elif defined(ULLM_AVX2)
inline words sums_of_two(bytes sizes, bytes inputs) {
    return (words)_mm256_maddubs_epi16((__m256i)sizes, (__m256i)inputs);
}
inline ints sums_of_two(words a) { return (ints)_mm256_madd_epi16((__m256i)a, _mm256_set1_epi16(1)); }
inline bytes sizes_of(bytes codes) { return (bytes)_mm256_abs_epi8((__m256i)codes); }
inline bytes with_signs_of(bytes codes, bytes inputs) {
    return (bytes)_mm256_sign_epi8((__m256i)inputs, (__m256i)codes);
}
#else
inline words sums_of_two(bytes sizes, bytes inputs) {
    return (words)_mm_maddubs_epi16((__m128i)sizes, (__m128i)inputs);
}
inline ints sums_of_two(words a) { return (ints)_mm_madd_epi16((__m128i)a, _mm_set1_epi16(1)); }
inline bytes sizes_of(bytes codes) { return (bytes)_mm_abs_epi8((__m128i)codes); }
inline bytes with_signs_of(bytes codes, bytes inputs) {
    return (bytes)_mm_sign_epi8((__m128i)inputs, (__m128i)codes);
}
#endif
#endif

// Inputs as codes times scales.
struct Inputs {
    int64_t groups;
    std::vector<int8_t> codes;   // [rows][groups][GROUP]
    std::vector<float> scales;   // [rows][groups]
    std::vector<int32_t> start;  // -ZERO times the sum of the codes
    std::vector<float> sums;     // scale times the sum of the codes

    void resize(int64_t rows, int64_t in) {
        groups = (in + GROUP - 1) / GROUP;
        codes.resize(rows * groups * GROUP);
        scales.resize(rows * groups), start.resize(rows * groups), sums.resize(rows * groups);
    }
};

// Reduce all lanes, by halves.
template <typename F>
inline int32_t reduce(ints values, const F& combine) {
#if ULLM_LANES == 16
    values = combine(values, __builtin_shufflevector(values, values, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4,
                                                     5, 6, 7));
    values = combine(values, __builtin_shufflevector(values, values, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8,
                                                     9, 10, 11));
    values = combine(values, __builtin_shufflevector(values, values, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14,
                                                     15, 12, 13));
    values = combine(values, __builtin_shufflevector(values, values, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13,
                                                     12, 15, 14));
#elif ULLM_LANES == 8
    values = combine(values, __builtin_shufflevector(values, values, 4, 5, 6, 7, 0, 1, 2, 3));
    values = combine(values, __builtin_shufflevector(values, values, 2, 3, 0, 1, 6, 7, 4, 5));
    values = combine(values, __builtin_shufflevector(values, values, 1, 0, 3, 2, 5, 4, 7, 6));
#else
    values = combine(values, __builtin_shufflevector(values, values, 2, 3, 0, 1));
    values = combine(values, __builtin_shufflevector(values, values, 1, 0, 3, 2));
#endif
    return values[0];
}
inline int32_t largest(ints values) {
    return reduce(values, [](ints a, ints b) { return a > b ? a : b; });
}
inline int32_t total(ints values) {
    return reduce(values, [](ints a, ints b) { return a + b; });
}

// Quantize one group, of which `count` inputs exist: the largest becomes 127. Floats without sign compare as
// integers.
template <typename T>
void quantize_group(const T* x, int64_t count, Inputs& to, int64_t group) {
    constexpr int PARTS = GROUP / LANES;
    floats values[PARTS];
    ints sizes = {};
    for (int i = 0; i < PARTS; ++i) {
        values[i] = count > i * LANES ? load_floats(x + i * LANES) : floats{};
        const ints size = (ints)values[i] & 0x7fffffff;
        sizes = size > sizes ? size : sizes;
    }
    const int32_t bits = largest(sizes);
    float most;
    std::memcpy(&most, &bits, 4);
    const float inverse = most > 0 ? 127 / most : 0, scale = most / 127;
    int8_t* codes = to.codes.data() + group * GROUP;
    ints sums = {};
    for (int i = 0; i < PARTS; ++i) {
        const ints rounded = (ints)(values[i] * inverse + 12582912.0f) - 0x4B400000;  // see exponential()
        const signed_bytes narrow = __builtin_convertvector(rounded, signed_bytes);
        std::memcpy(codes + i * LANES, &narrow, LANES);
        sums += rounded;
    }
    const int32_t sum = total(sums);
    to.scales[group] = scale, to.start[group] = SIGNED_CODES ? 0 : -ZERO * sum, to.sums[group] = scale * sum;
}

template <typename T>
void quantize(const T* x, Inputs& to, int64_t rows, int64_t in) {
    to.resize(rows, in);
    in_pieces(rows, 8, [&](int64_t row, int64_t end) {
        for (; row < end; ++row)
            for (int64_t group = 0; group < to.groups; ++group)
                quantize_group(x + row * in + group * GROUP, in - group * GROUP, to, row * to.groups + group);
    });
}

#ifdef ULLM_I8MM
// Twice STEP codes of LANES neighbouring outputs.
struct Codes {
    int8x16_t first, second;
};
template <int BITS>
inline Codes load_codes(const uint8_t* packed) {
    const uint8x16_t a = vld1q_u8(packed);
    if constexpr (BITS == 4)
        return {vreinterpretq_s8_u8(vandq_u8(a, vdupq_n_u8(15))), vreinterpretq_s8_u8(vshrq_n_u8(a, 4))};
    const uint8x16_t b = vld1q_u8(packed + VECTORS * sizeof(bytes)), zero = vdupq_n_u8(ZERO);
    return {vreinterpretq_s8_u8(veorq_u8(a, zero)), vreinterpretq_s8_u8(veorq_u8(b, zero))};
}

// As add_codes(), for an even number of rows. The instruction multiplies eight codes of each of two rows by those of
// each of two outputs.
template <int BITS, int R, int V>
inline void add_codes_of_pairs(const uint8_t* packed, const int8_t* x, int64_t stride, ints (&dots)[R][V]) {
    int32x4_t sums[R / 2][V][2] = {};
    for (int step = 0; step < GROUP; step += 2 * STEP, packed += BITS / 4 * VECTORS * sizeof(bytes)) {
        int8x16_t inputs[R / 2];
        for (int r = 0; r < R / 2; ++r)
            inputs[r] = vcombine_s8(vld1_s8(x + 2 * r * stride + step), vld1_s8(x + (2 * r + 1) * stride + step));
        for (int v = 0; v < V; ++v) {
            const Codes codes = load_codes<BITS>(packed + v * sizeof(bytes));
            const int32x4_t a = vreinterpretq_s32_s8(codes.first), b = vreinterpretq_s32_s8(codes.second);
            const int8x16_t low = vreinterpretq_s8_s32(vzip1q_s32(a, b));
            const int8x16_t high = vreinterpretq_s8_s32(vzip2q_s32(a, b));
            for (int r = 0; r < R / 2; ++r) {
                sums[r][v][0] = vmmlaq_s32(sums[r][v][0], inputs[r], low);
                sums[r][v][1] = vmmlaq_s32(sums[r][v][1], inputs[r], high);
            }
        }
    }
    for (int r = 0; r < R / 2; ++r)
        for (int v = 0; v < V; ++v) {
            const int64x2_t low = vreinterpretq_s64_s32(sums[r][v][0]), high = vreinterpretq_s64_s32(sums[r][v][1]);
            dots[2 * r][v] += (ints)vzip1q_s64(low, high);
            dots[2 * r + 1][v] += (ints)vzip2q_s64(low, high);
        }
}
#endif

// dots += the products of the codes of a group for V neighbouring vectors of outputs.
template <int BITS, int R, int V>
inline void add_codes(const uint8_t* packed, const int8_t* x, int64_t stride, ints (&dots)[R][V]) {
#ifdef ULLM_PAIRS
    if constexpr (BITS == 4) {
        // The sums of 16 products below 15 * 127 fit into 16 bits.
        words sums[R][V] = {};
        for (int step = 0; step < GROUP / STEP; step += 2, packed += VECTORS * sizeof(bytes))
            for (int v = 0; v < V; ++v) {
                const bytes codes = load_vector<bytes>(packed + v * sizeof(bytes));
                const bytes even = codes & 15, odd = codes >> 4;
                for (int r = 0; r < R; ++r) {
                    const int8_t* inputs = x + r * stride + step * STEP;
                    const words a = sums_of_two(even, repeat(load_four(inputs)));
                    sums[r][v] += a + sums_of_two(odd, repeat(load_four(inputs + STEP)));
                }
            }
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < V; ++v) dots[r][v] += sums_of_two(sums[r][v]);
        return;
    }
    for (int step = 0; step < GROUP / STEP; ++step, packed += VECTORS * sizeof(bytes))
        for (int v = 0; v < V; ++v) {
            const bytes codes = load_vector<bytes>(packed + v * sizeof(bytes)) ^ ZERO;
            const bytes sizes = sizes_of(codes);
            for (int r = 0; r < R; ++r) {
                const bytes inputs = repeat(load_four(x + r * stride + step * STEP));
                dots[r][v] += sums_of_two(sums_of_two(sizes, with_signs_of(codes, inputs)));
            }
        }
#else
#ifdef ULLM_I8MM
    if constexpr (R % 2 == 0) return add_codes_of_pairs<BITS>(packed, x, stride, dots);
#endif
    for (int step = 0; step < GROUP / STEP; step += 8 / BITS, packed += VECTORS * sizeof(bytes))
        for (int v = 0; v < V; ++v) {
            bytes codes = load_vector<bytes>(packed + v * sizeof(bytes));
            if constexpr (BITS == 8 && SIGNED_CODES) codes ^= ZERO;
            for (int r = 0; r < R; ++r) {
                const int8_t* inputs = x + r * stride + step * STEP;
                if constexpr (BITS == 8) {
                    dots[r][v] = multiply_add(dots[r][v], codes, load_four(inputs));
                } else {
                    dots[r][v] = multiply_add(dots[r][v], codes & 15, load_four(inputs));
                    dots[r][v] = multiply_add(dots[r][v], codes >> 4, load_four(inputs + STEP));
                }
            }
        }
#endif
}

// sums += the dots of a group times the scales of weights and inputs.
template <int BITS, int R>
inline void add_group(const Inputs& x, int64_t first, const uint8_t* packed, floats (&sums)[R][VECTORS]) {
    // With few registers the sums stay in memory, and only the dots in registers.
    constexpr int V = at_once(R, VECTORS);
    const float16* scales = reinterpret_cast<const float16*>(packed + code_bytes(BITS));
    for (int begin = 0; begin < VECTORS; begin += V) {
        ints dots[R][V];
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < V; ++v)
                dots[r][v] = BITS == 8 ? ints{} + x.start[first + r * x.groups] : ints{};
        add_codes<BITS, R, V>(packed + begin * sizeof(bytes), x.codes.data() + first * GROUP, x.groups * GROUP,
                              dots);
        for (int v = 0; v < V; ++v) {
            const int column = begin + v;
            const floats scale = load_floats(scales + column * LANES);
            for (int r = 0; r < R; ++r)
                sums[r][column] +=
                    __builtin_convertvector(dots[r][v], floats) * (scale * x.scales[first + r * x.groups]);
            if constexpr (BITS == 4) {
                const floats minimum = load_floats(scales + COLUMNS + column * LANES);
                for (int r = 0; r < R; ++r) sums[r][column] += minimum * x.sums[first + r * x.groups];
            }
        }
    }
}

template <int BITS, int R>
void tile(const Inputs& x, int64_t row, const uint8_t* packed, const Ahead& ahead, const float* bias,
          float* out, int64_t stride, int64_t columns) {
    floats sums[R][VECTORS] = {};
    for (int64_t group = 0; group < x.groups; ++group, packed += group_bytes(BITS)) {
        ahead.fetch(group);
        add_group<BITS, R>(x, row * x.groups + group, packed, sums);
    }
    for (int r = 0; r < R; ++r) {
        float all[COLUMNS];
        for (int v = 0; v < VECTORS; ++v) store_floats(all + v * LANES, sums[r][v]);
        if (bias)
            for (int64_t i = 0; i < columns; ++i) all[i] += bias[i];
        std::copy(all, all + columns, out + r * stride);
    }
}

template <int BITS, int R = ROWS>
void rows_tile(int64_t rows, const Inputs& x, int64_t row, const uint8_t* packed, const Ahead& ahead,
               const float* bias, float* out, int64_t stride, int64_t columns) {
    if constexpr (R > 0) {
        if (rows == R) return tile<BITS, R>(x, row, packed, ahead, bias, out, stride, columns);
        rows_tile<BITS, R - 1>(rows, x, row, packed, ahead, bias, out, stride, columns);
    }
}

inline int64_t column_groups(int64_t outputs) { return (outputs + COLUMNS - 1) / COLUMNS; }

// One column group of a part.
struct Columns {
    int64_t bits, first, count;
    const uint8_t* packed;
};

Columns find_columns(const Header& header, int64_t number, int64_t groups) {
    const Part* part = header.parts();
    for (; number >= column_groups(part->count); ++part) number -= column_groups(part->count);
    const int64_t before = number * COLUMNS;
    return {part->bits, part->first + before, std::min<int64_t>(COLUMNS, part->count - before),
            header.weights(*part) + number * groups * group_bytes(part->bits)};
}

// Compute the outputs of some columns for the rows from `row` to `end`, while the next weights are
// prefetched.
void multiply(const Columns& columns, const Inputs& x, int64_t row, int64_t end, const uint8_t* next,
              const float* bias, float* out, int64_t stride) {
    const auto function = columns.bits == 8 ? rows_tile<8> : rows_tile<4>;
    const int64_t tiles = (end - row + ROWS - 1) / ROWS, lines = group_bytes(columns.bits) / 64;
    Ahead ahead{reinterpret_cast<const char*>(next), (lines + tiles - 1) / tiles};
    for (; row < end; row += ROWS) {
        function(std::min<int64_t>(ROWS, end - row), x, row, columns.packed, ahead,
                 bias ? bias + columns.first : nullptr, out + row * stride + columns.first, stride,
                 columns.count);
        if (next) ahead.from += x.groups * ahead.lines * 64;
    }
}

template <typename T>
void linear(const Matrix& matrix, const T* x, float* out, int64_t rows) {
    const Header& header = *static_cast<const Header*>(matrix.packed);
    thread_local Inputs scratch;
    Inputs& inputs = scratch;
    quantize(x, inputs, rows, matrix.inputs);
    int64_t all = 0;
    for (int64_t i = 0; i < header.num_parts; ++i) all += column_groups(header.parts()[i].count);
    const int64_t chunk = tuning.chunk_tiles * ROWS, chunks = (rows + chunk - 1) / chunk;
    // About 50 KB of weights at a time, but few enough that every thread has work.
    const int64_t together = std::max<int64_t>(1, std::min<int64_t>(tuning.piece / inputs.groups, all / 8));
    const int64_t pieces = (all + together - 1) / together, threads = pool().threads();
    // One row is limited by memory bandwidth anyway: prefetching would cost up to a tenth; with 2 to 4 rows
    // it saves as much.
    const bool fetch = rows > 1 && tuning.prefetch;
    pool().run(chunks * pieces, [&](int64_t i) {
        const int64_t row = i / pieces * chunk, end = std::min(rows, row + chunk);
        const int64_t from = i % pieces * together, to = std::min(all, from + together);
        for (int64_t group = from; group < to; ++group) {
            const int64_t next = group + 1 < to ? group + 1 : from + threads * together;
            const bool known = fetch && row == 0 && next < all;  // later chunks find the weights in the cache
            multiply(find_columns(header, group, inputs.groups), inputs, row, end,
                     known ? find_columns(header, next, inputs.groups).packed : nullptr, matrix.bias, out,
                     matrix.outputs);
        }
    });
}

// The weights of COLUMNS outputs for one group of inputs.
void pack_group(int64_t bits, const uint8_t* codes, const uint16_t* scales, const uint16_t* minima,
                uint8_t* packed, int64_t in, int64_t outputs, int64_t first, int64_t group) {
    const int64_t columns = std::min<int64_t>(COLUMNS, outputs - first), begin = group * GROUP;
    std::fill(packed, packed + group_bytes(bits), uint8_t(0));
    uint16_t* values = reinterpret_cast<uint16_t*>(packed + code_bytes(bits));
    for (int64_t column = 0; column < columns; ++column) {
        const uint8_t* row = codes + (first + column) * in;
        for (int64_t i = 0; i < std::min<int64_t>(GROUP, in - begin); ++i) {
            const int64_t step = i / STEP;
            if (bits == 8)
                packed[(step * COLUMNS + column) * STEP + i % STEP] = row[begin + i];
            else
                packed[(step / 2 * COLUMNS + column) * STEP + i % STEP] |= row[begin + i] << step % 2 * 4;
        }
        const int64_t source = (first + column) * ((in + GROUP - 1) / GROUP) + group;
        values[column] = scales[source];
        if (bits == 4) values[COLUMNS + column] = minima[source];
    }
}

}  // namespace

void multiply_quantized(const Matrix& matrix, const float* x, float* out, int64_t rows) {
    linear(matrix, x, out, rows);
}
void multiply_quantized(const Matrix& matrix, const bfloat16* x, float* out, int64_t rows) {
    linear(matrix, x, out, rows);
}

extern "C" {

int64_t quantized_group_bytes(int64_t bits) { return group_bytes(bits); }

// Pack one part's weights: codes [outputs][in], scales and minima [outputs][groups] in float16. Padding is
// zero.
void pack_quantized(int64_t bits, const uint8_t* codes, const uint16_t* scales, const uint16_t* minima,
                    uint8_t* packed, int64_t in, int64_t outputs) {
    const int64_t groups = (in + GROUP - 1) / GROUP;
    for (int64_t number = 0; number < column_groups(outputs); ++number)
        for (int64_t group = 0; group < groups; ++group, packed += group_bytes(bits))
            pack_group(bits, codes, scales, minima, packed, in, outputs, number * COLUMNS, group);
}

}  // extern "C"
