"""Compiled kernels: C sources beside this file, built into `_operations` where a C compiler is.

`weights.h` says how weights lie in memory, `tiles.h` multiplies, `products.h` and `attention.h` cut the work into tasks,
`pool.c` shares these among threads, `store.c` quantizes weights and lays them out, `isa_*.c` compile the arithmetic for one
instruction set each, `module.c` is what Python calls.
"""
