// Sums of products: one number, or a pair of bfloat16, of each of LANES neighbouring vectors at a time.

#pragma once

#include "common.h"

// How many numbers of a vector one step multiplies. Of bfloat16 it is two, for which processors have an instruction.
template <typename X>
inline constexpr int STEP = 1;
template <>
inline constexpr int STEP<bfloat16> = 2;

inline floats multiply_add(floats sum, floats values, const float* x) { return sum + values * *x; }
inline floats multiply_add(floats sum, uints pairs, const bfloat16* x) {
#if defined(ULLM_AVX512) && defined(ULLM_BF16)
    int32_t pair;
    std::memcpy(&pair, x, 4);
    return (floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)(__m512i)pairs, (__m512bh)_mm512_set1_epi32(pair));
#elif defined(ULLM_BF16)
    uint32_t pair;
    std::memcpy(&pair, x, 4);
    return (floats)vbfdotq_f32((float32x4_t)sum, vreinterpretq_bf16_u32((uint32x4_t)pairs),
                               vreinterpretq_bf16_u32(vdupq_n_u32(pair)));
#else
    sum += (floats)(pairs << 16) * load(x);
    return sum + (floats)(pairs & 0xffff0000u) * load(x + 1);
#endif
}
