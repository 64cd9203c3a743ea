"""`danceopd inspect`: what a LoRA, a model or a run's folder is and can be used for, from headers alone.

The architecture of a LoRA is recognised by its layers' names. Several architectures can share them (attention layers
have the same names in FLUX, Qwen-Image and SD3); then all are named, unless the file says its base.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from danceopd.adapters.dialects import split_prefix
from danceopd.adapters.export import FORMATS
from danceopd.adapters.header import LoraHeader, check_is_lora, inspect_adapter, without
from danceopd.adapters.original_names import ARCHITECTURES, ArchitectureNames
from danceopd.adapters.read import check_layers
from danceopd.cli.boundary import echo
from danceopd.common.files import numbered_folders, sha256
from danceopd.common.messages import did_you_mean
from danceopd.common.shipped import SHIPPED, resolve
from danceopd.errors import UserError
from danceopd.models.base import quantised
from danceopd.recipe.recorded import recorded_recipe

LONG = ("names", "parts", "weights", "targets")
"""Facts that `show` prints below the others, a line for each item."""
_NUMBERED = re.compile(r"(?<=[._])\d+(?=[._])")  # in the name of a layer of a block
FULL = ["teacher: teachers[].adapter", "danceopd extract BASE THIS"]


def describe(path: str | Path) -> dict[str, Any]:
    """Facts of a LoRA, a whole model (pipeline, transformer folder, single file) or a run's folder.

    `kind` is "LoRA", "pipeline", "transformer", "checkpoint" or "run"; `uses` lists what it can be used for, by recipe
    key or command, and `refused` says why it cannot be used. UserError for what is none of these, or damaged.
    """
    if str(path) in SHIPPED:
        path = resolve(str(path), "checkpoint")
    path = Path(path).expanduser()
    if not path.exists():
        raise UserError(
            f"{path} does not exist; give a LoRA, a model's folder or file, a run's folder, or a shipped name"
            f"{did_you_mean(path, SHIPPED) if path.parent == Path('.') else ''}"
        )
    if (path / "recipe.yaml").is_file():
        return _run(path)
    if (path / "model_index.json").is_file():
        return _pipeline(path)
    if (path / "config.json").is_file() and not (path / "adapter_config.json").is_file():
        return _transformer(path)
    header = inspect_adapter(path)
    return _lora(header) if header.ranks or _is_adapter(header) else _checkpoint(header)


def show(facts: dict[str, Any], names: bool = False) -> None:
    """Print what `describe` found, a fact a line; lines are not wrapped, so that hashes can be copied."""
    rows: list[tuple[str, str]] = []
    for key, value in facts.items():
        if key in LONG or value is None or value == []:
            continue
        if key == "uses":
            rows += [(key if number == 0 else "", use) for number, use in enumerate(value)]
        else:
            shown = f"{value:,}" if key == "parameters" else str(value)
            rows.append((key.replace("_", " "), ", ".join(value) if isinstance(value, list) else shown))
    rows += [(f"{count} x", name) for name, count in facts.get("targets", {}).items()]
    rows += facts.get("parts", {}).items()
    wide = max(len(key) for key, _ in rows)
    for key, shown in rows:
        echo(f"{key:<{wide}}  {shown}")
    for file in facts.get("weights", []):
        echo(f"{file['file']}: {file['parameters']:,} parameters, sha256 {file['sha256']}")
    for name in facts.get("names", []) if names else []:
        echo(f"  {name}")


def _lora(header: LoraHeader) -> dict[str, Any]:
    layers = [split_prefix(layer)[1] for layer in header.ranks]
    ranks, refused = sorted(header.ranks.values()), None
    try:
        ranks = sorted(layer.parts["A"].shape[0] for layer in check_layers(without(header)))
    except UserError as error:
        refused = str(error)
    config = {} if refused else header.peft or {}
    base = _base(header, config)
    found = _architectures(layers, _of_base(base))
    facts: dict[str, Any] = {
        "kind": header.kind,
        "file": str(header.file),
        "sha256": sha256(header.file),
        "adapter_sha256": header.record.get("sha256"),
        "dialect": header.dialect,
        "family": _of_base(base) or _families(found),
        "transformer": [names.transformer for names in found],
        "base": base,
        "base_sha256": header.record.get("base_sha256"),
        "rank": ranks[-1] if ranks else 0,
        "lowest_rank": ranks[0] if ranks else 0,
        "alpha": _alpha(header, config),
        "modules": len(header.ranks),
        "tensors": len(header.shapes),
        "parameters": sum(_product(shape) for shape in header.shapes.values()),
        "dtypes": list(header.dtypes),
        "refused": refused,
        "uses": [] if refused else _uses(header, found),
        "targets": dict(sorted(Counter(_NUMBERED.sub("N", layer, count=1) for layer in layers).items())),
        "names": sorted(header.ranks),
    }
    return facts


def _is_adapter(header: LoraHeader) -> bool:
    """Whether a file without A and B is an adapter all the same, of a kind or a model that is refused."""
    try:
        check_is_lora(header)
    except UserError as error:
        return "is not a LoRA" not in str(error)
    return True


def _uses(header: LoraHeader, found: list[ArchitectureNames]) -> list[str]:
    formats = FORMATS if found else ("diffusers", "peft")
    base = "" if found else " (with a base that has these layers)"
    uses = [f"teacher: teachers[].adapter{base}", f"start: student.init{base}", "danceopd blend"]
    if found and all(_stock(header, names) for names in found):
        uses.append("stock load_lora_weights")
    return [*uses, f"danceopd export --format {', '.join(formats)}{base}"]


def _stock(header: LoraHeader, names: ArchitectureNames) -> bool:
    """Whether stock diffusers is known to read this file, every layer and at its strength; when in doubt, not."""
    if header.kind != "LoRA" or header.assumed or header.dialect not in names.stock:
        return False
    layers = {layer: split_prefix(layer)[1] for layer in header.ranks}
    if header.dialect == "diffusers":
        return all(layer == f"transformer.{name}" and names.is_own(name) for layer, name in layers.items())
    if not all(_NUMBERED.search(name) and layer.endswith(name) for layer, name in layers.items()):
        return False  # its converters know the blocks, and the first and last layers only here and there
    alpha = any(key.endswith(".alpha") for key in header.shapes)
    halves = any(f".{names.halves[0]}." in key for key in header.shapes)
    return header.dialect != "comfyui" or (halves and not (alpha and names.transformer == "Flux2Transformer2DModel"))


def _alpha(header: LoraHeader, config: dict[str, Any]) -> str:
    """The alphas in the file, the alpha of its PEFT configuration, or "folded into B"."""
    keys = [key for key in header.shapes if key.endswith(".alpha")]
    if keys:
        from safetensors import safe_open

        with safe_open(str(header.file), framework="pt") as opened:
            tensors = [opened.get_tensor(key) for key in keys if _product(header.shapes[key])]
        values = sorted({float(tensor.flatten()[0]) for tensor in tensors})
        return ", ".join(f"{value:g}" for value in values[:6]) + (" and more" if len(values) > 6 else "")
    if config.get("lora_alpha") is not None:
        kind = "alpha/√rank" if config.get("use_rslora") else "alpha/rank"
        pattern = " with a pattern" if config.get("alpha_pattern") else ""
        return f"{config['lora_alpha']:g} by {header.assumed or 'its configuration'}{pattern}, {kind}"
    return "folded into B"


def _base(header: LoraHeader, config: dict[str, Any]) -> str | None:
    """The base that a file names: in danceopd's metadata, PEFT's configuration, or a trainer's metadata."""
    named = (
        header.record.get("base"),
        config.get("base_model_name_or_path"),
        header.metadata.get("ss_sd_model_name"),
        header.metadata.get("modelspec.architecture"),
    )
    return next((str(name) for name in named if name), None)


