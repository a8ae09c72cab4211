/* Vectors of floats as wide as the instruction set that the including file is compiled for.
 *
 * That file defines LANES and, where it has dot products of bfloat16, HAS_PAIRS: clang's attributes define no __AVX2__ to tell.
 * GCC's and clang's vector extensions carry the arithmetic; only what they cannot say is an intrinsic.
 */
#ifndef SHARDMESH_LANES_H
#define SHARDMESH_LANES_H

#include "half.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

typedef float vf __attribute__((vector_size(LANES * 4)));
typedef int32_t vi __attribute__((vector_size(LANES * 4)));
typedef uint32_t vu __attribute__((vector_size(LANES * 4)));

#define INLINE static inline __attribute__((always_inline))

INLINE vf vf_all(float x) { return x - (vf){0}; }
INLINE vi vi_all(int32_t x) { return x - (vi){0}; }
INLINE vf vf_load(const float *p) { vf v; memcpy(&v, p, sizeof v); return v; }
INLINE void vf_store(float *p, vf v) { memcpy(p, &v, sizeof v); }
INLINE vu vu_load(const void *p) { vu v; memcpy(&v, p, sizeof v); return v; }

INLINE vf load_half(const uint16_t *p) {
#if LANES == 16
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const void *)p));
#elif LANES == 8
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const void *)p));
#else
    vf v;
    for (int i = 0; i < LANES; i++) v[i] = half_to_float(p[i]);
    return v;
#endif
}

INLINE void store_half(uint16_t *p, vf v) {
#if LANES == 16
    _mm256_storeu_si256((void *)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif LANES == 8
    _mm_storeu_si128((void *)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
    for (int i = 0; i < LANES; i++) p[i] = float_to_half(v[i]);
#endif
}

INLINE vf load_bfloat(const uint16_t *p) {
#if LANES == 16
    return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)p)), 16);
#elif LANES == 8
    return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const void *)p)), 16);
#else
    vu v;
    for (int i = 0; i < LANES; i++) v[i] = (uint32_t)p[i] << 16;
    return (vf)v;
#endif
}

/* To nearest, ties to even; a NaN stays one. */
INLINE vu round_to_bfloat(vf v) {
    vu bits = (vu)v;
    vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    vu nan = (vu)(v != v);
    return (rounded & ~nan) | (0x7fc0 & nan);
}

INLINE void store_bfloat(uint16_t *p, vf v) {
    vu bits = round_to_bfloat(v);
#if LANES == 16
    _mm256_storeu_si256((void *)p, _mm512_cvtepi32_epi16((__m512i)bits));
#else
    for (int i = 0; i < LANES; i++) p[i] = (uint16_t)bits[i];
#endif
}

INLINE vf load_int8(const int8_t *p) {
#if LANES == 16
    return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const void *)p)));
#elif LANES == 8
    return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const void *)p)));
#else
    vf v;
    for (int i = 0; i < LANES; i++) v[i] = p[i];
    return v;
#endif
}

/* The nibble at `shift` of each word, as a float from -8 to 7. */
INLINE vf nibble(vu words, int shift) {
#if LANES == 16
    const __m512 table = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    return (vf)_mm512_permutexvar_ps(_mm512_srli_epi32((__m512i)words, (unsigned)shift), table);
#else
    return __builtin_convertvector((vi)((words >> shift) & 15) - 8, vf);
#endif
}

/* Halves are added until one number is left: the order is the same for every caller. */
INLINE float sum_lanes(vf v) {
#if LANES == 16
    return _mm512_reduce_add_ps((__m512)v);
#else
    float part[LANES];
    vf_store(part, v);
    for (int half = LANES / 2; half; half /= 2)
        for (int i = 0; i < half; i++) part[i] += part[i + half];
    return part[0];
#endif
}

INLINE float max_lanes(vf v) {
#if LANES == 16
    return _mm512_reduce_max_ps((__m512)v);
#else
    float best = v[0];
    for (int i = 1; i < LANES; i++) best = v[i] > best ? v[i] : best;
    return best;
#endif
}

INLINE vf choose(vi condition, vf yes, vf no) { return (vf)(((vi)yes & condition) | ((vi)no & ~condition)); }

/* e^x within 2 units in the last place (Cephes' polynomial, Moshier); 0 below -87, e^88 above 88, NaN for NaN. */
INLINE vf vf_exp(vf x) {
    const vi vanishes = x < -87.0f;
    x = choose(vanishes, (vf){0}, choose(x > 88.0f, vf_all(88.0f), x));
    vf n = (x * 1.44269504088896341f + 12582912.0f) - 12582912.0f; /* adding 1.5 x 2^23 rounds to an integer */
    x = x - n * 0.693359375f;
    x = x + n * 2.12194440e-4f;
    vf y = vf_all(1.9875691500e-4f);
    y = y * x + 1.3981999507e-3f;
    y = y * x + 8.3334519073e-3f;
    y = y * x + 4.1665795894e-2f;
    y = y * x + 1.6666665459e-1f;
    y = y * x + 5.0000001201e-1f;
    y = y * (x * x) + x + 1.0f;
    const vi power = (__builtin_convertvector(n, vi) + 127) << 23;
    return choose(vanishes, (vf){0}, y * (vf)power);
}

INLINE vf load_as_float(const void *p, int dtype) {
    if (dtype == 0) return vf_load(p);
    return dtype == 1 ? load_bfloat(p) : load_half(p);
}

#endif
