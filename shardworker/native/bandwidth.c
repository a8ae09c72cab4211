#define _GNU_SOURCE
#include "bandwidth.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

enum { CHUNK = 1 << 20, LINE = 64 };

struct reader {
    const char *buffer;
    int64_t chunks;
    double until;
    uint64_t random;
    int64_t bytes;
    double end;
    long long sum;
};

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

static void *read_chunks(void *argument) {
    typedef long long words __attribute__((vector_size(LINE)));
    struct reader *reader = argument;
    words sum[4] = {{0}};
    do {
        /* xorshift (Marsaglia 2003) */
        reader->random ^= reader->random << 13, reader->random ^= reader->random >> 7, reader->random ^= reader->random << 17;
        const char *chunk = reader->buffer + (int64_t)(reader->random % (uint64_t)reader->chunks) * CHUNK;
        for (int64_t at = 0; at < CHUNK; at += 4 * LINE)
            for (int i = 0; i < 4; i++) sum[i] ^= *(const words *)(chunk + at + i * LINE);
        reader->bytes += CHUNK;
    } while ((reader->end = now()) < reader->until);
    sum[0] ^= sum[1] ^ sum[2] ^ sum[3];
    for (size_t i = 0; i < LINE / sizeof(long long); i++) reader->sum ^= sum[0][i];
    return NULL;
}

double read_bandwidth(int num_threads, double seconds, int64_t num_bytes) {
    const int64_t chunks = num_bytes / CHUNK;
    struct reader *readers = calloc((size_t)num_threads, sizeof *readers);
    pthread_t *threads = calloc((size_t)num_threads, sizeof *threads);
    char *buffer = mmap(NULL, (size_t)(chunks * CHUNK), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    double rate = -1;
    if (readers && threads && buffer != MAP_FAILED) {
#ifdef MADV_HUGEPAGE
        madvise(buffer, (size_t)(chunks * CHUNK), MADV_HUGEPAGE);
#endif
        memset(buffer, 1, (size_t)(chunks * CHUNK)); /* pages that were never written to are all one page of zeros */
        const double begin = now();
        double end = begin;
        int started = 0;
        int64_t bytes = 0;
        for (int i = 0; i < num_threads; i++) {
            readers[i] = (struct reader){.buffer = buffer, .chunks = chunks, .until = begin + seconds, .random = 0x9e3779b97f4a7c15u + (uint64_t)i * 7919};
            if (pthread_create(&threads[i], NULL, read_chunks, &readers[i])) break;
            started++;
        }
        for (int i = 0; i < started; i++) {
            pthread_join(threads[i], NULL);
            bytes += readers[i].bytes;
            if (readers[i].end > end) end = readers[i].end;
        }
        if (started == num_threads) rate = (double)bytes / (end - begin);
    }
    if (buffer != MAP_FAILED) munmap(buffer, (size_t)(chunks * CHUNK));
    free(readers);
    free(threads);
    return rate;
}
