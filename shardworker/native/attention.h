/* Attention of a step: heads are normed, clamped and rotated, keys and values written to their pages and read in place.
 *
 * A query sees keys in tiles of 16 positions, 0 ... 15 first, with a running softmax (Milakov and Gimelshein 2018), in stretches
 * of 512 that are joined in order. Tiles and stretches depend on positions alone: neither other rows, nor how a prompt was cut
 * into chunks, nor which thread took which stretch change a row's bits.
 */
#ifndef SHARDMESH_ATTENTION_H
#define SHARDMESH_ATTENTION_H

#include <stdlib.h>

#include "lanes.h"
#include "operations.h"

enum { TILE = 16, STRETCH = 512, BLOCK_ROWS = 16 };
enum { MOST_STATES = 128 << 20 }; /* bytes for stretches that wait to be joined */

/* What a query has seen: maximum of its scores, sums of their exponentials lane by lane, weighted values. */
struct state {
    float best[LANES]; /* the first counts */
    float total[LANES];
    float mixed[];
};

struct attention_phase {
    const struct attention_job *job;
    int64_t dim; /* head_dim filled up to whole vectors */
    float *queries; /* [rows, heads, dim] */
    int64_t *block_starts; /* [spans + 1]: blocks of rows before each span */
    int32_t *group_starts; /* [num_groups + 1]: first query head of each kv head that is read */
    int64_t num_groups, largest_group;
    char *states; /* [rows, heads, kept] */
    /* Stretches of a query that wait to be joined: all where tasks are too few to busy the threads and memory allows,
     * otherwise one, joined. */
    int64_t kept, stretches;
    char *scratch;
    int64_t scratch_bytes;
};

INLINE int64_t state_bytes(const struct attention_phase *phase) { return (int64_t)sizeof(struct state) + phase->dim * 4; }

INLINE struct state *state_of(const struct attention_phase *phase, int64_t row, int64_t head, int64_t stretch) {
    return (void *)(phase->states + ((row * phase->job->heads + head) * phase->kept + stretch) * state_bytes(phase));
}

INLINE void clear(struct state *state, int64_t dim) {
    memset(state, 0, sizeof *state + (size_t)dim * 4);
    state->best[0] = -INFINITY;
}

/* Goes on with what a later stretch saw. */
INLINE void join(struct state *whole, const struct state *part, int64_t dim) {
    if (part->best[0] == -INFINITY && part->total[0] == 0) return; /* it saw nothing, not even a NaN */
    const float best = part->best[0] > whole->best[0] ? part->best[0] : whole->best[0];
    const vf old = vf_exp(vf_all(whole->best[0] - best)), new = vf_exp(vf_all(part->best[0] - best));
    whole->best[0] = best;
    vf_store(whole->total, vf_load(whole->total) * old + vf_load(part->total) * new);
    for (int64_t i = 0; i < dim; i += LANES)
        vf_store(whole->mixed + i, vf_load(whole->mixed + i) * old + vf_load(part->mixed + i) * new);
}

INLINE void *slot_of(const struct attention_job *job, void *pool, int64_t kv_head, const int32_t *pages, int64_t position) {
    const int64_t slot = pages[position / job->page_tokens] * job->page_tokens + position % job->page_tokens;
    return (char *)pool + (kv_head * job->slots + slot) * job->head_dim * (job->dtype == DTYPE_F32 ? 4 : 2);
}

/* A NaN stays one. */
INLINE float clamp(float x, float clip) { return x < -clip ? -clip : x > clip ? clip : x; }

INLINE float element(const void *p, int64_t i, enum dtype dtype) {
    if (dtype == DTYPE_F32) return ((const float *)p)[i];
    if (dtype == DTYPE_F16) return half_to_float(((const uint16_t *)p)[i]);
    return bfloat_to_float(((const uint16_t *)p)[i]);
}

/* Writes a head of `n` floats, which lies in whole vectors. */
INLINE void store_head(void *target, const float *head, int64_t n, enum dtype dtype) {
    _Alignas(4) char last[LANES * 4];
    for (int64_t i = 0; i < n; i += LANES) {
        vf v = vf_load(head + i);
        const int64_t count = n - i < LANES ? n - i : LANES;
        if (dtype == DTYPE_F32) vf_store((float *)last, v);
        else if (dtype == DTYPE_BF16) store_bfloat((uint16_t *)last, v);
        else store_half((uint16_t *)last, v);
        const int64_t item = dtype == DTYPE_F32 ? 4 : 2;
        memcpy((char *)target + i * item, last, (size_t)(count * item));
    }
}

