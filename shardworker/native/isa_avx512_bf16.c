/* AVX-512 with dot products of bfloat16. */
#include "operations.h"
#if defined(HAS_AVX512_BF16)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")
#endif
#define LANES 16
#define HAS_PAIRS
#include "attention.h"
#include "products.h"

const struct operations avx512_bf16_operations = {"avx512-bf16", linear, feed_forward, attention};
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
