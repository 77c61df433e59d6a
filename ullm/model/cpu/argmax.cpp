// The most likely token of each row of logits.

#include "common.h"
#include "pool.h"

namespace {

constexpr int VECTORS = 4;  // as many comparisons that do not wait for each other
constexpr int STRIDE = VECTORS * LANES;

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

}  // namespace

extern "C" {

// Of `rows` rows of `columns` logits, whose beginnings are `stride` apart.
void argmax(const float* logits, int64_t rows, int64_t columns, int64_t stride, int64_t* out) {
    in_pieces(rows, 1, [&](int64_t row, int64_t end) {
        for (; row < end; ++row) out[row] = argmax(logits + row * stride, columns);
    });
}

}  // extern "C"
