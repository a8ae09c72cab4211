"""The arithmetic on a GPU of NVIDIA: Triton kernels, and cuBLAS for dense weights and many rows.

`device/` is what runs there; the modules beside it prepare what a kernel is told and launch it. A layer takes at most four
launches to attend and three for its experts, beside projections; while decoding they are replayed from CUDA graphs.

None of it has run on a GPU: it was tested under Triton's interpreter and compiled for compute capability 8.0, 8.9 and 9.0.
Its speed is unknown, tiles are chosen by arithmetic, and `CudaRecorder` was never called. On a machine with a GPU,
`pytest -m gpu` runs the same tests there and `bench/gpu.py` measures.
"""
