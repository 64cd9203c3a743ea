"""The Triton implementation of every kernel; runs on a CPU, too, in Triton's interpreter. Imports nothing here.

In and out as in `danceopd.kernels.cuda`: the tensors of one operator, and its outputs written by one launch (two for
two streams). Read `qkv.py` first. `import triton` in these files is the Triton package, not this folder.
"""
