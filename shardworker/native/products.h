/* Linear layers and feed-forward blocks, as phases of tasks. */
#ifndef SHARDMESH_PRODUCTS_H
#define SHARDMESH_PRODUCTS_H

#include <stdlib.h>

#include "operations.h"
#include "tiles.h"

enum {
    ROW_BLOCK = 96,    /* rows that stay in the second-level cache while panels pass by */
    TASK_PANELS = 8,   /* of a task with few rows: some 100 kB of weights */
    WIDE_PANELS = 32,  /* of a task with many rows: these are read again for each task */
    FEW_ROWS = 16,
};

INLINE int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t up_to(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

/* Elements of a row with whole groups. */
INLINE int64_t padded(int64_t inputs) { return num_groups(inputs) * GROUP; }

static inline void *aligned_memory(int64_t bytes) { return aligned_alloc(64, (size_t)up_to(bytes ? bytes : 1, 64)); }

/* One row as tiles want it: floats or bfloat16 pairs, filled up with zeros. */
static void lay_out_row(const void *x, enum dtype dtype, int64_t inputs, int pairs, void *target) {
    int64_t i = 0, whole = padded(inputs);
    if (pairs) {
        memcpy(target, x, (size_t)inputs * 2);
        memset((uint16_t *)target + inputs, 0, (size_t)(whole - inputs) * 2);
        return;
    }
    float *row = target;
    const char *bytes = x;
    const int64_t item = dtype == DTYPE_F32 ? 4 : 2;
    for (; i + LANES <= inputs; i += LANES) vf_store(row + i, load_as_float(bytes + i * item, dtype));
    for (; i < inputs; i++) {
        if (dtype == DTYPE_F32) row[i] = ((const float *)x)[i];
        else if (dtype == DTYPE_BF16) row[i] = bfloat_to_float(((const uint16_t *)x)[i]);
        else row[i] = half_to_float(((const uint16_t *)x)[i]);
    }
    memset(row + inputs, 0, (size_t)(whole - inputs) * 4);
}

/* Adds `bias` [count] in `dtype`. */
INLINE void add_bias(float *out, const void *bias, enum dtype dtype, int64_t first, int64_t count) {
    for (int64_t i = 0; i < count; i++) {
        if (dtype == DTYPE_F32) out[i] += ((const float *)bias)[first + i];
        else if (dtype == DTYPE_BF16) out[i] += bfloat_to_float(((const uint16_t *)bias)[first + i]);
        else out[i] += half_to_float(((const uint16_t *)bias)[first + i]);
    }
}

static const struct place NOTHING = {0};

/* ---- linear */

struct linear_phase {
    const struct linear_job *job;
    const char *x; /* laid out */
    int64_t x_stride, item, task_panels;
    int pairs;
};

static void linear_task(void *argument, int64_t task, int thread) {
    struct linear_phase *phase = argument;
    const struct linear_job *job = phase->job;
    const int64_t panels = num_panels(job->weight.outputs), outputs = job->weight.outputs;
    const int64_t first = task * phase->task_panels, end = at_most(first + phase->task_panels, panels);
    /* Whole panels go straight to their place, a last partial one through a buffer. */
    const int64_t whole = end * PANEL <= outputs ? end : end - 1;
    (void)thread;
    for (int64_t row = 0; row < job->rows; row += ROW_BLOCK) {
        const int64_t rows = at_most(ROW_BLOCK, job->rows - row);
        const char *x = phase->x + row * phase->x_stride * phase->item;
        float *out = job->out + row * outputs + first * PANEL;
        if (whole > first) multiply(&job->weight, phase->pairs, x, phase->x_stride, rows, first, whole, out, outputs, NOTHING);
        if (end > whole) {
            float last[ROW_BLOCK * PANEL];
            multiply(&job->weight, phase->pairs, x, phase->x_stride, rows, whole, end, last, PANEL, NOTHING);
            for (int64_t r = 0; r < rows; r++)
                memcpy(job->out + (row + r) * outputs + whole * PANEL, last + r * PANEL, (size_t)(outputs - whole * PANEL) * 4);
        }
        if (job->bias)
            for (int64_t r = 0; r < rows; r++)
                add_bias(out + r * outputs, job->bias, job->dtype, first * PANEL, at_most(end * PANEL, outputs) - first * PANEL);
    }
}

static int linear(struct pool *pool, const struct linear_job *job) {
    const int pairs = takes_pairs(job->weight.kind, job->dtype);
    const int64_t inputs = job->weight.inputs, whole = padded(inputs);
    struct linear_phase phase = {
        .job = job, .x = job->x, .x_stride = whole, .item = pairs ? 2 : 4, .pairs = pairs,
        .task_panels = job->rows <= FEW_ROWS ? TASK_PANELS : WIDE_PANELS / 2,
    };
    void *copy = NULL;
    if (whole != inputs || !(pairs || job->dtype == DTYPE_F32)) {
        if (!(copy = aligned_memory(job->rows * whole * phase.item))) return -1;
        const int64_t row_bytes = inputs * (job->dtype == DTYPE_F32 ? 4 : 2);
        for (int64_t row = 0; row < job->rows; row++)
            lay_out_row((const char *)job->x + row * row_bytes, job->dtype, inputs, pairs, (char *)copy + row * whole * phase.item);
        phase.x = copy;
    }
    pool_run(pool, linear_task, &phase, (num_panels(job->weight.outputs) + phase.task_panels - 1) / phase.task_panels);
    free(copy);
    return 0;
}

/* ---- feed-forward */

/* Rows sorted by expert; one pseudo expert with all rows where there are no experts. */
struct feed_forward_phase {
    const struct feed_forward_job *job;
    int64_t columns;  /* of the gate */
    int64_t num_active;
    int32_t *active;  /* experts that have rows, ascending */
    int64_t *starts;  /* [num_active + 1] first slot of each */
    int32_t *row_of;  /* [slots] */
    float *weight_of; /* [slots] */
    char *x;          /* laid out; by row with one expert for all, by slot otherwise */
    char *h;          /* silu(gate) * up, laid out for the down product, by slot */
    int64_t x_stride, x_item, h_stride, h_item;
    int x_pairs, h_pairs;
    int64_t column_tasks, task_columns; /* of the gate-up phase, for one expert */
    int64_t task_panels;                /* of the down phase */
    float *scratch;                     /* [threads][scratch_floats] */
    int64_t scratch_floats;
};

INLINE void store_rounded(char *target, int pairs, int64_t i, vf v) {
    if (pairs) store_bfloat((uint16_t *)target + i, v);
    else vf_store((float *)target + i, v);
}

static void lay_out_task(void *argument, int64_t slot, int thread) {
    struct feed_forward_phase *phase = argument;
    const struct feed_forward_job *job = phase->job;
    const int64_t inputs = job->gate_up.inputs, bytes = inputs * (job->dtype == DTYPE_F32 ? 4 : 2);
    const int64_t row = job->k ? phase->row_of[slot] : slot;
    (void)thread;
    lay_out_row((const char *)job->x + row * bytes, job->dtype, inputs, phase->x_pairs, phase->x + slot * phase->x_stride * phase->x_item);
}

/* silu(gate) * up of some columns of one expert's rows. Gate and up are [rows][width], and more floats than `columns` may be read. */
INLINE void combine(struct feed_forward_phase *phase, int64_t slot, int64_t first, int64_t columns, const float *gate, const float *up) {
    char *h = phase->h + slot * phase->h_stride * phase->h_item;
    for (int64_t c = 0; c < columns; c += LANES) {
        vf g = vf_load(gate + c), u = vf_load(up + c);
        vf result = g / (1.0f + vf_exp(-g)) * u;
        if (columns - c < LANES) {
            float part[LANES];
            vf_store(part, result);
            for (int64_t i = columns - c; i < LANES; i++) part[i] = 0;
            result = vf_load(part);
        }
        store_rounded(h, phase->h_pairs, first + c, result);
    }
}

/* Columns [first, first + count) of [rows] outputs of gate (which = 0) or up (1), with bias, into [rows][stride]. */
static void half_of_gate_up(struct feed_forward_phase *phase, const struct weight *w, const char *x, int64_t rows, int64_t first,
                            int64_t count, int which, float *out, int64_t stride) {
    const struct feed_forward_job *job = phase->job;
    const int64_t begin = which * phase->columns + first, panel = begin / PANEL, end = num_panels(begin + count);
    const int64_t shift = begin - panel * PANEL;
    const struct place up = {w, (phase->columns + first) / PANEL};
    multiply(w, phase->x_pairs, x, phase->x_stride, rows, panel, end, out, stride, which ? NOTHING : up);
    if (shift) /* up begins within a panel where the gate ends there */
        for (int64_t r = 0; r < rows; r++) memmove(out + r * stride, out + r * stride + shift, (size_t)count * 4);
    if (job->gate_up_bias)
        for (int64_t r = 0; r < rows; r++) add_bias(out + r * stride, job->gate_up_bias, job->dtype, begin, count);
}

static void gate_up_task(void *argument, int64_t task, int thread) {
    struct feed_forward_phase *phase = argument;
    const struct feed_forward_job *job = phase->job;
    const int64_t which = task / phase->column_tasks, first = task % phase->column_tasks * phase->task_columns;
    const int64_t columns = at_most(phase->task_columns, phase->columns - first), width = up_to(phase->task_columns, PANEL) + PANEL;
    const struct weight w = weight_of_expert(&job->gate_up, phase->active[which]);
    float *gate = phase->scratch + thread * phase->scratch_floats, *up = gate + ROW_BLOCK * width;
    for (int64_t slot = phase->starts[which]; slot < phase->starts[which + 1]; slot += ROW_BLOCK) {
        const int64_t rows = at_most(ROW_BLOCK, phase->starts[which + 1] - slot);
        const char *x = phase->x + slot * phase->x_stride * phase->x_item;
        half_of_gate_up(phase, &w, x, rows, first, columns, 0, gate, width);
        half_of_gate_up(phase, &w, x, rows, first, columns, 1, up, width);
        for (int64_t r = 0; r < rows; r++) combine(phase, slot + r, first, columns, gate + r * width, up + r * width);
    }
}

static void down_task(void *argument, int64_t task, int thread) {
    struct feed_forward_phase *phase = argument;
    const struct feed_forward_job *job = phase->job;
    const int64_t outputs = job->down.outputs, first = task * phase->task_panels;
    const int64_t end = at_most(first + phase->task_panels, num_panels(outputs));
    const int64_t width = phase->task_panels * PANEL, count = at_most(end * PANEL, outputs) - first * PANEL;
    float *part = phase->scratch + thread * phase->scratch_floats;
    for (int64_t r = 0; r < job->rows; r++) memset(job->out + r * outputs + first * PANEL, 0, (size_t)count * 4);
    for (int64_t which = 0; which < phase->num_active; which++) {
        const int last = which + 1 == phase->num_active;
        const struct weight w = weight_of_expert(&job->down, phase->active[which]);
        const struct weight after = weight_of_expert(&job->down, phase->active[last ? which : which + 1]);
        const struct place then = {last ? NULL : &after, first};
        for (int64_t slot = phase->starts[which]; slot < phase->starts[which + 1]; slot += ROW_BLOCK) {
            const int64_t rows = at_most(ROW_BLOCK, phase->starts[which + 1] - slot);
            multiply(&w, phase->h_pairs, phase->h + slot * phase->h_stride * phase->h_item, phase->h_stride, rows, first, end, part, width, then);
            for (int64_t r = 0; r < rows; r++) {
                float *out = job->out + phase->row_of[slot + r] * outputs + first * PANEL;
                const float scale = phase->weight_of[slot + r], *product = part + r * width;
                for (int64_t i = 0; i < count; i++) out[i] += scale * product[i];
            }
        }
    }
    if (job->down_bias)
        for (int64_t r = 0; r < job->rows; r++)
            add_bias(job->out + r * outputs + first * PANEL, job->down_bias, job->dtype, first * PANEL, count);
}

/* A counting sort: slots by expert, rows ascending in each. */
static void sort_by_expert(struct feed_forward_phase *phase) {
    const struct feed_forward_job *job = phase->job;
    int64_t active = 0, start = 0;
    if (!job->k) {
        phase->active[0] = 0;
        for (int64_t row = 0; row < job->rows; row++) phase->row_of[row] = (int32_t)row, phase->weight_of[row] = 1;
        phase->num_active = 1, phase->starts[0] = 0, phase->starts[1] = job->rows;
        return;
    }
    int64_t *places = phase->starts; /* [num_experts + 1]: counts, then first slots */
    memset(places, 0, (size_t)(job->num_experts + 1) * sizeof *places);
    for (int64_t i = 0; i < job->rows * job->k; i++) places[job->chosen[i]]++;
    for (int64_t expert = 0; expert < job->num_experts; expert++) {
        const int64_t count = places[expert];
        places[expert] = start, start += count;
    }
    for (int64_t i = 0; i < job->rows * job->k; i++) {
        const int64_t slot = places[job->chosen[i]]++;
        phase->row_of[slot] = (int32_t)(i / job->k), phase->weight_of[slot] = job->weights[i];
    }
    /* Each place now is the end of its expert's slots; those without slots are left out. */
    start = 0;
    for (int64_t expert = 0; expert < job->num_experts; expert++) {
        const int64_t end = places[expert];
        if (end > start) phase->active[active] = (int32_t)expert, phase->starts[active++] = start;
        start = end;
    }
    phase->starts[active] = start, phase->num_active = active;
}

static int feed_forward(struct pool *pool, const struct feed_forward_job *job) {
    const int64_t slots = job->k ? job->rows * job->k : job->rows, columns = job->down.inputs;
    const int64_t whole_x = padded(job->gate_up.inputs), whole_h = padded(columns), experts = job->k ? job->num_experts : 1;
    const int many = slots > FEW_ROWS * experts || job->rows > FEW_ROWS * 4;
    struct feed_forward_phase phase = {
        .job = job, .columns = columns, .x_stride = whole_x, .h_stride = whole_h,
        .x_pairs = takes_pairs(job->gate_up.kind, job->dtype), .h_pairs = takes_pairs(job->down.kind, job->dtype),
        .task_columns = (many && job->k ? WIDE_PANELS : TASK_PANELS) * PANEL,
        .task_panels = many ? WIDE_PANELS / 2 : TASK_PANELS / 2,
    };
    phase.x_item = phase.x_pairs ? 2 : 4, phase.h_item = phase.h_pairs ? 2 : 4;
    phase.column_tasks = columns ? (columns + phase.task_columns - 1) / phase.task_columns : 0;
    const int64_t gate_up_floats = 2 * ROW_BLOCK * (phase.task_columns + PANEL), down_floats = ROW_BLOCK * phase.task_panels * PANEL;
    phase.scratch_floats = gate_up_floats > down_floats ? gate_up_floats : down_floats;
    const int64_t sizes[] = {experts * 4, (experts + 1) * 8, slots * 4, slots * 4, slots * whole_x * phase.x_item,
                             slots * whole_h * phase.h_item, pool_num_threads(pool) * phase.scratch_floats * 4};
    int64_t total = 0, offsets[7];
    for (int i = 0; i < 7; i++) offsets[i] = total, total += up_to(sizes[i], 64);
    char *memory = aligned_memory(total);
    if (!memory) return -1;
    phase.active = (void *)(memory + offsets[0]), phase.starts = (void *)(memory + offsets[1]);
    phase.row_of = (void *)(memory + offsets[2]), phase.weight_of = (void *)(memory + offsets[3]);
    phase.x = memory + offsets[4], phase.h = memory + offsets[5], phase.scratch = (void *)(memory + offsets[6]);
    sort_by_expert(&phase);
    if (columns) {
        /* What fills up the last group must be zero; columns beside it are written by several tasks. */
        for (int64_t slot = 0; slot < slots && whole_h != columns; slot++)
            memset(phase.h + (slot * whole_h + columns / GROUP * GROUP) * phase.h_item, 0, (size_t)(GROUP * phase.h_item));
        pool_run(pool, lay_out_task, &phase, slots);
        pool_run(pool, gate_up_task, &phase, phase.num_active * phase.column_tasks);
    }
    pool_run(pool, down_task, &phase, (num_panels(job->down.outputs) + phase.task_panels - 1) / phase.task_panels);
    free(memory);
    return 0;
}

#endif
