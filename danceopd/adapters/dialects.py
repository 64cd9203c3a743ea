"""The key names of LoRA files: a key of any dialect goes in, the module of the diffusers transformer comes out.

A key is split into (layer, part). A layer's name becomes a module path in four tries: as it stands; with its dots
restored (kohya flattens them to `_`); by the table of the original model's names; through the family's diffusers
converter, one layer at a time, so that a layer the converter drops or invents is noticed. Alpha is folded into B before
that, in fp32, so that no rounding affects it.
"""

import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from danceopd.adapters.original_names import ArchitectureNames

PREFIXES = (
    "base_model.model.transformer.",
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "lora_transformer_",
    "lora_unet_",
    "lycoris_",
)
TEXT_ENCODERS = re.compile(
    r"^(base_model\.model\.)?"
    r"(text_encoder|text_model|conditioner|cond_stage|te\d?\.|lora_te|lora_prior_te)"
)
_PART = re.compile(
    r"^(?P<layer>.+?)\."
    r"(?:lora[._](?P<half>A|B|down|up)(?:\.(?!weight$)[^.]+)?\.weight|(?P<alpha>alpha))$"
)
_HALVES = {"A": "A", "down": "A", "B": "B", "up": "B"}
_OWN_NAMES = (
    "",
    "transformer.",
    "base_model.model.",
    "base_model.model.transformer.",
)  # prefixes of diffusers' module paths
_ORIGINAL_NAMES = re.compile(r"(double|single)_blocks\.")  # of Black Forest Labs' own code

Pairs = dict[str, tuple[Tensor, Tensor]]


@dataclass
class Layer:
    """One layer of a file under the file's name for it; `parts` are 'A' (r, in), 'B' (out, r), perhaps 'alpha'."""

    name: str
    prefix: str
    parts: dict[str, Tensor] = field(default_factory=dict)


def split_key(key: str) -> tuple[str, str] | None:
    """'x.to_q.lora_down.weight' -> ('x.to_q', 'A'); the parts are 'A', 'B', 'alpha'. None for other keys."""
    match = _PART.match(key)
    if match is None:
        return None
    return match["layer"], "alpha" if match["alpha"] else _HALVES[match["half"]]


def split_prefix(layer: str) -> tuple[str, str]:
    """'diffusion_model.double_blocks.0.x' -> ('diffusion_model.', 'double_blocks.0.x'); '' without one."""
    prefix = next((prefix for prefix in PREFIXES if layer.startswith(prefix)), "")
    return prefix, layer[len(prefix) :]


def dialect(keys: Iterable[str]) -> str:
    """The dialect of a file from its keys: 'diffusers', 'peft', 'comfyui', 'kohya', 'plain' or 'unknown'."""
    layer = next((parts[0] for parts in map(split_key, keys) if parts), None)
    if layer is None:
        return "unknown"
    prefix = split_prefix(layer)[0]
    if prefix.startswith("base_model."):
        return "peft"
    if prefix.endswith("diffusion_model."):
        return "comfyui"
    return {"transformer.": "diffusers", "": "plain"}.get(prefix, "kohya")


def linear_sizes(transformer: nn.Module) -> dict[str, tuple[int, int]]:
    """Every Linear of a transformer: module path -> (in, out), without the matrices of adapters that PEFT injected.

    The transformer may be on the meta device.
    """
    return {
        name.removesuffix(".base_layer"): (module.in_features, module.out_features)
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear) and ".lora_" not in name
    }


def fold_alpha(layer: Layer, config: Mapping[str, Any] | None) -> None:
    """Scale B by alpha / rank: the alpha of the layer, else that of the PEFT configuration, else not at all.

    ValueError when alpha is not a positive number or the configuration contradicts the tensors.
    """
    rank = layer.parts["A"].shape[0]
    if "alpha" in layer.parts:
        scale = float(layer.parts["alpha"]) / rank
    else:
        scale = peft_scale(config, layer.name, rank) if config else 1.0
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"its alpha is {scale * rank:g}")
    if scale != 1.0:
        layer.parts["B"] = layer.parts["B"] * scale


