"""The key names of LoRA files: a key of any dialect goes in, the module of the diffusers transformer comes out.

A key is split into (layer, part). A layer's name becomes a module path in four tries: as it stands; with its dots
restored (kohya flattens them to `_`); by the table of the original model's names; through the family's diffusers
converter, one layer at a time, so that a layer the converter drops or invents is noticed. LoKr and LoHa are written as
the A and B that they equal. Alpha is folded into B before that, in fp32, so that no rounding affects it.
"""

import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import regex
from torch import Tensor, nn

from danceopd.adapters.original_names import ArchitectureNames, is_original
from danceopd.adapters.svd import Factors, full_factors, hadamard_factors, kronecker_factors
from danceopd.common.messages import few
from danceopd.pipelines.two_transformers import PREFIX

PREFIXES = (
    "base_model.model.",
    "model.diffusion_model.",
    "diffusion_model.",
    "transformer.",
    "lora_transformer_",
    "lora_unet_",
    "lycoris_",
    "module.",  # DistributedDataParallel
)
_WRAPPERS = re.compile(r"(^|[._])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)[._]")
TEXT_ENCODERS = re.compile(
    r"^(base_model\.model\.)?"
    r"(text_encoder|text_model|conditioner|cond_stage|te\d?\.|lora_te|lora_prior_te|lycoris_text|clip_[lg]\.|t5xxl\.)"
)
_PART = re.compile(
    r"^(?P<layer>.+?)\."
    r"(?:lora[._](?P<half>A|B|down|up)(?:\.(?!weight$).+?)?\.weight"
    r"|(?P<alpha>alpha)"
    r"|(?P<magnitude>lora_magnitude_vector|dora_scale|magnitude)(?:\.\w+)*"
    r"|(?P<factor>lokr_w[12](?:_[ab])?|hada_w[12]_[ab])(?:\.\w+)*)$"
)
_XLABS = re.compile(r"^(?P<layer>.+\.processor\.\w+_lora\d?)\.(?P<half>down|up)\.weight$")
_HALVES = {"A": "A", "down": "A", "B": "B", "up": "B"}
_KINDS = {"magnitude": "DoRA", "lokr_": "LoKr", "hada_": "LoHa"}  # beginnings of parts

Pairs = dict[str, tuple[Tensor, Tensor]]


@dataclass
class Layer:
    """One layer of a file under the file's name for it.

    `parts` are 'A' (r, in), 'B' (out, r), perhaps 'alpha' and DoRA's 'magnitude', or the factors of a LoKr or LoHa.
    `rank` is what alpha is divided by; 0 where alpha does not count.
    """

    name: str
    prefix: str
    parts: dict[str, Tensor] = field(default_factory=dict)
    rank: int = 0

    def compose(self) -> None:
        """LoKr's Kronecker product and LoHa's Hadamard product as the A and B they equal; sets `rank`.

        ValueError when the parts do not fit together.
        """
        parts, kinds = self.parts, {part[:4] for part in self.parts if part[:5] in ("lokr_", "hada_")}
        if not kinds:
            self.rank = parts["A"].shape[0]
            return
        if len(kinds) > 1 or "A" in parts:
            raise ValueError("it is an adapter of two kinds at once")
        (kind,) = kinds
        first, second = (self._factors(f"{kind}_{half}") for half in ("w1", "w2"))
        sizes = {f"{a.shape[1]} to {b.shape[0]}" for a, b in (first, second)}
        if kind == "hada" and len(sizes) > 1:
            raise ValueError(f"its halves map {few(sizes)}")
        parts["A"], parts["B"] = (hadamard_factors if kind == "hada" else kronecker_factors)(first, second)

    def _factors(self, stem: str) -> Factors:
        """A (r, in), B (out, r) of one factor of a LoKr or LoHa, which is stored whole or as a product."""
        whole, left, right = (self.parts.get(stem + end) for end in ("", "_a", "_b"))
        given = [tensor for tensor in (whole, left, right) if tensor is not None]
        if len(given) != (1 if whole is not None else 2) or any(t.ndim != 2 or 0 in t.shape for t in given):
            raise ValueError(f"its {stem} is missing, or no matrix")
        if whole is not None:
            return full_factors(whole)
        assert left is not None and right is not None
        if left.shape[1] != right.shape[0]:
            raise ValueError(f"its {stem}_a {tuple(left.shape)} and {stem}_b {tuple(right.shape)} do not multiply")
        self.rank = right.shape[0]
        return right, left


