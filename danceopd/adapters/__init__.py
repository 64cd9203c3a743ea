"""LoRA files: read, check, write, blend, extract, export, load and fuse them.

A path goes in and an `Adapter` (danceopd/models/lora.py) comes out, or a sentence that says why not. Every tensor of a
file must match a Linear of the base, and every exported or fused file is read back before it takes its place. The key
names of diffusers, PEFT, ComfyUI and kohya are read in `dialects.py` and `original_names.py`. Start with `read.py`.
"""
