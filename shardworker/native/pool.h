/* Threads that share the tasks of one phase after another. One caller at a time. */
#ifndef SHARDMESH_POOL_H
#define SHARDMESH_POOL_H

#include <stdint.h>

struct pool;

typedef void (*task_function)(void *job, int64_t task, int thread);

/* num_threads >= 1, the caller's included; NULL where threads cannot be had. */
struct pool *pool_create(int num_threads);
void pool_destroy(struct pool *pool);
int pool_num_threads(const struct pool *pool);

/* Between these two, waiting threads stay awake: phases follow each other within microseconds. */
void pool_wake(struct pool *pool);
void pool_rest(struct pool *pool);

/* Runs tasks 0 ... num_tasks - 1, each once, and returns when all are done. */
void pool_run(struct pool *pool, task_function function, void *job, int64_t num_tasks);

#endif
