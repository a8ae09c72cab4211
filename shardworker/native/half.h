/* 16-bit floats, one at a time and in plain C. */
#ifndef SHARDMESH_HALF_H
#define SHARDMESH_HALF_H

#include <math.h>
#include <stdint.h>
#include <string.h>

/* float16 of any kind, subnormal ones too. */
static inline float half_to_float(uint16_t h) {
    uint32_t bits = (uint32_t)(h & 0x7fff) << 13;
    float value;
    memcpy(&value, &bits, 4);
    value *= 0x1p112f;
    memcpy(&bits, &value, 4);
    if ((h & 0x7c00) == 0x7c00) bits |= 0x7f800000u;
    bits |= (uint32_t)(h & 0x8000) << 16;
    memcpy(&value, &bits, 4);
    return value;
}

/* To nearest, ties to even; what is too large becomes infinite, a NaN stays one. */
static inline uint16_t float_to_half(float value) {
    const float magnitude = fabsf(value), scaled = magnitude * 0x1p-112f;
    const uint32_t sign = signbit(value) ? 0x8000 : 0;
    uint32_t bits;
    if (value != value) return (uint16_t)(sign | 0x7e00);
    if (magnitude >= 65520.0f) return (uint16_t)(sign | 0x7c00);
    if (magnitude < 0x1p-14f) return (uint16_t)(sign | (uint32_t)lrintf(magnitude * 0x1p24f)); /* a multiple of 2^-24 */
    memcpy(&bits, &scaled, 4);
    return (uint16_t)(sign | (bits + 0xfff + (bits >> 13 & 1)) >> 13);
}

static inline float bfloat_to_float(uint16_t b) {
    const uint32_t bits = (uint32_t)b << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* To nearest, ties to even; a NaN stays one. */
static inline uint16_t float_to_bfloat(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return value != value ? 0x7fc0 : (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

#endif
