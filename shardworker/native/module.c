/* The extension module: numbers in, work done, nothing known of Python's objects. The caller vouches for every address. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <stdlib.h>
#include <sys/mman.h>

#include "operations.h"
#include "pool.h"
#include "store.h"

static const struct operations *variants[4];
static int num_variants;

static void find_variants(void) {
    num_variants = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
#if defined(HAS_AVX512_BF16)
        if (__builtin_cpu_supports("avx512bf16")) variants[num_variants++] = &avx512_bf16_operations;
#endif
        variants[num_variants++] = &avx512_operations;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) variants[num_variants++] = &avx2_operations;
#endif
    variants[num_variants++] = &portable_operations;
}

/* ---- arguments */

enum { MAX_ARGUMENTS = 32 };

static int read_integers(PyObject *const *arguments, Py_ssize_t count, Py_ssize_t wanted, int64_t *values) {
    if (count != wanted) {
        PyErr_Format(PyExc_TypeError, "wanted %zd integers, found %zd", wanted, count);
        return -1;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        values[i] = PyLong_AsLongLong(arguments[i]);
        if (values[i] == -1 && PyErr_Occurred()) return -1;
    }
    return 0;
}

static void *address(int64_t value) { return (void *)(intptr_t)value; }

static const struct operations *variant(int64_t number) { return variants[number >= 0 && number < num_variants ? number : num_variants - 1]; }

static PyObject *done(int failed) {
    if (failed) return PyErr_NoMemory();
    Py_RETURN_NONE;
}

/* kind, values, scales, outputs, inputs */
static struct weight read_weight(const int64_t *values) {
    return (struct weight){(enum kind)values[0], address(values[1]), address(values[2]), values[3], values[4]};
}

/* ---- threads */

static const char POOL[] = "shardworker.native.pool";

static void destroy_pool(PyObject *capsule) { pool_destroy(PyCapsule_GetPointer(capsule, POOL)); }

static PyObject *create_pool(PyObject *module, PyObject *const *arguments, Py_ssize_t count) {
    int64_t num_threads;
    (void)module;
    if (read_integers(arguments, count, 1, &num_threads)) return NULL;
    if (num_threads < 1 || num_threads > 4096) return PyErr_Format(PyExc_ValueError, "wanted 1 to 4096 threads, found %lld", (long long)num_threads);
    struct pool *pool = pool_create((int)num_threads);
    if (!pool) return PyErr_Format(PyExc_OSError, "%lld threads cannot be had", (long long)num_threads);
    return PyCapsule_New(pool, POOL, destroy_pool);
}

static PyObject *wake(PyObject *module, PyObject *pool) {
    struct pool *own = PyCapsule_GetPointer(pool, POOL);
    (void)module;
    if (!own) return NULL;
    pool_wake(own);
    Py_RETURN_NONE;
}

static PyObject *rest(PyObject *module, PyObject *pool) {
    struct pool *own = PyCapsule_GetPointer(pool, POOL);
    (void)module;
    if (!own) return NULL;
    pool_rest(own);
    Py_RETURN_NONE;
}

/* ---- arithmetic: the pool first, then integers */

static struct pool *read_job(PyObject *const *arguments, Py_ssize_t count, Py_ssize_t wanted, int64_t *values) {
    if (count < 1 || read_integers(arguments + 1, count - 1, wanted, values)) {
        if (!PyErr_Occurred()) PyErr_SetString(PyExc_TypeError, "wanted a pool");
        return NULL;
    }
    return PyCapsule_GetPointer(arguments[0], POOL);
}

static PyObject *linear(PyObject *module, PyObject *const *arguments, Py_ssize_t count) {
    int64_t v[MAX_ARGUMENTS];
    struct pool *pool = read_job(arguments, count, 11, v);
    int failed;
    (void)module;
    if (!pool) return NULL;
    const struct linear_job job = {
        .weight = read_weight(v + 1), .x = address(v[6]), .rows = v[7], .bias = address(v[8]), .out = address(v[9]), .dtype = (enum dtype)v[10]};
    Py_BEGIN_ALLOW_THREADS
    failed = variant(v[0])->linear(pool, &job);
    Py_END_ALLOW_THREADS
    return done(failed);
}

static PyObject *feed_forward(PyObject *module, PyObject *const *arguments, Py_ssize_t count) {
    int64_t v[MAX_ARGUMENTS];
    struct pool *pool = read_job(arguments, count, 21, v);
    int failed;
    (void)module;
    if (!pool) return NULL;
    const struct feed_forward_job job = {
        .gate_up = read_weight(v + 1), .down = read_weight(v + 6), .x = address(v[11]), .rows = v[12],
        .gate_up_bias = address(v[13]), .down_bias = address(v[14]), .out = address(v[15]), .dtype = (enum dtype)v[16],
        .chosen = address(v[17]), .weights = address(v[18]), .num_experts = v[19], .k = v[20]};
    Py_BEGIN_ALLOW_THREADS
    failed = variant(v[0])->feed_forward(pool, &job);
    Py_END_ALLOW_THREADS
    return done(failed);
}

