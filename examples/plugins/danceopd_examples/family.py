"""A family: FLUX.2 klein, whose students adapt the attention of the double-stream blocks, beside their start.

For a model that danceopd does not know, fill in every field of `Family`: docs/bring-your-own-model.md.
"""

from dataclasses import replace

from danceopd.pipelines import FAMILIES

KLEIN_ATTENTION = replace(
    FAMILIES["flux2-klein"],
    name="klein-attention",
    lora_targets=r"transformer_blocks\.\d+\.attn\.(to_[qkv]|add_[qkv]_proj|to_add_out|to_out\.0)",
)
