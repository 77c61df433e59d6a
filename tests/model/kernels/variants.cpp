// The kernels without Python, to be compiled for any processor and run on it or in an emulator.
//
// Each line of the output is an operation and a digest of its results. The program ends with 1, and says where, if
// results depend on the batch or on the number of threads, or are not what plain loops over numbers give.
//
// PRODUCTS_ONLY leaves out all but linear layers.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

#include "layer.h"
#include "matrix.h"

extern "C" {
struct SamplingFilter {
    double temperature, top_k, top_p, min_p, uniform;
};
const char* variant();
void use_threads(int64_t threads, int64_t cores);
void linear_float32(const Matrix*, const float*, float*, int64_t rows);
void linear_bfloat16(const Matrix*, const bfloat16*, float*, int64_t rows);
void pack_float32(const void* weight, void* packed, int64_t bytes, int64_t in, int64_t outputs);
void pack_bfloat16(const void* weight, void* packed, int64_t bytes, int64_t in, int64_t outputs);
int64_t quantized_group_bytes(int64_t bits);
void pack_quantized(int64_t bits, const uint8_t*, const uint16_t*, const uint16_t*, uint8_t*, int64_t, int64_t);
void add_rms_norm_float32(float*, const float*, const float*, float*, int64_t rows, int64_t size, float eps);
void gate_and_mul_float32(const float*, float*, int64_t rows, int64_t size, int64_t gelu);
void choose_tokens(const float*, int64_t, int64_t, int64_t, const SamplingFilter*, int64_t*);
}

