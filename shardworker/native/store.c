/* Quantization must give the bits of kernels/quantize.py, where its arithmetic is written down: no fused operations here. */
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#elif defined(__GNUC__)
#pragma GCC optimize("fp-contract=off", "no-trapping-math", "no-math-errno", "no-signed-zeros")
#endif

#include "store.h"

#include <stdlib.h>

#include "half.h"

enum { TASK_ROWS = 16, NUM_DIVISORS = 5 };

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__)
#define FOR_THIS_PROCESSOR __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FOR_THIS_PROCESSOR
#endif

/* What the largest weight of a group may become in int4, in units of the scale. */
static const float DIVISORS[NUM_DIVISORS] = {-8.0f, -7.0f, 7.0f, -6.0f, 6.0f};

#define INLINE static inline __attribute__((always_inline))

enum { HALF_NAN = 0x7e00 };

INLINE int has_nan(const float *w) {
    int found = 0;
    for (int i = 0; i < GROUP; i++) found |= w[i] != w[i];
    return found;
}

INLINE float inverse_of(uint16_t scale) { return scale & 0x7fff ? 1.0f / half_to_float(scale) : 0.0f; }

FOR_THIS_PROCESSOR static uint16_t quantize_int8(const float *w, uint8_t *values) {
    float largest = 0;
    if (has_nan(w)) return memset(values, 0, GROUP), HALF_NAN;
    for (int i = 0; i < GROUP; i++) largest = fabsf(w[i]) > largest ? fabsf(w[i]) : largest;
    const uint16_t scale = float_to_half(largest / 127.0f);
    const float inverse = inverse_of(scale);
    for (int i = 0; i < GROUP; i++) {
        const float value = rintf(w[i] * inverse);
        values[i] = (uint8_t)(int8_t)(value > 127.0f ? 127.0f : value < -127.0f ? -127.0f : value);
    }
    return scale;
}

/* Nibbles, as floats, and their squared error for one scale. */
INLINE float try_int4(const float *w, uint16_t half, float *nibbles) {
    const float scale = half_to_float(half), inverse = inverse_of(half);
    float error[GROUP];
    for (int i = 0; i < GROUP; i++) {
        const float n = floorf(w[i] * inverse + 8.5f), at_least = n < 0.0f ? 0.0f : n;
        nibbles[i] = at_least > 15.0f ? 15.0f : at_least;
    }
    for (int i = 0; i < GROUP; i++) {
        const float off = (nibbles[i] - 8.0f) * scale - w[i];
        error[i] = off * off;
    }
    for (int i = 0; i < 16; i++) error[i] += error[i + 16];
    for (int i = 0; i < 8; i++) error[i] += error[i + 8];
    for (int i = 0; i < 4; i++) error[i] += error[i + 4];
    return (error[0] + error[2]) + (error[1] + error[3]);
}

FOR_THIS_PROCESSOR static uint16_t quantize_int4(const float *w, uint8_t *values) {
    float largest = 0, extreme = 0, least = 0, nibbles[NUM_DIVISORS][GROUP];
    uint16_t scales[NUM_DIVISORS];
    int best = 0;
    if (has_nan(w)) return memset(values, 0, GROUP), HALF_NAN;
    for (int i = 0; i < GROUP; i++) largest = fabsf(w[i]) > largest ? fabsf(w[i]) : largest;
    for (int i = GROUP - 1; i >= 0; i--) extreme = fabsf(w[i]) == largest ? w[i] : extreme;
    for (int d = 0; d < NUM_DIVISORS; d++) {
        scales[d] = float_to_half(extreme / DIVISORS[d]);
        const float error = try_int4(w, scales[d], nibbles[d]);
        if (d == 0 || error < least) least = error, best = d;
    }
    for (int i = 0; i < GROUP; i++) values[i] = (uint8_t)(int32_t)nibbles[best][i];
    return scales[best];
}

static float element(const struct storing *job, int64_t row, int64_t input) {
    const uint8_t *from = job->from + row * job->from_stride;
    uint16_t half;
    float value;
    if (job->from_dtype == DTYPE_F32) {
        memcpy(&value, from + input * 4, 4);
        return value;
    }
    memcpy(&half, from + input * 2, 2);
    return job->from_dtype == DTYPE_BF16 ? bfloat_to_float(half) : half_to_float(half);
}

/* One row of one group to its lane of the panel. */
static void store_group(enum kind kind, const float *w, uint8_t *group, uint16_t *scales, int64_t lane) {
    uint8_t codes[GROUP];
    switch (kind) {
    case KIND_F32:
        for (int k = 0; k < GROUP; k++) ((float *)group)[k * PANEL + lane] = w[k];
        return;
    case KIND_F16:
        for (int k = 0; k < GROUP; k++) ((uint16_t *)group)[k * PANEL + lane] = float_to_half(w[k]);
        return;
    case KIND_BF16:
        for (int k = 0; k < GROUP; k++) ((uint16_t *)group)[(k / 2 * PANEL + lane) * 2 + k % 2] = float_to_bfloat(w[k]);
        return;
    case KIND_INT8:
        scales[lane] = quantize_int8(w, codes);
        for (int k = 0; k < GROUP; k++) group[k * PANEL + lane] = codes[k];
        return;
    default:
        scales[lane] = quantize_int4(w, codes);
        for (int k = 0; k < GROUP; k += 8) {
            uint32_t word = 0;
            for (int i = 0; i < 8; i++) word |= (uint32_t)codes[k + i] << (i / 2 * 4 + i % 2 * 16);
            ((uint32_t *)group)[k / 8 * PANEL + lane] = word;
        }
    }
}

static void store_task(void *argument, int64_t task, int thread) {
    const struct storing *job = argument;
    const int64_t groups = num_groups(job->inputs), panels = num_panels(job->outputs);
    const int64_t end = (task + 1) * TASK_ROWS < job->rows ? (task + 1) * TASK_ROWS : job->rows;
    (void)thread;
    for (int64_t i = task * TASK_ROWS; i < end; i++) {
        const int64_t row = job->first_row + i, output = row % job->outputs;
        const int64_t first = (row / job->outputs * panels + output / PANEL) * groups;
        for (int64_t g = 0; g < groups; g++) {
            float w[GROUP] = {0};
            const int64_t count = job->inputs - g * GROUP < GROUP ? job->inputs - g * GROUP : GROUP;
            for (int64_t k = 0; k < count; k++) w[k] = element(job, i, g * GROUP + k);
            uint8_t *group = job->values + (first + g) * group_bytes(job->kind);
            store_group(job->kind, w, group, job->scales ? job->scales + (first + g) * PANEL : NULL, output % PANEL);
        }
    }
}

void store_rows(struct pool *pool, const struct storing *job) {
    pool_run(pool, store_task, (void *)job, (job->rows + TASK_ROWS - 1) / TASK_ROWS);
}
