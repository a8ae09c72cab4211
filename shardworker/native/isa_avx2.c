/* AVX2 with FMA and F16C. */
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define LANES 8
#include "attention.h"
#include "products.h"

const struct operations avx2_operations = {"avx2", linear, feed_forward, attention};
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
