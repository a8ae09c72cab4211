/* Products of a few rows with a few panels of a weight, held in registers.
 *
 * One output of one row is always the same sequence of operations: a sum over the 32 inputs of a group, in ascending order,
 * then that sum (times the group's scale) onto the output, group by group. How many rows and panels go together never
 * changes it, so a row's results do not depend on what is computed beside it.
 */
#ifndef SHARDMESH_TILES_H
#define SHARDMESH_TILES_H

#include "lanes.h"
#include "weights.h"

#define UNROLL _Pragma("GCC unroll 32")

enum { VECTORS = PANEL / LANES }; /* Of a panel. */

/* Pointers of a tile; `x` has whole groups of inputs, `out` 16 columns for each panel. */
struct tile {
    const uint8_t *values;
    const uint16_t *scales;
    int64_t groups;
    const void *x;
    int64_t x_stride; /* elements from row to row */
    float *out;
    int64_t out_stride;
    const uint8_t *next; /* panels that are multiplied after these, or NULL */
    const uint16_t *next_scales;
};

/* Weights of input k of a group: `vectors` of them for `panels` panels. */
INLINE vf weight_lane(enum kind kind, const uint8_t *group, int k, int vector) {
    int lane = vector * LANES;
    switch (kind) {
    case KIND_F32: return vf_load((const float *)group + k * PANEL + lane);
    case KIND_F16: return load_half((const uint16_t *)group + k * PANEL + lane);
    case KIND_BF16: {
        vu pairs = vu_load((const uint32_t *)group + k / 2 * PANEL + lane);
        return (vf)(k % 2 ? pairs & 0xffff0000u : pairs << 16);
    }
    case KIND_INT8: return load_int8((const int8_t *)group + k * PANEL + lane);
    default: return nibble(vu_load((const uint32_t *)group + k / 8 * PANEL + lane), k % 8 / 2 * 4 + k % 2 * 16);
    }
}

/* The memory's rate needs more lines under way than the hardware asks for: fetch this group of the panels that come next. */
INLINE void prefetch_next(const struct tile *t, int64_t g, int64_t group_size, int panels) {
    if (!t->next) return;
    UNROLL for (int p = 0; p < panels; p++) {
        const uint8_t *group = t->next + (p * t->groups + g) * group_size;
        for (int64_t line = 0; line < group_size; line += 64) __builtin_prefetch(group + line, 0, 2);
        if (g % 2 == 0) __builtin_prefetch(t->next_scales + (p * t->groups + g) * PANEL, 0, 2);
    }
}

INLINE void tile_float(const struct tile *t, enum kind kind, int rows, int panels) {
    const int vectors = panels * VECTORS;
    const int64_t group_size = group_bytes(kind), panel_size = t->groups * group_size;
    vf acc[16][16];
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < vectors; v++) acc[r][v] = (vf){0};
    for (int64_t g = 0; g < t->groups; g++) {
        vf sum[16][16];
        UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < vectors; v++) sum[r][v] = (vf){0};
        const float *x = (const float *)t->x + g * GROUP;
        const uint8_t *group = t->values + g * group_size;
        if (is_scaled(kind) && rows <= 4) prefetch_next(t, g, group_size, panels);
        for (int k8 = 0; k8 < GROUP; k8 += 8) {
            UNROLL for (int k = 0; k < 8; k++) {
                vf w[16];
                /* Constant offsets within eight inputs let the compiler keep an int4 word in a register. */
                UNROLL for (int v = 0; v < vectors; v++) {
                    const uint8_t *eighth = group + v / VECTORS * panel_size + k8 * (group_size / GROUP);
                    w[v] = weight_lane(kind, eighth, k, v % VECTORS);
                }
                UNROLL for (int r = 0; r < rows; r++) {
                    float one = x[r * t->x_stride + k8 + k];
                    UNROLL for (int v = 0; v < vectors; v++) sum[r][v] += one * w[v];
                }
            }
        }
        UNROLL for (int v = 0; v < vectors; v++) {
            if (is_scaled(kind)) {
                const uint16_t *scales = t->scales + (v / VECTORS * t->groups + g) * PANEL + v % VECTORS * LANES;
                vf scale = load_half(scales);
                UNROLL for (int r = 0; r < rows; r++) acc[r][v] += sum[r][v] * scale;
            } else {
                UNROLL for (int r = 0; r < rows; r++) acc[r][v] += sum[r][v];
            }
        }
    }
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int v = 0; v < vectors; v++) vf_store(t->out + r * t->out_stride + v * LANES, acc[r][v]);
}

