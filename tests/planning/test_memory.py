"""The plan's memory against what real transformers of true size hold, counted on the meta device."""

from __future__ import annotations

import meta_counts
import pytest
from header_only import MODELS, small_transformer

from danceopd.models.flops import TokenCounts, activation_bytes, forward_bytes

# (model, side in pixels, whether there is a source, tokens of text)
ROWS = [
    ("klein-4b", 1024, True, 512), ("klein-4b", 512, False, 512), ("flux1-dev", 1024, True, 512),
    ("qwen-image", 1024, True, 512), ("z-image", 1024, False, 512), ("sd3.5-medium", 1024, False, 333),
    ("longcat-image", 1024, True, 512), ("bria-fibo", 1024, True, 1000),
    ("wan2.2-ti2v-5b", 1024, False, 512),
]  # fmt: skip


@pytest.mark.parametrize(("name", "side", "source", "text"), ROWS)
@pytest.mark.parametrize("kind", ["kept", "checkpointed", "forward"])
def test_activations_are_those_of_the_real_transformer(
    name: str, side: int, source: bool, text: int, kind: str
) -> None:
    transformer = small_transformer(name)
    tokens = TokenCounts((side // 16) ** 2, (side // 16) ** 2 * source, text)
    if kind == "forward":
        said = forward_bytes(transformer, tokens, 2)
    else:
        said = activation_bytes(transformer, tokens, 2, kind == "checkpointed")
    weights = sum(p.nbytes for p in transformer.parameters())
    counted = meta_counts.counted(
        MODELS[name].family, transformer, side=side, source=source, text=text, gradient=kind != "forward",
        checkpointed=kind == "checkpointed",
    )  # fmt: skip
    tolerance = 0.05 * (counted if kind == "kept" else weights + counted)
    assert said == pytest.approx(counted, abs=tolerance)
