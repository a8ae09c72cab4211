/* What a worker asks for, in phases of tasks; compiled once for each instruction set. */
#ifndef SHARDMESH_OPERATIONS_H
#define SHARDMESH_OPERATIONS_H

#include "pool.h"
#include "weights.h"

/* out [rows, outputs] = x [rows, inputs] w^T + bias; x and bias in `dtype`, out in float32. Nonzero: no memory. */
struct linear_job {
    struct weight weight;
    const void *x;
    int64_t rows;
    const void *bias; /* or NULL */
    float *out;
    enum dtype dtype;
};

/* out [rows, hidden] = down(silu(gate(x)) * up(x)), float32; the gate's columns come first in gate_up. */
struct feed_forward_job {
    struct weight gate_up;
    struct weight down;
    const void *x;
    int64_t rows;
    const void *gate_up_bias; /* or NULL */
    const void *down_bias;    /* or NULL */
    float *out;
    enum dtype dtype;
    /* With experts: `chosen` [rows, k] distinct in a row, weights likewise; otherwise k is 0 and all rows see the one block. */
    const int32_t *chosen;
    const float *weights;
    int64_t num_experts;
    int64_t k;
};

struct span {
    int64_t first_row;
    int64_t num_rows;
    int64_t position;
    const int32_t *pages;
};

/* Norm, clamp, rotate, write keys and values, attend. */
struct attention_job {
    const float *qkv;          /* [rows, heads + 2 kv_heads, head_dim] */
    const void *qk_norm;       /* [heads + kv_heads, head_dim] in dtype, or NULL */
    const float *mean_squares; /* [rows, heads + kv_heads], or NULL: each head's own */
    const float *cosines;      /* [rows, rotary_dims] */
    const float *sines;        /* the same, the first half negated */
    void *keys;                /* [kv_heads, slots, head_dim] in dtype */
    void *values;
    float *out; /* [rows, heads, head_dim] */
    const struct span *spans;
    const int32_t *kv_head_of; /* [heads], ascending */
    int64_t num_spans, rows, heads, kv_heads, head_dim, rotary_dims, slots, page_tokens;
    float scale, eps, clip;
    enum dtype dtype;
};

struct operations {
    const char *name;
    int (*linear)(struct pool *pool, const struct linear_job *job);
    int (*feed_forward)(struct pool *pool, const struct feed_forward_job *job);
    int (*attention)(struct pool *pool, const struct attention_job *job);
};

extern const struct operations portable_operations;
#if defined(__x86_64__)
extern const struct operations avx2_operations, avx512_operations;
#if defined(__clang__) || __GNUC__ >= 10 /* the first that knows them */
#define HAS_AVX512_BF16
extern const struct operations avx512_bf16_operations;
#endif
#endif

#endif
