/* Brings rows of a weight into panels (weights.h). */
#ifndef SHARDMESH_PACK_H
#define SHARDMESH_PACK_H

#include "weights.h"

struct packing {
    enum kind kind;
    int64_t outputs; /* of one matrix */
    int64_t inputs;
    uint8_t *values; /* of all stacked matrices */
    uint16_t *scales;
    int64_t first_row; /* of the flattened [experts * outputs] */
    int64_t rows;
    /* Rows as they come: float32, 16-bit floats, int8, or int4 in bytes (element i of a group low, 16 + i high). */
    const uint8_t *from_values;
    int64_t from_stride; /* bytes */
    const uint16_t *from_scales; /* [rows, groups] */
};

void pack_rows(const struct packing *job);

#endif