namespace {

template <typename T>
using Vector = std::vector<T>;

uint64_t state = 1;
double uniform() {  // splitmix64, https://prng.di.unimi.it/splitmix64.c
    uint64_t z = (state += 0x9e3779b97f4a7c15);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9, z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return double((z ^ (z >> 31)) >> 11) / double(1ull << 53);
}

Vector<float> numbers(size_t count) {
    Vector<float> all(count);
    for (float& number : all) number = float(uniform() * 2 - 1);
    return all;
}
Vector<bfloat16> rounded(const Vector<float>& from) {
    Vector<bfloat16> all(from.size());
    for (size_t i = 0; i < from.size(); ++i) store(&all[i], from[i]);
    return all;
}
Vector<float> widened(const Vector<bfloat16>& from) {
    Vector<float> all(from.size());
    for (size_t i = 0; i < from.size(); ++i) all[i] = load(&from[i]);
    return all;
}

bool failed = false;
void expect(bool holds, const char* what) {
    if (!holds) std::printf("WRONG %s\n", what), failed = true;
}
template <typename T>
bool same(const T* a, const T* b, size_t count) {
    return !std::memcmp(a, b, count * sizeof(T));
}
bool close(const Vector<float>& a, const Vector<double>& b, double tolerance) {
    double error = 0, size = 0;
    for (size_t i = 0; i < a.size(); ++i) error += (a[i] - b[i]) * (a[i] - b[i]), size += b[i] * b[i];
    return a.size() == b.size() && std::sqrt(error) <= tolerance * std::sqrt(size);
}
template <typename T>
void print(const char* name, const Vector<T>& values) {
    uint64_t digest = 0xcbf29ce484222325;  // FNV-1a
    const unsigned char* bytes = reinterpret_cast<const unsigned char*>(values.data());
    for (size_t i = 0; i < values.size() * sizeof(T); ++i) digest = (digest ^ bytes[i]) * 0x100000001b3;
    std::printf("%s %016llx\n", name, static_cast<unsigned long long>(digest));
}

// Compute all rows on three threads, then each row alone on one, and the first few rows together.
template <typename X>
Vector<float> multiply_rows(const char* name, const Vector<X>& x, const Matrix& matrix, int64_t rows,
                            void (*linear)(const Matrix*, const X*, float*, int64_t)) {
    Vector<float> all(rows * matrix.outputs), alone(matrix.outputs);
    use_threads(3, 4);
    linear(&matrix, x.data(), all.data(), rows);
    use_threads(1, 4);
    for (int64_t row = 0; row < rows; ++row) {
        linear(&matrix, x.data() + row * matrix.inputs, alone.data(), 1);
        expect(same(alone.data(), all.data() + row * matrix.outputs, matrix.outputs), name);
    }
    for (int64_t count = 2; count < 8; ++count) {
        Vector<float> few(count * matrix.outputs);
        linear(&matrix, x.data(), few.data(), count);
        expect(same(few.data(), all.data(), few.size()), name);
    }
    print(name, all);
    return all;
}

constexpr int64_t ROWS = 40, IN = 96, OUT = 100;

// One product and sum as the compiler makes it for this processor: fused where it has such an instruction.
float fused(float sum, float a, float b) {
#if defined(__FMA__) || defined(__aarch64__)
    return std::fma(a, b, sum);
#else
    volatile float product = a * b;
    return sum + product;
#endif
}

// In ascending order, as the kernels promise.
Vector<float> products(const Vector<float>& x, const Vector<float>& weight, const Vector<float>& bias) {
    Vector<float> out(ROWS * OUT);
    for (int64_t row = 0; row < ROWS; ++row)
        for (int64_t o = 0; o < OUT; ++o) {
            float sum = bias[o];
            for (int64_t i = 0; i < IN; ++i) sum = fused(sum, weight[o * IN + i], x[row * IN + i]);
            out[row * OUT + o] = sum;
        }
    return out;
}
Vector<double> exact(const Vector<float>& x, const Vector<float>& weight, const Vector<float>& bias) {
    Vector<double> out(ROWS * OUT);
    for (int64_t row = 0; row < ROWS; ++row)
        for (int64_t o = 0; o < OUT; ++o) {
            double sum = bias[o];
            for (int64_t i = 0; i < IN; ++i) sum += double(weight[o * IN + i]) * x[row * IN + i];
            out[row * OUT + o] = sum;
        }
    return out;
}

uint16_t half(float value) {  // a normal number that float16 has
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return uint16_t(bits >> 16 & 0x8000) | uint16_t(((bits >> 13) - (112 << 10)) & 0x7fff);
}

void linear_layers() {
    const Vector<float> x = numbers(ROWS * IN), bias = numbers(OUT);
    Vector<float> weight = numbers(OUT * IN);
    const auto packed_like = [&](size_t bytes) { return Vector<char>(2 * 64 * IN * bytes); };
    const auto run = [&](const char* name, const void* source, int64_t bytes, Format format, const Vector<float>& w) {
        Vector<char> packed = packed_like(bytes);
        pack_float32(source, packed.data(), bytes, IN, OUT);
        const Matrix matrix{packed.data(), bias.data(), IN, OUT, format};
        const Vector<float> got = multiply_rows(name, x, matrix, ROWS, linear_float32), want = products(x, w, bias);
        expect(same(got.data(), want.data(), got.size()), name);
    };
    run("float32 weights", weight.data(), 4, Format::FLOAT32, weight);
    const Vector<bfloat16> narrow = rounded(weight);
    run("bfloat16 weights", narrow.data(), 2, Format::BFLOAT16, widened(narrow));
    Vector<uint16_t> halves(weight.size());
    Vector<float> wide(weight.size());
    for (size_t i = 0; i < weight.size(); ++i) {
        wide[i] = std::copysign((1 + std::floor(1024 * std::fabs(weight[i])) / 1024) / 8, weight[i]);
        halves[i] = half(wide[i]);
    }
    run("float16 weights", halves.data(), 2, Format::FLOAT16, wide);

    Vector<char> packed = packed_like(2);
    pack_bfloat16(narrow.data(), packed.data(), 2, IN, OUT);
    const Matrix matrix{packed.data(), bias.data(), IN, OUT, Format::BFLOAT16};
    const Vector<bfloat16> inputs = rounded(x);
    const Vector<float> got = multiply_rows("bfloat16 arithmetic", inputs, matrix, ROWS, linear_bfloat16);
    expect(close(got, exact(widened(inputs), widened(narrow), bias), 1e-6), "bfloat16 arithmetic");

    // Inputs that do not fill whole tiles, see tiles.h: the last 16 are not there.
    const int64_t fewer = IN - 16;
    Vector<bfloat16> short_inputs(ROWS * fewer), short_weights(OUT * fewer);
    Vector<float> zeros = widened(inputs), short_zeros = widened(narrow);
    const auto cut = [&](const Vector<bfloat16>& from, Vector<bfloat16>& to, Vector<float>& zeroed) {
        for (size_t i = 0; i < from.size(); ++i)
            if (int64_t(i % IN) < fewer)
                to[i / IN * fewer + i % IN] = from[i];
            else
                zeroed[i] = 0;
    };
    cut(inputs, short_inputs, zeros), cut(narrow, short_weights, short_zeros);
    pack_bfloat16(short_weights.data(), packed.data(), 2, fewer, OUT);
    const Matrix narrower{packed.data(), bias.data(), fewer, OUT, Format::BFLOAT16};
    const Vector<float> less = multiply_rows("fewer inputs", short_inputs, narrower, ROWS, linear_bfloat16);
    expect(close(less, exact(zeros, short_zeros, bias), 1e-6), "fewer inputs");
}

struct Codes {
    Vector<int> codes;
    float scale;
    int sum = 0;
};
Codes coded(const float* x) {  // 32 inputs; see quantized.cpp
    float most = 0;
    for (int i = 0; i < 32; ++i) most = std::max(most, std::fabs(x[i]));
    Codes to{Vector<int>(32), most / 127};
    const float inverse = most > 0 ? 127 / most : 0;
    for (int i = 0; i < 32; ++i) to.sum += to.codes[i] = int(fused(12582912.0f, x[i], inverse) - 12582912.0f);
    return to;
}

void quantized(int64_t bits, const char* name) {
    const int64_t groups = IN / 32, zero = bits == 8 ? 128 : 0;
    const Vector<float> x = numbers(ROWS * IN), bias = numbers(OUT);
    Vector<uint8_t> codes(OUT * IN);
    for (uint8_t& code : codes) code = uint8_t(uniform() * (bits == 8 ? 256 : 16));
    codes[0] = 0, codes[1] = bits == 8 ? 255 : 15, codes[2] = 0;  // the limits, side by side
    Vector<uint16_t> scales(OUT * groups), minima(OUT * groups);
    Vector<float> wide_scales(OUT * groups), wide_minima(OUT * groups);
    for (int64_t i = 0; i < OUT * groups; ++i) {
        wide_scales[i] = float(1024 + int(uniform() * 1024)) / (1 << 18), scales[i] = half(wide_scales[i]);
        wide_minima[i] = -float(1024 + int(uniform() * 1024)) / (1 << 16), minima[i] = half(wide_minima[i]);
    }
    const int64_t offset = 128, size = (OUT + 31) / 32 * groups * quantized_group_bytes(bits);
    Vector<char> memory(offset + size + 64);
    char* start = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64;
    const int64_t header[12] = {1, 0, 0, 0, 0, 0, 0, 0, bits, 0, OUT, offset};
    std::memcpy(start, header, sizeof header);
    pack_quantized(bits, codes.data(), scales.data(), minima.data(), reinterpret_cast<uint8_t*>(start) + offset, IN,
                   OUT);
    const Matrix matrix{start, bias.data(), IN, OUT, Format::QUANTIZED};
    const Vector<float> got = multiply_rows(name, x, matrix, ROWS, linear_float32);
    Vector<float> want(ROWS * OUT);
    for (int64_t row = 0; row < ROWS; ++row)
        for (int64_t o = 0; o < OUT; ++o) {
            float sum = 0;
            for (int64_t g = 0; g < groups; ++g) {
                const Codes inputs = coded(x.data() + row * IN + g * 32);
                int dot = 0;
                for (int i = 0; i < 32; ++i) dot += (codes[o * IN + g * 32 + i] - int(zero)) * inputs.codes[i];
                sum = fused(sum, float(dot), wide_scales[o * groups + g] * inputs.scale);
                if (bits == 4) sum = fused(sum, wide_minima[o * groups + g], inputs.scale * float(inputs.sum));
            }
            want[row * OUT + o] = sum + bias[o];
        }
    expect(same(got.data(), want.data(), got.size()), name);
}

#ifndef PRODUCTS_ONLY
void between() {
    const Vector<float> weight = numbers(IN), start = numbers(ROWS * IN), delta = numbers(ROWS * IN);
    Vector<float> x = start, out(ROWS * IN);
    use_threads(3, 4);
    add_rms_norm_float32(x.data(), delta.data(), weight.data(), out.data(), ROWS, IN, 1e-5f);
    Vector<double> normed(ROWS * IN);
    for (int64_t row = 0; row < ROWS; ++row) {
        double squares = 0;
        for (int64_t i = 0; i < IN; ++i) squares += std::pow(double(start[row * IN + i]) + delta[row * IN + i], 2);
        for (int64_t i = 0; i < IN; ++i)
            normed[row * IN + i] =
                (double(start[row * IN + i]) + delta[row * IN + i]) / std::sqrt(squares / IN + 1e-5) * weight[i];
    }
    expect(close(out, normed, 1e-6), "norm");
    print("norm", out);
    const Vector<float> gate_up = numbers(ROWS * 2 * IN);
    gate_and_mul_float32(gate_up.data(), out.data(), ROWS, IN, 0);
    Vector<double> silu(ROWS * IN);
    for (int64_t row = 0; row < ROWS; ++row)
        for (int64_t i = 0; i < IN; ++i) {
            const double gate = gate_up[row * 2 * IN + i];
            silu[row * IN + i] = gate / (1 + std::exp(-gate)) * gate_up[row * 2 * IN + IN + i];
        }
    expect(close(out, silu, 1e-6), "silu");
    print("silu", out);
}

void attend(Step& step, Layer& layer, float* qkv, Vector<float>& pages, Vector<float>& out) {
    attend_float32(&step, &layer, qkv, pages.data(), out.data());
}
void attend(Step& step, Layer& layer, float* qkv, Vector<bfloat16>& pages, Vector<bfloat16>& out) {
    attend_bfloat16(&step, &layer, qkv, pages.data(), out.data());
}

// Two sequences: one whole prompt, and one token of another whose earlier tokens came one by one.
template <typename T>
void attention(const char* name, double tolerance, const int64_t dim, const int64_t tile_tokens) {
    const int64_t heads = 6, kv = 2, size = 16, length = 75, all = heads + 2 * kv, blocks = 5;
    const Vector<float> cosines(length * dim / 2, 1.0f), sines(length * dim / 2, 0.0f);  // no rotation
    const Vector<float> inputs = numbers(length * all * dim);
    Vector<T> pages(2 * blocks * kv * 2 * size * dim), out(length * heads * dim);
    Vector<int32_t> tables(2 * blocks);
    for (int64_t i = 0; i < blocks; ++i) tables[i] = int32_t(blocks - 1 - i), tables[blocks + i] = int32_t(blocks + i);
    Layer layer{heads, kv, dim, dim, 0, 1, 0.25f, 0, 0, cosines.data(), sines.data(), nullptr, nullptr};
    const auto run = [&](int64_t sequence, int64_t first, int64_t count, int64_t tile) {
        Vector<int64_t> positions(count), slots(count);
        Vector<int32_t> tiles;
        for (int64_t i = 0; i < count; ++i) {
            positions[i] = first + i;
            slots[i] = tables[sequence * blocks + (first + i) / size] * size + (first + i) % size;
            if (i % tile == 0)
                for (int64_t n : {sequence, i, std::min(tile, count - i)}) tiles.push_back(int32_t(n));
        }
        Step step{count, int64_t(tiles.size()) / 3, blocks, size, positions.data(), slots.data(), tables.data(),
                  tiles.data()};
        Vector<float> qkv(inputs.begin() + first * all * dim, inputs.begin() + (first + count) * all * dim);
        out.resize(count * heads * dim);
        attend(step, layer, qkv.data(), pages, out);
    };
    use_threads(3, 4);
    run(0, 0, length, tile_tokens);
    const Vector<T> whole = out;
    use_threads(1, 4);
    for (int64_t i = 0; i < length; ++i) run(1, i, 1, 1);
    expect(same(out.data(), whole.data() + (length - 1) * heads * dim, heads * dim), name);
    Vector<float> got(whole.size());
    for (size_t i = 0; i < got.size(); ++i) got[i] = load(&whole[i]);
    Vector<double> want(whole.size());
    for (int64_t token = 0; token < length; ++token)
        for (int64_t head = 0; head < heads; ++head) {
            Vector<double> weights(token + 1);
            double total = 0;
            const int64_t from = heads + head / (heads / kv);
            for (int64_t key = 0; key <= token; ++key) {
                double score = 0;
                for (int64_t i = 0; i < dim; ++i)
                    score += double(inputs[(token * all + head) * dim + i]) * inputs[(key * all + from) * dim + i];
                total += weights[key] = std::exp(score * 0.25);
            }
            for (int64_t key = 0; key <= token; ++key)
                for (int64_t i = 0; i < dim; ++i)
                    want[(token * heads + head) * dim + i] +=
                        weights[key] / total * inputs[(key * all + from + kv) * dim + i];
        }
    expect(close(got, want, tolerance), name);
    print(name, whole);
}

void choose() {
    const int64_t rows = 64, columns = 1003;
    Vector<float> logits = numbers(rows * columns);
    for (float& logit : logits) logit *= 5;
    Vector<SamplingFilter> filters;
    for (int64_t row = 0; row < rows; ++row)
        filters.push_back({row % 4 ? 1.0 : 0.0, row % 3 ? 0.0 : 7.0, row % 5 ? 1.0 : 0.7, 0.0, uniform()});
    Vector<int64_t> got(rows);
    use_threads(3, 4);
    choose_tokens(logits.data(), rows, columns, columns, filters.data(), got.data());
    for (int64_t row = 0; row < rows; ++row) {
        const float* here = logits.data() + row * columns;
        const SamplingFilter& filter = filters[row];
        Vector<int64_t> order(columns);
        for (int64_t i = 0; i < columns; ++i) order[i] = i;
        std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return here[a] > here[b]; });
        int64_t want = order[0];
        if (filter.temperature) {
            const int64_t kept = filter.top_k ? int64_t(filter.top_k) : columns;
            Vector<double> weights(columns);
            double total = 0, before = 0, sum = 0;
            for (int64_t i = 0; i < kept; ++i) total += weights[order[i]] = std::exp(double(here[order[i]]) - here[order[0]]);
            for (int64_t i = 0; i < kept; before += weights[order[i++]])
                if (before >= filter.top_p * total)
                    for (int64_t j = i; j < kept; ++j) weights[order[j]] = 0;
            total = 0;
            for (double weight : weights) total += weight;
            for (want = 0; want < columns && (sum += weights[want]) <= filter.uniform * total;) ++want;
        }
        expect(got[row] == want, "choose");
    }
    print("choose", got);
}
#endif

}  // namespace

int main() {
    std::printf("variant %s\n", variant());
    linear_layers();
    quantized(8, "8 bits");
    quantized(4, "4 bits");
#ifndef PRODUCTS_ONLY
    between();
    attention<float>("attention in float32", 1e-6, 16, 8);
    attention<bfloat16>("attention in bfloat16", 1e-2, 16, 8);
    attention<bfloat16>("attention of wide heads in bfloat16", 1e-2, 64, 12);
    choose();
#endif
    return failed;
}
