"""The kernels as `torch.library` custom operators, with shapes for tracing and gradients. Imports nothing here.

In: the tensors of one call (`danceopd.kernels.functional` decides whether there is one). Out: new tensors, computed by
the implementation that `danceopd.kernels.backend` selects: CUDA, Triton or the plain torch reference. Read
`attention_ops.py` first; `dispatch.py` holds what all operators share.
"""
