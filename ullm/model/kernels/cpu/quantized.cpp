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

typedef uint8_t bytes __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int8_t signed_bytes __attribute__((vector_size(LANES), aligned(1)));

// Bytes of a group of inputs for COLUMNS outputs: codes, and in float16 scales and, with four bits, minima.
// Four-bit codes of even steps are the low halves of bytes, those of odd steps the high halves.
constexpr int64_t code_bytes(int64_t bits) { return COLUMNS * GROUP * bits / 8; }
constexpr int64_t group_bytes(int64_t bits) { return code_bytes(bits) + (bits == 8 ? 2 : 4) * COLUMNS; }

inline int32_t load_four(const int8_t* from) {
    int32_t four;
    std::memcpy(&four, from, 4);
    return four;
}

// sums + codes * x, four neighbouring products per sum; x repeats the same four inputs LANES times.
inline ints multiply_add(ints sums, bytes codes, int32_t four) {
#ifdef __AVX512VNNI__
    return (ints)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)codes, _mm512_set1_epi32(four));
#elif defined(__AVXVNNI__)
    return (ints)_mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)codes, _mm256_set1_epi32(four));
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

// AVX2 without VNNI adds pairs of products of bytes in 16 bits, which unsigned eight-bit codes can overflow.
// There codes become signed, and their sign moves to the inputs.
#if defined(__AVX2__) && !defined(__AVX512VNNI__) && !defined(__AVXVNNI__) && !defined(__AVX512F__)
#define ULLM_MADDUBS 1
constexpr bool SIGNED_CODES = true;
#else
constexpr bool SIGNED_CODES = false;
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
#ifdef __AVX512F__
    values = combine(values, __builtin_shufflevector(values, values, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4,
                                                     5, 6, 7));
    values = combine(values, __builtin_shufflevector(values, values, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8,
                                                     9, 10, 11));
    values = combine(values, __builtin_shufflevector(values, values, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14,
                                                     15, 12, 13));
    values = combine(values, __builtin_shufflevector(values, values, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13,
                                                     12, 15, 14));
#else
    values = combine(values, __builtin_shufflevector(values, values, 4, 5, 6, 7, 0, 1, 2, 3));
    values = combine(values, __builtin_shufflevector(values, values, 2, 3, 0, 1, 6, 7, 4, 5));
    values = combine(values, __builtin_shufflevector(values, values, 1, 0, 3, 2, 5, 4, 7, 6));
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
    signed_bytes* codes = reinterpret_cast<signed_bytes*>(to.codes.data() + group * GROUP);
    ints sums = {};
    for (int i = 0; i < PARTS; ++i) {
        const ints rounded = (ints)(values[i] * inverse + 12582912.0f) - 0x4B400000;  // see exponential()
        codes[i] = __builtin_convertvector(rounded, signed_bytes);
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

// dots += the products of the codes of a group for V neighbouring vectors of outputs.
template <int BITS, int R, int V>
inline void add_codes(const uint8_t* packed, const int8_t* x, int64_t stride, ints (&dots)[R][V]) {
#ifdef ULLM_MADDUBS
    const __m256i ones = _mm256_set1_epi16(1), low = _mm256_set1_epi8(15), zero = _mm256_set1_epi8(char(ZERO));
    if constexpr (BITS == 4) {
        // The sums of 16 products below 15 * 127 fit into 16 bits.
        __m256i sums[R][V] = {};
        for (int step = 0; step < GROUP / STEP; step += 2, packed += VECTORS * sizeof(bytes))
            for (int v = 0; v < V; ++v) {
                const __m256i codes = _mm256_loadu_si256((const __m256i*)(packed + v * sizeof(bytes)));
                const __m256i even = _mm256_and_si256(codes, low);
                const __m256i odd = _mm256_and_si256(_mm256_srli_epi16(codes, 4), low);
                for (int r = 0; r < R; ++r) {
                    const int8_t* inputs = x + r * stride + step * STEP;
                    const __m256i a = _mm256_maddubs_epi16(even, _mm256_set1_epi32(load_four(inputs)));
                    const __m256i b = _mm256_maddubs_epi16(odd, _mm256_set1_epi32(load_four(inputs + STEP)));
                    sums[r][v] = _mm256_add_epi16(sums[r][v], _mm256_add_epi16(a, b));
                }
            }
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < V; ++v) dots[r][v] += (ints)_mm256_madd_epi16(sums[r][v], ones);
        return;
    }
    for (int step = 0; step < GROUP / STEP; ++step, packed += VECTORS * sizeof(bytes))
        for (int v = 0; v < V; ++v) {
            const __m256i codes =
                _mm256_xor_si256(_mm256_loadu_si256((const __m256i*)(packed + v * sizeof(bytes))), zero);
            const __m256i sizes = _mm256_abs_epi8(codes);
            for (int r = 0; r < R; ++r) {
                const __m256i four = _mm256_set1_epi32(load_four(x + r * stride + step * STEP));
                const __m256i pairs = _mm256_maddubs_epi16(sizes, _mm256_sign_epi8(four, codes));
                dots[r][v] += (ints)_mm256_madd_epi16(pairs, ones);
            }
        }
#else
    for (int step = 0; step < GROUP / STEP; step += 8 / BITS, packed += VECTORS * sizeof(bytes))
        for (int v = 0; v < V; ++v) {
            const bytes codes = *reinterpret_cast<const bytes*>(packed + v * sizeof(bytes));
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
    const int64_t chunk = 8 * ROWS, chunks = (rows + chunk - 1) / chunk;
    // About 50 KB of weights at a time, but few enough that every thread has work.
    const int64_t together = std::max<int64_t>(1, std::min<int64_t>(48 / inputs.groups, all / 8));
    const int64_t pieces = (all + together - 1) / together, threads = pool().threads();
    // One row is limited by memory bandwidth anyway: prefetching would cost up to a tenth; with 2 to 4 rows
    // it saves as much.
    const bool fetch = rows > 1;
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
