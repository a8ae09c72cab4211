"""The arithmetic on a GPU of NVIDIA: Triton kernels, and cuBLAS for dense weights and many rows.

`device/` is what runs there; the modules beside it prepare what a kernel is told and launch it. Everything was tested under
Triton's interpreter and compiled for compute capability 8.0 and 9.0; none of it has run on a GPU yet, and no speed of it is
known.
"""
