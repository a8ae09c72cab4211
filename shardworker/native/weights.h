/* How a weight lies in memory, so that every instruction set reads it front to back.
 *
 * Sixteen outputs make a panel; a panel holds all inputs, filled up to groups of 32 with zeros, and follows the one before.
 * In a panel, for ascending inputs k:
 *   F32, F16, INT8   [k][16 outputs]
 *   BF16             [k / 2][16 outputs][2]: pairs, as a dot product of bfloat16 wants them
 *   INT4             [k / 8][16 outputs] 32-bit words; input k + 2 j + p has the nibble at bit 4 j + 16 p, standing for -8 ... 7
 * Scales are float16, [panel][group][16 outputs].
 */
#ifndef SHARDMESH_WEIGHTS_H
#define SHARDMESH_WEIGHTS_H

#include <stddef.h>
#include <stdint.h>

enum { PANEL = 16, GROUP = 32 };

enum kind { KIND_F32, KIND_BF16, KIND_F16, KIND_INT8, KIND_INT4, NUM_KINDS };

enum dtype { DTYPE_F32, DTYPE_BF16, DTYPE_F16 };

struct weight {
    enum kind kind;
    const uint8_t *values;
    const uint16_t *scales; /* NULL where a kind has none */
    int64_t outputs;
    int64_t inputs;
};

static inline int64_t num_groups(int64_t inputs) { return (inputs + GROUP - 1) / GROUP; }
static inline int64_t num_panels(int64_t outputs) { return (outputs + PANEL - 1) / PANEL; }

/* Bytes of one group of a panel. */
static inline int64_t group_bytes(enum kind kind) {
    static const int64_t bytes[NUM_KINDS] = {PANEL * GROUP * 4, PANEL * GROUP * 2, PANEL * GROUP * 2, PANEL * GROUP, PANEL * GROUP / 2};
    return bytes[kind];
}

static inline int is_scaled(enum kind kind) { return kind == KIND_INT8 || kind == KIND_INT4; }

/* Weights of one of several stacked matrices of equal shape. */
static inline struct weight weight_of_expert(const struct weight *all, int64_t expert) {
    struct weight one = *all;
    int64_t groups = num_panels(all->outputs) * num_groups(all->inputs);
    one.values += expert * groups * group_bytes(all->kind);
    if (all->scales) one.scales += expert * groups * PANEL;
    return one;
}

#endif
