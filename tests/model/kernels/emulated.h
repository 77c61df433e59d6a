// Instructions that this machine lacks, from SIMDe (https://github.com/simd-everywhere/simde), to be included before
// everything else. The kernels take them for the processor's own. For processors with AVX2.
//
// EMULATE_AVX512, EMULATE_VNNI and EMULATE_BF16 say which.

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
#elif defined(EMULATE_VNNI)
#define _mm256_dpbusd_avx_epi32 simde_mm256_dpbusd_epi32
#define __AVXVNNI__ 1
#endif
