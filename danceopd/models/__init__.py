"""The network: a base on disk, one frozen transformer with named LoRA adapters, and its velocity fields.

A base's folder goes in, a `Backbone` and fields `field(x, sigma, condition) -> v` come out; training, sampling and the
benchmark call only those. The other files make the same forward cheaper: streamed from disk, sharded with FSDP,
compiled, captured as a CUDA graph, or with the source image's keys and values kept. Start with `backbone.py`.
"""
