// One token per row of logits: the most likely one, or one drawn from the filtered distribution.
//
// As `choose_tokens` in draws.py, which says what the filters mean. Rows are independent of each other, and
// sums are in an order that depends on the row alone.

#include <algorithm>
#include <functional>
#include <vector>

#include "common.h"
#include "pool.h"

namespace {

constexpr int VECTORS = 4;  // as many comparisons that do not wait for each other
constexpr int STRIDE = VECTORS * LANES;
constexpr int SPAN = 128;  // neighbouring tokens whose weights are added up first

typedef double doubles __attribute__((vector_size(8 * LANES), aligned(8)));

// Of one row: as in draws.py, and where to pass the cumulated distribution. Temperature 0: the most likely one.
struct Filter {
    double temperature, top_k, top_p, min_p, draw;
};

// The first of the largest. A number that is none is never larger.
int64_t argmax(const float* values, int64_t count) {
    floats most[VECTORS];
    ints where[VECTORS], here[VECTORS];
    for (int v = 0; v < VECTORS; ++v) {
        most[v] = floats{} - __builtin_inff();
        for (int lane = 0; lane < LANES; ++lane) here[v][lane] = v * LANES + lane;
        where[v] = here[v];
    }
    int64_t i = 0;
    for (; i + STRIDE <= count; i += STRIDE)
        for (int v = 0; v < VECTORS; ++v) {
            const floats next = load_floats(values + i + v * LANES);
            const ints larger = next > most[v];
            most[v] = larger ? next : most[v];
            where[v] = larger ? here[v] : where[v];
            here[v] += STRIDE;
        }
    float best = -__builtin_inff();
    int64_t found = 0;
    const auto consider = [&](float value, int64_t index) {
        if (value > best || (value == best && index < found)) best = value, found = index;
    };
    for (int v = 0; v < VECTORS; ++v)
        for (int lane = 0; lane < LANES; ++lane) consider(most[v][lane], where[v][lane]);
    for (; i < count; ++i) consider(values[i], i);
    return found;
}

// exp((logit - largest) / temperature), filled up with zeros to whole spans. What is below 1e-38 is zero, too.
void weigh(const float* logits, int64_t count, float largest, float temperature, std::vector<float>& weights) {
    weights.assign((count + SPAN - 1) / SPAN * SPAN, 0);
    const float factor = 1 / temperature;
    int64_t i = 0;
    const auto weight = [&](floats values) {
        const floats x = (values - largest) * factor;
        return x < -87.0f ? floats{} : exponential(x);
    };
    for (; i + LANES <= count; i += LANES) store_floats(weights.data() + i, weight(load_floats(logits + i)));
    if (i < count) {
        float rest[LANES];
        std::fill(rest, rest + LANES, -__builtin_inff()), std::copy(logits + i, logits + count, rest);
        store_floats(weights.data() + i, weight(load_floats(rest)));
    }
}

// The sums of the spans up to and with each.
void cumulate(const std::vector<float>& weights, std::vector<double>& ends) {
    ends.clear();
    double sum = 0;
    for (size_t i = 0; i < weights.size(); i += SPAN) {
        doubles lanes = {};
        for (int j = 0; j < SPAN; j += LANES)
            lanes += __builtin_convertvector(load_floats(weights.data() + i + j), doubles);
        for (int lane = 0; lane < LANES; ++lane) sum += lanes[lane];
        ends.push_back(sum);
    }
}

double total(const float* values, const float* end) {
    double sum = 0;
    for (; values < end; ++values) sum += *values;
    return sum;
}

// Of the values, taken in descending order, the one with which their sum reaches `needed`; else the last one.
float reach(float* values, float* end, double needed) {
    for (double before = 0; end - values > 1;) {
        float* const middle = values + (end - values) / 2;
        std::nth_element(values, middle, end, std::greater<>());
        const double here = total(values, middle);
        if (before + here >= needed)
            end = middle;
        else
            before += here, values = middle;
    }
    return *values;
}

// The weights that are not below `least`, in order of tokens.
void collect(const std::vector<float>& weights, float least, std::vector<float>& found) {
    found.resize(weights.size() + LANES);
    float* to = found.data();
    for (size_t i = 0; i < weights.size(); i += LANES) {
        const floats here = load_floats(weights.data() + i);
#ifdef __AVX512F__
        const __mmask16 kept = _mm512_cmp_ps_mask((__m512)here, _mm512_set1_ps(least), _CMP_GE_OQ);
        _mm512_storeu_ps(to, _mm512_maskz_compress_ps(kept, (__m512)here));
        to += __builtin_popcount(kept);
#else
        for (int lane = 0; lane < LANES; ++lane) *to = here[lane], to += here[lane] >= least;
#endif
    }
    found.resize(to - found.data());
}

// The smallest weight that top_k and then top_p keep. Few tokens have most of the weight, so at first only
// those are looked at that are not much less likely than the most likely one, whose weight is 1.
float lowest_kept(const std::vector<float>& weights, double sum, const Filter& filter) {
    thread_local std::vector<float> likely;
    for (const float least : {1e-2f, 1e-3f, 1e-4f, 1e-5f, 1e-38f}) {
        collect(weights, least, likely);
        float* const begin = likely.data();
        const bool all = least == 1e-38f, limited = filter.top_k > 0;
        int64_t count = likely.size();
        if (!count) return 0;  // of numbers that are none
        if (limited && count < filter.top_k && !all) continue;
        if (limited && count > filter.top_k) {
            count = int64_t(filter.top_k);
            std::nth_element(begin, begin + count - 1, begin + likely.size(), std::greater<>());
        }
        const double here = total(begin, begin + count);
        const double needed = filter.top_p * (limited ? here : sum);
        if (here >= needed || all) return reach(begin, begin + count, needed);
    }
    return 0;
}

// The token with which the cumulated weights, in order of tokens, pass their share `draw`; never one of weight 0.
int64_t invert(const std::vector<float>& weights, const std::vector<double>& ends, double draw) {
    const double target = draw * ends.back();
    size_t span = 0;
    while (span + 1 < ends.size() && !(ends[span] > target)) ++span;
    double sum = span ? ends[span - 1] : 0;
    int64_t found = -1;
    for (size_t i = span * SPAN; i < (span + 1) * SPAN; ++i) {
        if (!(weights[i] > 0)) continue;
        found = i, sum += weights[i];
        if (sum > target) return found;
    }
    for (int64_t i = span * SPAN; found < 0 && i > 0;)  // rounding has led past all that weigh anything
        if (weights[--i] > 0) found = i;
    return std::max<int64_t>(found, 0);
}

int64_t choose(const float* logits, int64_t count, const Filter& filter) {
    const int64_t first = argmax(logits, count);
    if (filter.temperature == 0) return first;
    thread_local std::vector<float> weights;
    thread_local std::vector<double> ends;
    weigh(logits, count, logits[first], std::max(float(filter.temperature), 1e-30f), weights);
    cumulate(weights, ends);
    const bool sorted = filter.top_k > 0 || filter.top_p < 1;
    const float least = sorted ? lowest_kept(weights, ends.back(), filter) : 0;
    if (const float floor = std::max(least, float(filter.min_p)); floor > 0) {
        for (float& weight : weights) weight = weight < floor ? 0 : weight;
        cumulate(weights, ends);
    }
    return invert(weights, ends, filter.draw);
}

}  // namespace

extern "C" {

// Of `rows` rows of `columns` logits, whose beginnings are `stride` apart.
void choose_tokens(const float* logits, int64_t rows, int64_t columns, int64_t stride, const Filter* filters,
                   int64_t* out) {
    in_pieces(rows, 1, [&](int64_t row, int64_t end) {
        for (; row < end; ++row) out[row] = choose(logits + row * stride, columns, filters[row]);
    });
}

}  // extern "C"
