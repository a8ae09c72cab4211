#define _GNU_SOURCE
#include "pool.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <unistd.h>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
static void sleep_while(atomic_uint *word, unsigned value) { syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0); }
static void wake_all(atomic_uint *word) { syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, 1 << 30, NULL, NULL, 0); }
#else
/* Of all pools: taken only to sleep, and to wake who sleeps. */
static pthread_mutex_t sleeping = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static void sleep_while(atomic_uint *word, unsigned value) {
    pthread_mutex_lock(&sleeping);
    while (atomic_load(word) == value) pthread_cond_wait(&changed, &sleeping);
    pthread_mutex_unlock(&sleeping);
}
static void wake_all(atomic_uint *word) {
    (void)word;
    pthread_mutex_lock(&sleeping);
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&sleeping);
}
#endif

#if defined(__x86_64__)
#define pause() __builtin_ia32_pause()
#else
#define pause() ((void)0)
#endif

/* A thread that somebody else's work keeps off its core must not be waited for at full speed. */
enum { SPINS_BEFORE_YIELD = 4000, SPINS_BEFORE_SLEEP = 20000 };

struct pool {
    /* Changes whenever there is something to do or to look at; sleepers wait for that. */
    _Alignas(64) atomic_uint signal;
    atomic_uint sleepers;
    atomic_int awake;
    atomic_int closing;
    /* Phase number in the upper half, next task in the lower one: a claim succeeds only in the phase it was meant for. */
    _Alignas(64) atomic_uint_fast64_t ticket;
    _Alignas(64) atomic_int_fast64_t done;
    /* Of the current phase; written only while no task can be claimed. */
    _Alignas(64) _Atomic(task_function) function;
    _Atomic(void *) job;
    atomic_int_fast64_t num_tasks;
    int num_threads;
    pid_t process; /* that has the threads: a fork has none of them, and computes alone */
    pthread_t *threads;
};

struct member {
    struct pool *pool;
    int thread;
};

static void work(struct pool *pool, int thread) {
    uint64_t ticket = atomic_load_explicit(&pool->ticket, memory_order_acquire);
    for (;;) {
        /* Seen after the ticket of its phase, this is 0 or that phase's; function and job were written before it. */
        int64_t num_tasks = atomic_load_explicit(&pool->num_tasks, memory_order_acquire);
        task_function function = atomic_load_explicit(&pool->function, memory_order_relaxed);
        void *job = atomic_load_explicit(&pool->job, memory_order_relaxed);
        int64_t task = (int64_t)(ticket & 0xffffffffu);
        if (task >= num_tasks) return;
        /* While this task is not done its phase lasts: what was read above belongs to it if the claim succeeds. */
        if (atomic_compare_exchange_weak_explicit(&pool->ticket, &ticket, ticket + 1, memory_order_acq_rel, memory_order_acquire)) {
            function(job, task, thread);
            atomic_fetch_add_explicit(&pool->done, 1, memory_order_release);
            ticket = atomic_load_explicit(&pool->ticket, memory_order_acquire);
        }
    }
}

static void *run_member(void *argument) {
    struct member member = *(struct member *)argument;
    struct pool *pool = member.pool;
    free(argument);
    unsigned seen = 0;
    while (!atomic_load(&pool->closing)) {
        work(pool, member.thread);
        for (int spins = 0; atomic_load_explicit(&pool->signal, memory_order_acquire) == seen; spins++) {
            if (!atomic_load_explicit(&pool->awake, memory_order_relaxed) || spins > SPINS_BEFORE_SLEEP) {
                atomic_fetch_add(&pool->sleepers, 1);
                sleep_while(&pool->signal, seen);
                atomic_fetch_sub(&pool->sleepers, 1);
                spins = 0;
            } else {
                pause();
            }
        }
        seen = atomic_load_explicit(&pool->signal, memory_order_acquire);
    }
    return NULL;
}

static void announce(struct pool *pool) {
    atomic_fetch_add(&pool->signal, 1);
    if (atomic_load(&pool->sleepers)) wake_all(&pool->signal);
}

struct pool *pool_create(int num_threads) {
    struct pool *pool = aligned_alloc(64, (sizeof *pool + 63) / 64 * 64);
    if (!pool) return NULL;
    *pool = (struct pool){.num_threads = 1, .process = getpid()};
    pool->threads = calloc((size_t)num_threads, sizeof *pool->threads);
    if (!pool->threads) {
        free(pool);
        return NULL;
    }
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* Signals are for the program's own threads. */
    for (int thread = 1; thread < num_threads; thread++) {
        struct member *member = malloc(sizeof *member);
        if (member) *member = (struct member){pool, thread};
        if (!member || pthread_create(&pool->threads[thread], NULL, run_member, member)) {
            free(member);
            break;
        }
        pool->num_threads++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (pool->num_threads < num_threads) {
        pool_destroy(pool);
        return NULL;
    }
    return pool;
}

void pool_destroy(struct pool *pool) {
    if (pool->process == getpid()) {
        atomic_store(&pool->closing, 1);
        atomic_fetch_add(&pool->signal, 1);
        wake_all(&pool->signal);
        for (int thread = 1; thread < pool->num_threads; thread++) pthread_join(pool->threads[thread], NULL);
    }
    free(pool->threads);
    free(pool);
}

int pool_num_threads(const struct pool *pool) { return pool->num_threads; }

void pool_wake(struct pool *pool) {
    if (pool->num_threads == 1) return;
    atomic_store(&pool->awake, 1);
    announce(pool);
}

void pool_rest(struct pool *pool) { atomic_store(&pool->awake, 0); }

void pool_run(struct pool *pool, task_function function, void *job, int64_t num_tasks) {
    if (pool->num_threads == 1 || num_tasks <= 1) {
        for (int64_t task = 0; task < num_tasks; task++) function(job, task, 0);
        return;
    }
    uint64_t phase = (atomic_load(&pool->ticket) >> 32) + 1;
    /* No task can be claimed: the last phase's are all gone. */
    atomic_store_explicit(&pool->num_tasks, 0, memory_order_relaxed);
    atomic_store_explicit(&pool->ticket, phase << 32, memory_order_release);
    atomic_store_explicit(&pool->function, function, memory_order_relaxed);
    atomic_store_explicit(&pool->job, job, memory_order_relaxed);
    atomic_store_explicit(&pool->done, 0, memory_order_relaxed);
    atomic_store_explicit(&pool->num_tasks, num_tasks, memory_order_release);
    announce(pool);
    work(pool, 0);
    for (int spins = 0; atomic_load_explicit(&pool->done, memory_order_acquire) < num_tasks; spins++) {
        if (spins > SPINS_BEFORE_YIELD) sched_yield();
        else pause();
    }
}
