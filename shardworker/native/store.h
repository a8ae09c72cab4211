/* Brings rows of a matrix into a weight: converts or quantizes them, and lays them out in panels (weights.h). */
#ifndef SHARDMESH_STORE_H
#define SHARDMESH_STORE_H

#include "pool.h"
#include "weights.h"

struct storing {
    enum kind kind;
    int64_t outputs; /* of one matrix */
    int64_t inputs;
    uint8_t *values; /* of all stacked matrices */
    uint16_t *scales;
    int64_t first_row; /* of the flattened [stacked * outputs] */
    int64_t rows;
    const uint8_t *from;
    int64_t from_stride; /* bytes */
    enum dtype from_dtype;
};

void store_rows(struct pool *pool, const struct storing *job);

#endif