#if defined(HAS_PAIRS)
/* bfloat16 rows, two inputs at a time: products are exact, sums are float32. */
INLINE void tile_bfloat(const struct tile *t, enum kind kind, int rows, int panels) {
    const int64_t group_size = group_bytes(kind), panel_size = t->groups * group_size;
    /* The bfloat16 of -8 ... 7, twice: of an index the instruction looks at five bits, and the fifth is the next nibble's. */
    static const uint16_t nibbles[32] __attribute__((aligned(64))) = {
        0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,
        0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, 0, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0};
    const __m512i table = _mm512_load_si512(nibbles);
    __m512 acc[16][16];
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int p = 0; p < panels; p++) acc[r][p] = _mm512_setzero_ps();
    for (int64_t g = 0; g < t->groups; g++) {
        __m512 sum[16][16];
        UNROLL for (int r = 0; r < rows; r++) UNROLL for (int p = 0; p < panels; p++) sum[r][p] = _mm512_setzero_ps();
        const uint16_t *x = (const uint16_t *)t->x + g * GROUP;
        const uint8_t *group = t->values + g * group_size;
        if (is_scaled(kind) && rows <= 4) prefetch_next(t, g, group_size, panels);
        for (int k8 = 0; k8 < GROUP; k8 += 8) {
            UNROLL for (int pair = 0; pair < 4; pair++) {
                __m512i w[16];
                UNROLL for (int p = 0; p < panels; p++) {
                    const uint8_t *eighth = group + p * panel_size + k8 * (group_size / GROUP);
                    if (kind == KIND_INT4)
                        w[p] = _mm512_permutexvar_epi16(_mm512_srli_epi16(_mm512_loadu_si512(eighth), (unsigned)(4 * pair)), table);
                    else
                        w[p] = _mm512_loadu_si512(eighth + pair * 64);
                }
                UNROLL for (int r = 0; r < rows; r++) {
                    int32_t both;
                    memcpy(&both, x + r * t->x_stride + k8 + 2 * pair, 4);
                    __m512bh one = (__m512bh)_mm512_set1_epi32(both);
                    UNROLL for (int p = 0; p < panels; p++) sum[r][p] = _mm512_dpbf16_ps(sum[r][p], one, (__m512bh)w[p]);
                }
            }
        }
        UNROLL for (int p = 0; p < panels; p++) {
            if (is_scaled(kind)) {
                __m512 scale = (__m512)load_half(t->scales + (p * t->groups + g) * PANEL);
                UNROLL for (int r = 0; r < rows; r++) acc[r][p] = _mm512_fmadd_ps(sum[r][p], scale, acc[r][p]);
            } else {
                UNROLL for (int r = 0; r < rows; r++) acc[r][p] = _mm512_add_ps(acc[r][p], sum[r][p]);
            }
        }
    }
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int p = 0; p < panels; p++) _mm512_storeu_ps(t->out + r * t->out_stride + p * PANEL, acc[r][p]);
}
#endif

/* Rows and panels that fill the registers. */
#if LANES == 16
#define FOR_SHAPES(shape) shape(1, 4) shape(1, 1) shape(2, 4) shape(2, 1) shape(4, 2) shape(4, 1) shape(8, 1) shape(12, 1)
enum { MAX_ROWS = 12 };
INLINE int panels_at_once(int rows) { return rows <= 2 ? 4 : rows <= 4 ? 2 : 1; }
#else
#define FOR_SHAPES(shape) shape(1, 2) shape(1, 1) shape(2, 1) shape(4, 1)
enum { MAX_ROWS = 4 };
INLINE int panels_at_once(int rows) { return rows == 1 ? 2 : 1; }
#endif