static PyObject *attention(PyObject *module, PyObject *const *arguments, Py_ssize_t count) {
    int64_t v[MAX_ARGUMENTS];
    /* Floats come as the bits of a double each. */
    struct pool *pool = read_job(arguments, count, 24, v);
    double reals[3];
    int failed = -1;
    (void)module;
    if (!pool) return NULL;
    memcpy(reals, v + 21, sizeof reals);
    struct attention_job job = {
        .qkv = address(v[1]), .qk_norm = address(v[2]), .mean_squares = address(v[3]), .cosines = address(v[4]), .sines = address(v[5]),
        .keys = address(v[6]), .values = address(v[7]), .out = address(v[8]), .kv_head_of = address(v[11]), .num_spans = v[12],
        .rows = v[13], .heads = v[14], .kv_heads = v[15], .head_dim = v[16], .rotary_dims = v[17], .slots = v[18], .page_tokens = v[19],
        .dtype = (enum dtype)v[20], .scale = (float)reals[0], .eps = (float)reals[1], .clip = (float)reals[2]};
    /* [spans, 4]: first row, rows, position, first of its pages */
    const int64_t *numbers = address(v[9]);
    const int32_t *pages = address(v[10]);
    Py_BEGIN_ALLOW_THREADS
    struct span *spans = malloc((size_t)(job.num_spans ? job.num_spans : 1) * sizeof *spans);
    if (spans) {
        for (int64_t i = 0; i < job.num_spans; i++, numbers += 4) spans[i] = (struct span){numbers[0], numbers[1], numbers[2], pages + numbers[3]};
        job.spans = spans;
        failed = variant(v[0])->attention(pool, &job);
        free(spans);
    }
    Py_END_ALLOW_THREADS
    return done(failed);
}

/* ---- memory */

static PyObject *store(PyObject *module, PyObject *const *arguments, Py_ssize_t count) {
    int64_t v[MAX_ARGUMENTS];
    struct pool *pool = read_job(arguments, count, 10, v);
    (void)module;
    if (!pool) return NULL;
    const struct storing job = {(enum kind)v[0], v[1], v[2], address(v[3]), address(v[4]), v[5], v[6], address(v[7]), v[8], (enum dtype)v[9]};
    Py_BEGIN_ALLOW_THREADS
    store_rows(pool, &job);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *use_huge_pages(PyObject *module, PyObject *const *arguments, Py_ssize_t count) {
    int64_t v[2];
    (void)module;
    if (read_integers(arguments, count, 2, v)) return NULL;
#ifdef MADV_HUGEPAGE
    const intptr_t huge = 2 << 20, first = (v[0] + huge - 1) / huge * huge, end = (v[0] + v[1]) / huge * huge;
    if (end > first) madvise((void *)first, (size_t)(end - first), MADV_HUGEPAGE); /* an advice: to fail is no error */
#endif
    Py_RETURN_NONE;
}

static PyObject *list_variants(PyObject *module, PyObject *unused) {
    PyObject *names = PyTuple_New(num_variants);
    (void)module, (void)unused;
    for (int i = 0; names && i < num_variants; i++) {
        PyObject *name = PyUnicode_FromString(variants[i]->name);
        if (!name || PyTuple_SetItem(names, i, name)) {
            Py_DECREF(names);
            return NULL;
        }
    }
    return names;
}

#define FAST(name) (PyCFunction)(void (*)(void))name, METH_FASTCALL

static PyMethodDef methods[] = {
    {"variants", list_variants, METH_NOARGS, "Instruction sets of this processor, best first."},
    {"create_pool", FAST(create_pool), "Threads that compute."},
    {"wake", wake, METH_O, "Keep a pool's threads awake until `rest`."},
    {"rest", rest, METH_O, "Let a pool's threads sleep."},
    {"linear", FAST(linear), "pool, variant, weight (5), x, rows, bias, out, dtype"},
    {"feed_forward", FAST(feed_forward), "pool, variant, gate_up (5), down (5), x, rows, biases (2), out, dtype, chosen, weights, num_experts, k"},
    {"attention", FAST(attention), "pool, variant, and the fields of attention_job"},
    {"store", FAST(store), "pool, and the fields of storing"},
    {"use_huge_pages", FAST(use_huge_pages), "address, bytes"},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {PyModuleDef_HEAD_INIT, .m_name = "_operations", .m_doc = "Compiled kernels.", .m_size = -1, .m_methods = methods};

PyMODINIT_FUNC PyInit__operations(void) {
    find_variants();
    return PyModule_Create(&definition);
}
