// The choice of one token per row of logits: the most likely one, or one sampled from the filtered
// distribution.
//
// The same as `choose_tokens` in sampling/choose.py, which defines the filters. Rows are independent of each
// other, and sums are taken in an order that depends on the row alone.

#include <algorithm>
#include <functional>
#include <vector>

#include "common.h"
#include "pool.h"

namespace {

constexpr int VECTORS = 4;  // independent comparisons in flight
constexpr int STRIDE = VECTORS * LANES;
constexpr int SPAN = 128;  // neighbouring tokens whose weights are summed first

typedef double doubles __attribute__((vector_size(8 * LANES)));

// The filter of a row, as in sampling/choose.py, and its uniform number. Temperature 0: the most likely
// token.
struct SamplingFilter {
    double temperature, top_k, top_p, min_p, uniform;
};

// Index of the first of the largest values. NaN is never larger.
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
    int64_t best_index = 0;
    const auto consider = [&](float value, int64_t index) {
        if (value > best || (value == best && index < best_index)) best = value, best_index = index;
    };
    for (int v = 0; v < VECTORS; ++v)
        for (int lane = 0; lane < LANES; ++lane) consider(most[v][lane], where[v][lane]);
    for (; i < count; ++i) consider(values[i], i);
    return best_index;
}

// exp((logit - largest) / temperature), padded with zeros to whole spans. Weights below 1e-38 become zero.
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

// Cumulative sums of the spans' weights.
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

// The value at which the sum of the values, in descending order, reaches `needed`; otherwise the last one.
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

// Collect the weights of at least `least`, in order of tokens.
void collect(const std::vector<float>& weights, float least, std::vector<float>& kept_weights) {
    kept_weights.resize(weights.size() + LANES);
    float* to = kept_weights.data();
    for (size_t i = 0; i < weights.size(); i += LANES) {
        const floats here = load_floats(weights.data() + i);
#ifdef ULLM_AVX512
        const __mmask16 kept = _mm512_cmp_ps_mask((__m512)here, _mm512_set1_ps(least), _CMP_GE_OQ);
        _mm512_storeu_ps(to, _mm512_maskz_compress_ps(kept, (__m512)here));
        to += __builtin_popcount(kept);
#else
        for (int lane = 0; lane < LANES; ++lane) *to = here[lane], to += here[lane] >= least;
#endif
    }
    kept_weights.resize(to - kept_weights.data());
}

// The smallest weight that top_k and then top_p keep. Few tokens have most of the weight, so those that are
// not much less likely than the most likely one, whose weight is 1, are tried first.
float lowest_kept(const std::vector<float>& weights, double sum, const SamplingFilter& filter) {
    thread_local std::vector<float> likely;
    for (const float least : {1e-2f, 1e-3f, 1e-4f, 1e-5f, 1e-38f}) {
        collect(weights, least, likely);
        float* const begin = likely.data();
        const bool all = least == 1e-38f, limited = filter.top_k > 0;
        int64_t count = likely.size();
        if (!count) return 0;  // all weights are NaN
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

// The token at which the cumulative weights, in order of tokens, exceed the fraction `uniform` of their sum;
// never one of weight 0.
int64_t invert(const std::vector<float>& weights, const std::vector<double>& ends, double uniform) {
    const double target = uniform * ends.back();
    size_t span = 0;
    while (span + 1 < ends.size() && !(ends[span] > target)) ++span;
    double sum = span ? ends[span - 1] : 0;
    int64_t token = -1;
    for (size_t i = span * SPAN; i < (span + 1) * SPAN; ++i) {
        if (!(weights[i] > 0)) continue;
        token = i, sum += weights[i];
        if (sum > target) return token;
    }
    for (int64_t i = span * SPAN; token < 0 && i > 0;)  // rounding has led beyond the last token with a weight
        if (weights[--i] > 0) token = i;
    return std::max<int64_t>(token, 0);
}

int64_t choose(const float* logits, int64_t count, const SamplingFilter& filter) {
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
    return invert(weights, ends, filter.uniform);
}

}  // namespace

extern "C" {

// Choose a token for each of `rows` rows of `columns` logits, which start `stride` numbers apart.
void choose_tokens(const float* logits, int64_t rows, int64_t columns, int64_t stride,
                   const SamplingFilter* filters, int64_t* out) {
    in_pieces(rows, 1, [&](int64_t row, int64_t end) {
        for (; row < end; ++row) out[row] = choose(logits + row * stride, columns, filters[row]);
    });
}

}  // extern "C"