INLINE int rows_at_once(int64_t rows) {
    if (rows >= MAX_ROWS) return MAX_ROWS;
    return rows >= 8 ? 8 : rows >= 4 ? 4 : rows >= 2 ? 2 : 1;
}

#define FLOAT_CASE(r, p) if (rows == r && panels == p) { tile_float(t, kind, r, p); return; }
#define BFLOAT_CASE(r, p) if (rows == r && panels == p) { tile_bfloat(t, kind, r, p); return; }
#define DEFINE_FLOAT(name, constant) \
    static __attribute__((noinline)) void name(const struct tile *t, int rows, int panels) { const enum kind kind = constant; FOR_SHAPES(FLOAT_CASE) }
#define DEFINE_BFLOAT(name, constant) \
    static __attribute__((noinline)) void name(const struct tile *t, int rows, int panels) { const enum kind kind = constant; FOR_SHAPES(BFLOAT_CASE) }

DEFINE_FLOAT(tile_f32, KIND_F32)
DEFINE_FLOAT(tile_bf16, KIND_BF16)
DEFINE_FLOAT(tile_f16, KIND_F16)
DEFINE_FLOAT(tile_int8, KIND_INT8)
DEFINE_FLOAT(tile_int4, KIND_INT4)
#if defined(HAS_PAIRS)
DEFINE_BFLOAT(tile_bf16_pairs, KIND_BF16)
DEFINE_BFLOAT(tile_int4_pairs, KIND_INT4)
#endif

typedef void (*tile_function)(const struct tile *t, int rows, int panels);

/* Whether rows of a dtype are multiplied as pairs of bfloat16; otherwise they are made float32. */
INLINE int takes_pairs(enum kind kind, int dtype) {
#if defined(HAS_PAIRS)
    return dtype == DTYPE_BF16 && (kind == KIND_BF16 || kind == KIND_INT4);
#else
    (void)kind, (void)dtype;
    return 0;
#endif
}

static tile_function tile_of(enum kind kind, int pairs) {
#if defined(HAS_PAIRS)
    if (pairs) return kind == KIND_INT4 ? tile_int4_pairs : tile_bf16_pairs;
#else
    (void)pairs;
#endif
    static const tile_function all[NUM_KINDS] = {tile_f32, tile_bf16, tile_f16, tile_int8, tile_int4};
    return all[kind];
}

/* A place in a weight. */
struct place {
    const struct weight *weight;
    int64_t panel;
};

/* Rows of `x` (whole groups of inputs; floats, or bfloat16 with `pairs`) times panels [first, end): `out` gets 16 columns each.
 * `then` is what the caller multiplies next, of as many inputs, or has no weight. */
static void multiply(const struct weight *w, int pairs, const void *x, int64_t x_stride, int64_t rows, int64_t first, int64_t end,
                     float *out, int64_t out_stride, struct place then) {
    const tile_function function = tile_of(w->kind, pairs);
    const int64_t groups = num_groups(w->inputs), item = pairs ? 2 : 4;
    const int64_t values_step = groups * group_bytes(w->kind), scales_step = groups * PANEL;
    for (int64_t panel = first; panel < end;) {
        /* All rows see a panel while it is in the cache. */
        int width = panels_at_once(rows_at_once(rows));
        if (end - panel < width) width = 1;
        const struct place next = panel + width < end ? (struct place){w, panel + width} : then;
        for (int64_t row = 0; row < rows;) {
            int height = rows_at_once(rows - row);
            for (int64_t p = panel; p < panel + width;) {
                int across = panels_at_once(height);
                if (across > panel + width - p) across = 1;
                struct tile t = {
                    .values = w->values + p * values_step,
                    .scales = w->scales ? w->scales + p * scales_step : NULL,
                    .groups = groups,
                    .x = (const char *)x + row * x_stride * item,
                    .x_stride = x_stride,
                    .out = out + row * out_stride + (p - first) * PANEL,
                    .out_stride = out_stride,
                };
                if (next.weight && w->scales) {
                    t.next = next.weight->values + next.panel * values_step;
                    t.next_scales = next.weight->scales + next.panel * scales_step;
                }
                function(&t, height, across);
                p += across;
            }
            row += height;
        }
        panel += width;
    }
}

#endif