def _architectures(layers: Iterable[str], families: Iterable[str] = ()) -> list[ArchitectureNames]:
    """The architectures that have all the layers, of these families when some are given."""
    layers = list(layers)
    found = [names for names in ARCHITECTURES.values() if layers and all(map(names.has, layers))]
    return [names for names in found if not families or set(families) & set(_families([names]))]


def _families(found: Iterable[ArchitectureNames]) -> list[str]:
    """The families whose pipelines have such a transformer."""
    from danceopd.pipelines.registry import FAMILIES

    stems = [names.pipelines for names in found]
    return [f.name for f in FAMILIES.values() if any(re.match(stem, f.generation) for stem in stems)]


def _of_base(base: str | None) -> list[str]:
    """The family of a base that is a local folder or a shipped name; else []."""
    from danceopd.pipelines.registry import family_of

    try:
        folder = Path(resolve(base, "base")) if base else None
        return [family_of(folder).name] if folder and (folder / "model_index.json").is_file() else []
    except UserError:
        return []


def _checkpoint(header: LoraHeader) -> dict[str, Any]:
    """Facts of a single file with the weights of a whole model."""
    weights = [key.removesuffix(".weight") for key, shape in header.shapes.items() if len(shape) == 2]
    layers = [split_prefix(key)[1] for key in weights if key.split(".")[-1] != "bias"]
    shares = {kind: sum(map(names.has, layers)) for kind, names in ARCHITECTURES.items()}
    most = max(shares.values(), default=0)
    found = [ARCHITECTURES[kind] for kind, count in shares.items() if count == most and 2 * count >= len(layers) > 0]
    if not found:
        check_is_lora(header)
    return {
        "kind": "checkpoint",
        "file": str(header.file),
        "sha256": sha256(header.file),
        "family": _families(found),
        "transformer": [names.transformer for names in found],
        "tensors": len(header.shapes),
        "parameters": sum(_product(shape) for shape in header.shapes.values()),
        "dtypes": list(header.dtypes),
        "uses": list(FULL),
    }


