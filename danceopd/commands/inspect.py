"""`danceopd inspect`: what an adapter or a whole pipeline is, read from file headers; no weight is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..disk import sha256
from ..errors import UserError


def describe(path: str | Path) -> dict[str, Any]:
    """Facts of a LoRA (file or folder), or of a pipeline folder, with the sha256 of every weight file."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist; give a LoRA, or a folder with a LoRA or a pipeline")
    if (path / "model_index.json").is_file():
        return _pipeline(path)
    from ..lora_file import inspect_adapter

    header = inspect_adapter(path)
    return {
        "kind": "LoRA",
        "file": str(header.file),
        "sha256": sha256(header.file),
        "dialect": header.dialect,
        "rank": header.rank,
        "modules": len(header.ranks),
        "tensors": len(header.shapes),
        "parameters": sum(_product(shape) for shape in header.shapes.values()),
        "dtypes": list(header.dtypes),
        "names": sorted(header.ranks),
    }


def show(facts: dict[str, Any], names: bool = False) -> None:
    """Prints what `describe` found as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None)
    for key, value in facts.items():
        if key in ("names", "parts", "weights"):
            continue
        table.add_row(key, ", ".join(value) if isinstance(value, list) else str(value))
    for name, kind in facts.get("parts", {}).items():
        table.add_row(name, kind)
    for file in facts.get("weights", []):
        table.add_row(file["file"], f"{file['parameters']:,} parameters, sha256 {file['sha256']}")
    console = Console(soft_wrap=True)
    console.print(table, highlight=False)
    for name in facts.get("names", []) if names else []:
        console.print(f"  {name}", markup=False, highlight=False)


def _pipeline(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        index = json.loads((path / "model_index.json").read_text(encoding="utf-8"))
        parts = {name: value[1] for name, value in index.items() if isinstance(value, list) and value[1]}
    except (ValueError, AttributeError, IndexError, OSError) as error:
        raise UserError(f"{path / 'model_index.json'} is not a diffusers index ({error}); restore it") from None
    weights = []
    for file in sorted(path.rglob("*.safetensors")):
        try:
            with safe_open(file, framework="numpy") as tensors:
                shapes = [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} is damaged ({error}); download or copy it again") from None
        weights.append(
            {
                "file": str(file.relative_to(path)),
                "sha256": sha256(file),
                "tensors": len(shapes),
                "parameters": sum(_product(shape) for shape in shapes),
            }
        )
    return {"kind": "pipeline", "class": index.get("_class_name"), "parts": parts, "weights": weights}


def _product(shape: Any) -> int:
    total = 1
    for size in shape:
        total *= int(size)
    return total
