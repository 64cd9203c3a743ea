"""The CUDA implementation of every kernel: sources, compiler, driver, launcher. Imports nothing here.

In: the tensors of one operator (`danceopd.kernels.ops`), on a CUDA device of compute capability 8.0 or later.
Out: the outputs written, by one launch on torch's current stream. Read `launch.py` first (one function a kernel), then
`csrc/` (the sources), `build.py` (NVRTC or nvcc on first use, kept in the cache), `driver.py` (load and launch through
ctypes) and `structs.py` (the argument structs of both sides).
"""