/* Reads a head of `n` elements into floats, filled up with zeros to whole vectors. */
INLINE void load_head(float *head, const void *source, int64_t n, enum dtype dtype) {
    const int64_t item = dtype == DTYPE_F32 ? 4 : 2;
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) vf_store(head + i, load_as_float((const char *)source + i * item, dtype));
    if (i < n) {
        _Alignas(4) char last[LANES * 4] = {0};
        memcpy(last, (const char *)source + i * item, (size_t)((n - i) * item));
        vf_store(head + i, load_as_float(last, dtype));
    }
}

/* RMS norm (Zhang and Sennrich 2019), clamp and rotation (Su et al. 2021, halves as pairs) of one head in place. */
INLINE void prepare_head(const struct attention_job *job, int64_t row, int64_t head, float *x) {
    const int64_t dim = job->head_dim, half = job->rotary_dims / 2;
    if (job->qk_norm) {
        float mean = 0;
        if (job->mean_squares) mean = job->mean_squares[row * (job->heads + job->kv_heads) + head];
        else {
            vf squares = {0};
            for (int64_t i = 0; i < dim; i += LANES) squares += vf_load(x + i) * vf_load(x + i);
            mean = sum_lanes(squares) / (float)dim;
        }
        const float scale = 1.0f / sqrtf(mean + job->eps);
        for (int64_t i = 0; i < dim; i++) x[i] = element(job->qk_norm, head * dim + i, job->dtype) * (x[i] * scale);
    }
    if (job->clip > 0)
        for (int64_t i = 0; i < dim; i++) x[i] = clamp(x[i], job->clip);
    const float *cosines = job->cosines + row * job->rotary_dims, *sines = job->sines + row * job->rotary_dims;
    for (int64_t i = 0; i < half; i++) {
        const float first = x[i], second = x[i + half];
        x[i] = first * cosines[i] + second * sines[i];
        x[i + half] = second * cosines[i + half] + first * sines[i + half];
    }
}

/* One row: queries to `queries`, keys and values to their pages. */
static void prepare_task(void *argument, int64_t row, int thread) {
    struct attention_phase *phase = argument;
    const struct attention_job *job = phase->job;
    const int64_t heads = job->heads, kv_heads = job->kv_heads, dim = job->head_dim;
    const float *qkv = job->qkv + row * (heads + 2 * kv_heads) * dim;
    float *head = (float *)(phase->scratch + thread * phase->scratch_bytes);
    const struct span *span = job->spans;
    while (row >= span->first_row + span->num_rows) span++;
    const int64_t position = span->position + row - span->first_row;
    for (int64_t h = 0; h < heads + 2 * kv_heads; h++) {
        float *x = h < heads ? phase->queries + (row * heads + h) * phase->dim : head;
        load_head(x, qkv + h * dim, dim, DTYPE_F32);
        if (h < heads + kv_heads) prepare_head(job, row, h, x);
        else if (job->clip > 0)
            for (int64_t i = 0; i < dim; i++) x[i] = clamp(x[i], job->clip);
        if (h >= heads) {
            const int is_key = h < heads + kv_heads;
            const int64_t kv_head = h - heads - (is_key ? 0 : kv_heads);
            store_head(slot_of(job, is_key ? job->keys : job->values, kv_head, span->pages, position), x, dim, job->dtype);
        }
    }
}

