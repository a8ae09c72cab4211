/* AVX-512 (F, BW, DQ, VL). */
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
#define LANES 16
#include "attention.h"
#include "products.h"

const struct operations avx512_operations = {"avx512", linear, feed_forward, attention};
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