def split_key(key: str) -> tuple[str, str] | None:
    """'x.to_q.lora_down.weight' -> ('x.to_q', 'A'); parts are named as in `Layer`. None for other keys."""
    match = _PART.match(key) or _XLABS.match(key)
    if match is None:
        return None
    found = match.groupdict()
    part = _HALVES.get(found["half"] or "") or found["factor"] or ("alpha" if found["alpha"] else "magnitude")
    return match["layer"], part


def adapter_kind(keys: Iterable[str]) -> str:
    """What the keys of a file are: LoRA, DoRA, LoKr or LoHa."""
    parts = {parts[1] for parts in map(split_key, keys) if parts}
    return next((kind for mark, kind in _KINDS.items() if any(part.startswith(mark) for part in parts)), "LoRA")


def stock_name(module: str) -> str:
    """A module as stock diffusers names it in a file: below `transformer.`, or below `transformer_2.`."""
    return module if module.startswith(PREFIX) else f"transformer.{module}"


def split_prefix(layer: str) -> tuple[str, str]:
    """'diffusion_model.double_blocks.0.x' -> ('diffusion_model.', 'double_blocks.0.x'); '' without one.

    Several prefixes go together; the wrappers of torch.compile, FSDP and DDP are left out.
    """
    layer, prefix = _WRAPPERS.sub(r"\1", layer), ""
    while found := next((known for known in PREFIXES if layer.startswith(known)), ""):
        prefix, layer = prefix + found, layer[len(found) :]
    return prefix, layer


def dialect(keys: Iterable[str]) -> str:
    """The dialect of a file from its keys: 'diffusers', 'peft', 'comfyui', 'kohya', 'plain' or 'unknown'."""
    layer = next((parts[0] for parts in map(split_key, keys) if parts), None)
    return "unknown" if layer is None else _dialect(split_prefix(layer)[0])


def _dialect(prefix: str) -> str:
    if "base_model." in prefix:
        return "peft"
    if "diffusion_model." in prefix:
        return "comfyui"
    if "lora_" in prefix or "lycoris_" in prefix:
        return "kohya"
    return "diffusers" if "transformer." in prefix else "plain"


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
    if "alpha" in layer.parts:
        scale = float(layer.parts["alpha"]) / layer.rank if layer.rank else 1.0
    else:
        scale = peft_scale(config, layer.name, layer.rank) if config else 1.0
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"its alpha is {scale * layer.rank:g}")
    if scale != 1.0:
        layer.parts["B"] = layer.parts["B"] * scale


def peft_scale(config: Mapping[str, Any], layer: str, rank: int) -> float:
    """The factor that PEFT applies to B·A of this layer: alpha/r, or alpha/√r, with its rank and alpha patterns.

    `config` as `LoraHeader.peft` has checked it; `rank` 0: the tensors do not tell. ValueError when the configuration
    names another rank than the tensors have, and for a pattern that takes too long to match.
    """
    configured = _by_pattern(config, "rank_pattern", layer, config.get("r"))
    if rank and configured is not None and configured != rank:
        raise ValueError(f"its configuration says rank {configured:g} and its tensors say {rank}")
    alpha, rank = _by_pattern(config, "alpha_pattern", layer, config.get("lora_alpha")), rank or configured
    if alpha is None or not rank:
        return 1.0
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _by_pattern(config: Mapping[str, Any], key: str, layer: str, usual: Any) -> Any:
    """The value of the first pattern that matches the layer's whole name or its end, as PEFT matches it."""
    patterns = config.get(key) or {}
    try:
        # `regex` can stop, `re` cannot
        found = (value for p, value in patterns.items() if regex.match(rf"(.*\.)?({p})$", layer, timeout=0.2))
        return next(found, usual)
    except TimeoutError:
        raise ValueError(f"the {key} of its configuration takes too long to match") from None


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
        if self.sizes is None and _dialect(layer.prefix) in ("diffusers", "peft", "plain") and not is_original(name):
            return {name: (a, b)}
        if self.sizes is not None and name in self.sizes:
            return {name: (a, b)}
        if len(self.dotted.get(name, ())) == 1:
            return {self.dotted[name][0]: (a, b)}
        if self.names is not None and self.names.modules(name):
            return self.names.split(name, a, b, self.sizes)
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