/* One query and a tile of keys and values: scores, running softmax, weighted sum. `visible` keys of the tile count. */
INLINE void attend_tile(const float *query, const float *keys, const float *values, int64_t dim, int64_t visible, float scale,
                        struct state *state) {
    float scores[TILE], chances[TILE];
    for (int64_t key = 0; key < TILE; key++) {
        vf sum = {0};
        for (int64_t i = 0; i < dim; i += LANES) sum += vf_load(query + i) * vf_load(keys + key * dim + i);
        scores[key] = key < visible ? sum_lanes(sum) * scale : -INFINITY;
    }
    float best = state->best[0];
    for (int64_t key = 0; key < TILE; key += LANES) {
        const float one = max_lanes(vf_load(scores + key));
        best = one > best ? one : best;
    }
    const vf shrink = vf_exp(vf_all(state->best[0] - best));
    vf total = vf_load(state->total) * shrink;
    for (int64_t key = 0; key < TILE; key += LANES) {
        const vf chance = vf_exp(vf_load(scores + key) - best);
        vf_store(chances + key, chance);
        total += chance;
    }
    state->best[0] = best;
    vf_store(state->total, total);
    for (int64_t i = 0; i < dim; i += LANES) {
        vf sum = vf_load(state->mixed + i) * shrink;
        for (int64_t key = 0; key < TILE; key++) sum += chances[key] * vf_load(values + key * dim + i);
        vf_store(state->mixed + i, sum);
    }
}

/* Rows [first, end) of a span, the query heads of one kv head, one stretch of keys; `states` [rows, heads of the group]. */
static void attend_stretch(const struct attention_phase *phase, const struct span *span, int64_t first, int64_t end, int64_t group,
                           int64_t stretch, float *keys, struct state **states) {
    const struct attention_job *job = phase->job;
    const int64_t dim = phase->dim, last = span->position + end, begin = stretch * STRETCH;
    const int64_t stop = begin + STRETCH < last ? begin + STRETCH : last;
    const int32_t first_head = phase->group_starts[group], end_head = phase->group_starts[group + 1];
    const int64_t kv_head = job->kv_head_of[first_head];
    float *values = keys + TILE * dim;
    for (int64_t start = begin; start < stop; start += TILE) {
        const int64_t count = stop - start < TILE ? stop - start : TILE;
        for (int64_t key = 0; key < count; key++) {
            load_head(keys + key * dim, slot_of(job, job->keys, kv_head, span->pages, start + key), job->head_dim, job->dtype);
            load_head(values + key * dim, slot_of(job, job->values, kv_head, span->pages, start + key), job->head_dim, job->dtype);
        }
        memset(keys + count * dim, 0, (size_t)((TILE - count) * dim) * 4);
        memset(values + count * dim, 0, (size_t)((TILE - count) * dim) * 4);
        for (int64_t row = first; row < end; row++) {
            const int64_t visible = span->position + row + 1 - start;
            if (visible <= 0) continue;
            for (int32_t head = first_head; head < end_head; head++) {
                const float *query = phase->queries + ((span->first_row + row) * job->heads + head) * dim;
                struct state *state = states[(row - first) * phase->largest_group + head - first_head];
                attend_tile(query, keys, values, dim, visible < TILE ? visible : TILE, job->scale, state);
            }
        }
    }
}

/* Some rows of one sequence, the query heads of one kv head; one stretch of keys, or all of them, joined. */
static void attend_task(void *argument, int64_t task, int thread) {
    struct attention_phase *phase = argument;
    const struct attention_job *job = phase->job;
    const int64_t chosen = task % phase->kept, group = task / phase->kept % phase->num_groups;
    int64_t block = task / phase->kept / phase->num_groups, number = 0;
    while (block >= phase->block_starts[number + 1]) number++;
    const struct span *span = &job->spans[number];
    const int64_t first = (block - phase->block_starts[number]) * BLOCK_ROWS;
    const int64_t end = first + BLOCK_ROWS < span->num_rows ? first + BLOCK_ROWS : span->num_rows;
    const int32_t first_head = phase->group_starts[group], end_head = phase->group_starts[group + 1];
    const int64_t seen = (span->position + end + STRETCH - 1) / STRETCH;
    float *keys = (float *)(phase->scratch + thread * phase->scratch_bytes);
    char *own = (char *)(keys + 2 * TILE * phase->dim);
    struct state **states = (struct state **)(own + BLOCK_ROWS * phase->largest_group * state_bytes(phase));
    const int joins = phase->kept < phase->stretches;
    for (int64_t stretch = joins ? 0 : chosen; stretch < (joins ? seen : chosen + 1); stretch++) {
        for (int64_t row = first; row < end; row++)
            for (int32_t head = first_head; head < end_head; head++) {
                const int64_t i = (row - first) * phase->largest_group + head - first_head;
                struct state *kept = state_of(phase, span->first_row + row, head, joins ? 0 : stretch);
                if (joins && !stretch) clear(kept, phase->dim);
                states[i] = joins ? (struct state *)(own + i * state_bytes(phase)) : kept;
                clear(states[i], phase->dim);
            }
        attend_stretch(phase, span, first, end, group, stretch, keys, states);
        if (!joins) continue;
        for (int64_t row = first; row < end; row++)
            for (int32_t head = first_head; head < end_head; head++)
                join(state_of(phase, span->first_row + row, head, 0), states[(row - first) * phase->largest_group + head - first_head], phase->dim);
    }
}

