/* The rate at which threads read scattered chunks of 1 MiB: what bounds a decode step. */
#ifndef SHARDMESH_BANDWIDTH_H
#define SHARDMESH_BANDWIDTH_H

#include <stdint.h>

/* Bytes per second of all threads together, over `num_bytes` (at least 1 MiB) of memory; negative without memory or threads. */
double read_bandwidth(int num_threads, double seconds, int64_t num_bytes);

#endif