def peft_scale(config: Mapping[str, Any], layer: str, rank: int) -> float:
    """The factor that PEFT applies to B·A of this layer: alpha/r, or alpha/√r, with its rank and alpha patterns.

    ValueError when the configuration names another rank than the tensors have.
    """
    from peft.utils.other import get_pattern_key

    ranks, alphas = dict(config.get("rank_pattern") or {}), dict(config.get("alpha_pattern") or {})
    configured = ranks.get(get_pattern_key(list(ranks), layer), config.get("r"))
    if configured is not None and int(configured) != rank:
        raise ValueError(f"its configuration says rank {configured} and its tensors say {rank}")
    alpha = alphas.get(get_pattern_key(list(alphas), layer), config.get("lora_alpha"))
    if alpha is None:
        return 1.0
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def pipeline_class(family: Any, transformer: nn.Module | None) -> type | None:
    """The diffusers pipeline class whose LoRA converter to use, or None.

    `family` is a Family, its name, a pipeline class or the name of one; without it, the family whose generation
    pipeline takes this transformer's class.
    """
    import diffusers

    from danceopd.pipelines.registry import FAMILIES

    if isinstance(family, type):
        return family
    name = getattr(FAMILIES.get(family, family) if isinstance(family, str) else family, "generation", family)
    if name is not None:
        return getattr(diffusers, name, None)
    for known in FAMILIES.values():
        candidate = getattr(diffusers, known.generation, None)
        takes = getattr(candidate, "__init__", candidate).__annotations__.get("transformer")
        if getattr(takes, "__name__", takes) == type(transformer).__name__:
            return candidate
    return None


@contextmanager
def _without_warnings() -> Iterator[None]:
    """A context without diffusers' warnings: an unknown layer is reported by `read_adapter`."""
    log = logging.getLogger("diffusers")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


class Renamer:
    """Called with a layer of a file, returns the modules of the diffusers transformer that it adapts.

    `sizes` (module path -> (in, out)) are the transformer's Linears; without them only names that no other dialect uses
    are taken as they stand. `pipeline` returns the pipeline class whose converter to try; it is called once, when
    needed. `names` are the architecture's original names, where they are known.
    """

    def __init__(
        self,
        sizes: Mapping[str, tuple[int, int]] | None,
        pipeline: Callable[[], type | None],
        names: ArchitectureNames | None = None,
    ):
        self.sizes, self.pipeline, self.names = sizes, pipeline, names
        self.converter: Callable[..., Any] | None = None
        self.searched = False  # for a converter
        self.dotted: dict[str, list[str]] = {}
        for name in sizes or ():
            self.dotted.setdefault(name.replace(".", "_"), []).append(name)

    def __call__(self, layer: Layer) -> Pairs:
        """{module path: (A, B)}: one entry, three where a fused qkv is split, empty when nothing matches."""
        name, a, b = layer.name, layer.parts["A"], layer.parts["B"]
        if self.sizes is None:
            if layer.prefix in _OWN_NAMES and not _ORIGINAL_NAMES.match(name):
                return {name: (a, b)}
        elif name in self.sizes:
            return {name: (a, b)}
        elif len(self.dotted.get(name, ())) == 1:
            return {self.dotted[name][0]: (a, b)}
        elif self.names is not None and (found := self.names.split(name, a, b, self.sizes)):
            return found
        flat = name.replace(".", "_")
        for stem, down, up in (
            (f"diffusion_model.{name}", "lora_A", "lora_B"),
            (f"lora_unet_{flat}", "lora_down", "lora_up"),
            (f"base_model.model.{name}", "lora_A", "lora_B"),
        ):
            found = self._convert({f"{stem}.{down}.weight": a, f"{stem}.{up}.weight": b})
            if found and (self.sizes is None or all(key in self.sizes for key in found)):
                return found
        return {}

    def _convert(self, tensors: dict[str, Tensor]) -> Pairs:
        if not self.searched:
            self.searched, self.converter = True, getattr(self.pipeline(), "lora_state_dict", None)
        if self.converter is None:
            return {}
        try:
            with _without_warnings():
                converted = self.converter(dict(tensors))
        except Exception:  # each converter fails in its own way on an unknown name
            return {}
        layers: dict[str, dict[str, Tensor]] = {}
        for key, tensor in converted.items():
            parts = split_key(key)
            if parts is None or key in tensors or not key.startswith("transformer."):
                return {}
            layers.setdefault(parts[0].removeprefix("transformer."), {})[parts[1]] = tensor
        if any(set(pair) != {"A", "B"} for pair in layers.values()):
            return {}
        return {name: (pair["A"].float(), pair["B"].float()) for name, pair in layers.items()}