/* One row: its heads' weighted values over the sums of exponentials. */
static void finish_task(void *argument, int64_t row, int thread) {
    struct attention_phase *phase = argument;
    const struct attention_job *job = phase->job;
    struct state *whole = (void *)(phase->scratch + thread * phase->scratch_bytes);
    for (int64_t head = 0; head < job->heads; head++) {
        clear(whole, phase->dim);
        for (int64_t stretch = 0; stretch < phase->kept; stretch++) join(whole, state_of(phase, row, head, stretch), phase->dim);
        const float total = sum_lanes(vf_load(whole->total));
        float *out = job->out + (row * job->heads + head) * job->head_dim;
        for (int64_t i = 0; i < job->head_dim; i++) out[i] = whole->mixed[i] / total;
    }
}

/* Cuts the work: blocks of rows, groups of heads, stretches of keys. */
static int64_t cut(struct attention_phase *phase, int num_threads) {
    const struct attention_job *job = phase->job;
    int64_t blocks = 0;
    for (int64_t s = 0; s < job->num_spans; s++) {
        const struct span *span = &job->spans[s];
        const int64_t stretches = (span->position + span->num_rows + STRETCH - 1) / STRETCH;
        if (stretches > phase->stretches) phase->stretches = stretches;
        phase->block_starts[s] = blocks;
        blocks += (span->num_rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
    }
    phase->block_starts[job->num_spans] = blocks;
    for (int32_t head = 0; head < job->heads; head++)
        if (!head || job->kv_head_of[head] != job->kv_head_of[head - 1]) phase->group_starts[phase->num_groups++] = head;
    phase->group_starts[phase->num_groups] = (int32_t)job->heads;
    for (int64_t group = 0; group < phase->num_groups; group++) {
        const int64_t size = phase->group_starts[group + 1] - phase->group_starts[group];
        if (size > phase->largest_group) phase->largest_group = size;
    }
    const int few = blocks * phase->num_groups < 4 * num_threads && num_threads > 1;
    phase->kept = few && job->rows * job->heads * phase->stretches * state_bytes(phase) <= MOST_STATES ? phase->stretches : 1;
    return blocks * phase->num_groups * phase->kept;
}

static int attention(struct pool *pool, const struct attention_job *job) {
    struct attention_phase phase = {.job = job, .dim = (job->head_dim + LANES - 1) / LANES * LANES, .stretches = 1};
    const int num_threads = pool_num_threads(pool);
    phase.block_starts = malloc((size_t)(job->num_spans + 1) * 8 + (size_t)(job->heads + 1) * 4);
    if (!phase.block_starts) return -1;
    phase.group_starts = (int32_t *)(phase.block_starts + job->num_spans + 1);
    const int64_t tasks = cut(&phase, num_threads), block = BLOCK_ROWS * phase.largest_group;
    phase.scratch_bytes = (2 * TILE * phase.dim * 4 + block * (state_bytes(&phase) + (int64_t)sizeof(struct state *)) + 63) / 64 * 64;
    const int64_t queries = (job->rows * job->heads * phase.dim * 4 + 63) / 64 * 64;
    const int64_t states = (job->rows * job->heads * phase.kept * state_bytes(&phase) + 63) / 64 * 64;
    char *memory = aligned_alloc(64, (size_t)(queries + states + num_threads * phase.scratch_bytes));
    if (memory) {
        phase.queries = (float *)memory, phase.states = memory + queries, phase.scratch = memory + queries + states;
        pool_run(pool, prepare_task, &phase, job->rows);
        pool_run(pool, attend_task, &phase, tasks);
        pool_run(pool, finish_task, &phase, job->rows);
    }
    free(memory);
    free(phase.block_starts);
    return memory ? 0 : -1;
}

#endif