def _transformer(path: Path) -> dict[str, Any]:
    """Facts of a folder that `transformer.save_pretrained` wrote."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        kind = config["_class_name"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(
            f"{path / 'config.json'} is not a diffusers model's configuration ({type(error).__name__}); give a LoRA, "
            "a transformer's folder or a pipeline's"
        ) from None
    weights, dtypes = _weights(path)
    found = [ARCHITECTURES[kind]] if kind in ARCHITECTURES else []
    families, refused = _families(found), quantised(config)
    return {
        "kind": "transformer",
        "class": kind,
        "family": families,
        "dtypes": dtypes,
        "refused": refused,
        "uses": list(FULL) if families and not refused else [],
        "weights": weights,
    }


def _pipeline(path: Path) -> dict[str, Any]:
    try:
        index = json.loads((path / "model_index.json").read_text(encoding="utf-8"))
        parts = {name: value[1] for name, value in index.items() if isinstance(value, list) and value[1]}
    except (ValueError, AttributeError, IndexError, OSError) as error:
        raise UserError(f"{path / 'model_index.json'} is not a diffusers index ({error}); restore it") from None
    from danceopd.pipelines.registry import family_of

    weights, _ = _weights(path)
    try:
        family = [family_of(path).name]
    except UserError:
        family = []
    facts: dict[str, Any] = {"kind": "pipeline", "class": index.get("_class_name"), "family": family}
    if (path / "transformer" / "config.json").is_file() and any((path / "transformer").glob("*.safetensors")):
        from danceopd.models.base import base_fingerprint

        part = _transformer(path / "transformer")
        facts |= {key: part[key] for key in ("dtypes", "refused")}
        facts["base_sha256"] = None if facts["refused"] else base_fingerprint(path)
    stock = "stock DiffusionPipeline.from_pretrained"
    uses = [] if not family else [stock] if facts.get("refused") else ["base: base", stock, *FULL]
    return facts | {"uses": uses, "parts": parts, "weights": weights}


def _run(path: Path) -> dict[str, Any]:
    """Facts of a run's output folder: its base, teachers and progress, and the LoRA it has exported."""
    recipe = recorded_recipe(path)
    teachers = recipe.get("teachers") if isinstance(recipe.get("teachers"), list) else []
    described = [f"{t.get('name')} ({t.get('adapter')})" for t in teachers or () if isinstance(t, dict)]
    facts: dict[str, Any] = {"kind": "run", "folder": str(path), "base": recipe.get("base"), "teachers": described}
    saved = numbered_folders(path / "checkpoints", "step")
    facts["steps"] = recipe.get("steps")
    facts["saved_step"] = int(saved[-1].name.removeprefix("step-")) if saved else None
    facts["finished"] = (path / "finished.json").is_file()
    try:
        lora = _lora(inspect_adapter(path))
    except UserError:
        uses = ["danceopd merge recipe.yaml (continues it)"] if saved else []
        return facts | {"uses": uses}
    return facts | {key: value for key, value in lora.items() if key not in ("kind", "base")}


def _weights(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Every safetensors file below a folder, and the dtypes in them."""
    from safetensors import SafetensorError, safe_open

    found, dtypes = [], set()
    for file in sorted(path.rglob("*.safetensors")):
        if any(part.startswith(".") for part in file.relative_to(path).parts):  # training state, not the model's
            continue
        try:
            with safe_open(file, framework="numpy") as tensors:
                slices = [tensors.get_slice(name) for name in tensors.keys()]  # noqa: SIM118
                shapes = [piece.get_shape() for piece in slices]
                dtypes |= {piece.get_dtype() for piece in slices}
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is damaged ({error}); download or copy it again") from None
        found.append(
            {
                "file": str(file.relative_to(path)),
                "sha256": sha256(file),
                "tensors": len(shapes),
                "parameters": sum(_product(shape) for shape in shapes),
            }
        )
    return found, sorted(dtypes)


def _product(shape: Any) -> int:
    total = 1
    for size in shape:
        total *= int(size)
    return total
