"""The header of a LoRA file: which file a path means, its layers and ranks, and what its keys alone rule out.

`inspect_adapter` reads the header and no weight, so checks before a run cost nothing.
"""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import regex

from danceopd.adapters.dialects import TEXT_ENCODERS, adapter_kind, dialect, split_key
from danceopd.common.messages import few
from danceopd.common.parse import parse_json
from danceopd.common.safetensors import PICKLE_SUFFIXES, SafetensorsHeader, read_header, refuse_pickle
from danceopd.errors import UserError

WEIGHTS = "pytorch_lora_weights.safetensors"
"""The name that diffusers gives a LoRA file."""
METADATA_KEY = "danceopd"
"""The entry of a file's metadata that danceopd writes."""
PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
OTHER_ADAPTERS = {
    ".oft_": "OFT",
    ".boft_": "BOFT",
    ".lokr_t2": "LoKr of convolutions",
    ".hada_t": "LoHa of convolutions",
    ".vera_lambda": "VeRA",
    ".ia3_l": "IA3",
    ".lora_E": "AdaLoRA",
}
"""Parts of keys -> the kind of adapter that has them, which is no plain LoRA and is not read."""
_CHANGE_THE_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")
_CONFIGS = ("lora_adapter_metadata", "lora_config", "adapter_config")  # entries of a file's metadata
_DIFFERENCES = (".diff", ".diff_b", ".w_norm", ".b_norm", ".lora_B.bias", ".lora_up.bias")
_LONGEST_CONFIG = 10_000_000
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.safetensors$")
_log = logging.getLogger("danceopd")


@dataclass(frozen=True)
class LoraHeader(SafetensorsHeader):
    """What a LoRA file says of itself without its weights (`inspect_adapter`)."""

    ranks: dict[str, int]  # by layer, as the file names it; of a LoKr or LoHa the rank of its factors
    dialect: str  # diffusers, peft, comfyui, kohya, plain, unknown

    @property
    def rank(self) -> int:
        """The largest rank; 0 when the file holds no LoRA."""
        return max(self.ranks.values(), default=0)

    @property
    def kind(self) -> str:
        """LoRA, DoRA, LoKr or LoHa, by its keys."""
        return adapter_kind(self.shapes)

    @property
    def record(self) -> dict[str, Any]:
        """What danceopd wrote into the file: `modules`, `sha256` and the caller's strings; {} otherwise."""
        try:
            found = parse_json(self.metadata.get(METADATA_KEY, "{}"))
        except ValueError:
            found = {}
        return found if isinstance(found, dict) else {}

    @cached_property
    def peft(self) -> dict[str, Any] | None:
        """The PEFT configuration that scales the file, checked; or None.

        It stands in the file's metadata, or in the file beside it; kohya's metadata has the same two numbers. UserError
        when it is broken, or says that the adapter is not W + BA.
        """
        config, where = self._config()
        if config is None:
            return None
        return _checked(config, where, self.kind)

    @property
    def assumed(self) -> str | None:
        """Where the strength was taken from, when that is a place that stock diffusers does not read; or None."""
        alphas = any(key.endswith(".alpha") for key in self.shapes)
        config, where = self._config()
        usual = where.startswith(_CONFIGS[0]) or self.dialect == "peft"
        return where if config and config.get("lora_alpha") is not None and not usual and not alphas else None

    def _config(self) -> tuple[dict[str, Any] | None, str]:
        """The configuration as it was found, and its place for messages."""
        for entry in _CONFIGS:
            if not self.metadata.get(entry):
                continue
            where = f"{entry} in the metadata of {self.file}"
            found = _json_object(self.metadata[entry], where)
            found = {key.removeprefix("transformer."): value for key, value in found.items()}
            found = {key: value for key, value in found.items() if "." not in key}  # of the transformer alone
            if found and (entry == _CONFIGS[0] or "lora_alpha" in found):
                return found, where
        beside, of_this = self.file.with_name(PEFT_CONFIG), self.file.name == PEFT_WEIGHTS or self.dialect == "peft"
        alone = self.dialect in ("diffusers", "plain") and not self.file.with_name(PEFT_WEIGHTS).is_file()
        if beside.is_file() and (of_this or (alone and not self.record)):
            if beside.stat().st_size > _LONGEST_CONFIG:
                raise UserError(f"{beside} is no PEFT configuration (it is larger than 10 MB); copy it again")
            return _json_object(beside.read_text(encoding="utf-8", errors="replace"), str(beside)), str(beside)
        kohya = {"ss_network_dim": "r", "ss_network_alpha": "lora_alpha"}
        numbers = {name: _number(self.metadata.get(key)) for key, name in kohya.items()}
        if self.dialect == "kohya" and self.kind in ("LoRA", "DoRA") and numbers["lora_alpha"] is not None:
            return numbers, f"ss_network_alpha in the metadata of {self.file}"
        return None, ""


def _number(text: str | None) -> float | None:
    try:
        return float(text or "")
    except ValueError:
        return None


def _json(text: str, where: str) -> Any:
    try:
        return parse_json(text)
    except ValueError:
        pointer = text.startswith("version https://git-lfs")
        mend = "fetch it with `git lfs pull`" if pointer else "copy or download it again"
        what = "is a git-lfs pointer" if pointer else "cannot be read as JSON"
        raise UserError(f"{where} {what}, and it gives the LoRA its strength; {mend}") from None


def _json_object(text: str, where: str) -> dict[str, Any]:
    value = _json(text, where)
    if not isinstance(value, dict):
        raise UserError(f"{where} is no JSON object, and it gives the LoRA its strength; copy or download it again")
    return value


def _checked(config: dict[str, Any], where: str, kind: str) -> dict[str, Any]:
    """A PEFT configuration with numbers where numbers belong; UserError when it is not one of W + BA."""
    method = str(config.get("peft_type") or "LORA").upper()
    if method not in ("LORA", "LOKR", "LOHA"):
        raise UserError(f"{where} is of a {method[:40]} adapter, which is not W + BA; train a LoRA")
    if method != "LORA":
        config = config | {"lora_alpha": config.get("alpha", config.get("lora_alpha"))}
    if config.get("use_dora") and kind != "DoRA":
        raise UserError(
            f"{where} says that this is a DoRA, and the file has no magnitudes; save it again with them, or train a "
            "LoRA without use_dora"
        )
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(_CHANGE_THE_BASE):
        raise UserError(
            f"{where} says init_lora_weights {start[:40]!r}: such an adapter changes the base's weights, too, so it is "
            "not W + BA; convert it with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...), or "
            "merge it into its base with PEFT and `danceopd extract` the difference"
        )
    for key in ("fan_in_fan_out", "layer_replication", "alora_invocation_tokens", "target_parameters", "use_qalora"):
        if config.get(key):
            raise UserError(f"{where} says {key}, which a LoRA of Linear layers cannot hold; train without it")
    for key in ("r", "lora_alpha"):
        if config.get(key) is not None and not _is_number(config[key]):
            raise UserError(f"{where} says {key} {_cut(config[key])}, which is no number; mend that configuration")
    if config.get("lora_alpha") is None:
        raise UserError(f"{where} has no {'lora_alpha' if method == 'LORA' else 'alpha'}, the strength; write it there")
    for key in ("rank_pattern", "alpha_pattern"):
        pattern = config.get(key) or {}
        if not isinstance(pattern, dict) or not all(map(_is_number, pattern.values())):
            raise UserError(f"{where} has a {key} that is no map of layers to numbers; mend that configuration")
        for name in pattern:
            try:
                regex.compile(f"(.*\\.)?({name})$")
            except (regex.error, RecursionError, OverflowError, MemoryError):
                raise UserError(
                    f"{where} has the {key} {_cut(name)}, which is no regular expression; mend that configuration"
                ) from None
    return config


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _cut(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def adapter_file(path: str | os.PathLike) -> Path:
    """The LoRA file that a path means: itself, or in a folder the one that diffusers or PEFT wrote, or the only one.

    UserError when there is none, when there are several or it is in shards, and for a pickle.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise UserError(
            f"{path} does not exist; give a LoRA's safetensors file or the folder that holds it "
            "(download one from the hub with `hf download OWNER/NAME --local-dir FOLDER`)"
        )
    if path.is_dir():
        path = _file_in(path)
    refuse_pickle(path)
    _refuse_shard(path)
    return path


def _file_in(folder: Path) -> Path:
    if (folder / WEIGHTS).is_file():
        return folder / WEIGHTS
    if (folder / "model_index.json").is_file():
        raise UserError(f"{folder} is a whole pipeline, not a LoRA; use it as a base, or extract a LoRA from it")
    if (folder / PEFT_WEIGHTS).is_file() and (folder / PEFT_CONFIG).is_file():
        return folder / PEFT_WEIGHTS
    found = sorted(folder.glob("*.safetensors"))
    for file in found:
        _refuse_shard(file)
    if len(found) > 1:
        raise UserError(
            f"{folder} holds {len(found)} safetensors files ({few(f.name for f in found)}) and none "
            f"is called {WEIGHTS}; name the one you mean"
        )
    if found:
        return found[0]
    pickles = [f.name for f in folder.iterdir() if f.suffix in PICKLE_SUFFIXES]
    if pickles:
        raise UserError(
            f"{folder} holds no safetensors file, only {few(pickles)}, which would have to be "
            "unpickled and is refused; convert it to safetensors with a tool you trust"
        )
    below = sorted({str(file.parent) for file in folder.glob("*/*.safetensors")})
    if below:
        raise UserError(f"{folder} holds no safetensors file, but its folders do; name one: {few(below)}")
    raise UserError(f"{folder} holds no safetensors file; give the folder that holds {WEIGHTS}, or a file")


def _refuse_shard(file: Path) -> None:
    """UserError for one of several files that hold a LoRA together, by its name or by an index beside it."""
    match, names = _SHARD.search(file.name), {file.name}
    for index in file.parent.glob("*.safetensors.index.json"):
        try:
            listed = set(parse_json(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{index} cannot be read; copy or download it again, or remove it") from None
        names = names | listed if file.name in listed else names
    total = max(len(names), int(match[2]) if match else 1)
    if total > 1:
        raise UserError(
            f"{file} is one of {total} shards, and danceopd reads a LoRA from one file; load all shards with "
            f"safetensors.torch.load_file and save them together as {WEIGHTS}"
        )


def inspect_adapter(path: str | os.PathLike) -> LoraHeader:
    """The header of a LoRA file or folder: names, shapes, ranks, dtypes, dialect, metadata. No weight is loaded.

    UserError for a file that is missing, empty, cut off or no safetensors file.
    """
    found = read_header(adapter_file(path))
    ranks: dict[str, int] = {}
    for key, shape in found.shapes.items():
        layer, part = split_key(key) or ("", "")
        if shape and part in ("A", "hada_w1_b", "hada_w2_b", "lokr_w1_b", "lokr_w2_b"):
            ranks[layer] = max(shape[0], ranks.get(layer, 0))
        elif len(shape) == 2 and part in ("lokr_w1", "lokr_w2"):
            ranks.setdefault(layer, 0)
    return LoraHeader(
        found.file, found.shapes, found.dtypes, found.metadata, found.dtype_of, ranks, dialect(sorted(found.shapes))
    )


def without(header: LoraHeader, drop: tuple[str, ...] = ()) -> LoraHeader:
    """The header without the parts that `drop` names; only "text-encoder" is one. Logs what was left out.

    Differences of biases and norms that are zero are left out, too: they change nothing. UserError when the file has
    nothing else.
    """
    header = _without_zeros(header)
    unknown = [part for part in drop if part != "text-encoder"]
    if unknown:
        raise UserError(f"there is no part {few(unknown)} to drop; known: text-encoder")
    texts = [key for key in header.shapes if TEXT_ENCODERS.match(key)]
    if not drop or not texts:
        return header
    kept = {key: shape for key, shape in header.shapes.items() if key not in set(texts)}
    if not kept:
        raise UserError(f"{header.file} adapts text encoders only; danceopd merges transformers, take another LoRA")
    layers = {split_key(key) or (key, "") for key in texts}
    _log.warning(
        "%s: its %d text-encoder layers are dropped; only its transformer is used", header.file,
        len({layer for layer, _ in layers}),
    )  # fmt: skip
    ranks = {layer: rank for layer, rank in header.ranks.items() if not TEXT_ENCODERS.match(f"{layer}.")}
    return replace(header, shapes=kept, ranks=ranks, dialect=dialect(sorted(kept)))


def _without_zeros(header: LoraHeader) -> LoraHeader:
    from safetensors import SafetensorError, safe_open

    odd = [key for key in header.shapes if key.endswith(_DIFFERENCES)]
    if not odd:
        return header
    try:
        with safe_open(str(header.file), framework="pt") as opened:
            zero = {key for key in odd if not opened.get_tensor(key).any()}
    except (SafetensorError, OSError, RuntimeError) as error:
        raise UserError(f"{header.file} cannot be read ({error}); download or copy it again") from None
    return replace(header, shapes={key: shape for key, shape in header.shapes.items() if key not in zero})


def check_is_lora(header: LoraHeader, dora: bool = False) -> None:
    """UserError when keys and configuration rule a file out: no LoRA, a text encoder's, another kind of adapter.

    `dora`: DoRA is taken, by a caller that has the base's weights.
    """
    file, keys = header.file, list(header.shapes)
    if not keys:
        raise UserError(f"{file} holds no tensors, so it is not a LoRA; use the file your trainer saved")
    texts = [key for key in keys if TEXT_ENCODERS.match(key)]
    if texts:
        raise UserError(
            f"{file} also adapts a text encoder ({len(texts)} tensors such as {few([min(texts)])}), and danceopd "
            "merges transformers only; write it without that part: "
            "`danceopd export FILE --base BASE --drop text-encoder -o OUT`"
        )
    for mark, kind in OTHER_ADAPTERS.items():
        marked = [key for key in keys if mark in key]
        if marked:
            raise UserError(
                f"{file} is an adapter of the kind {kind} ({few([min(marked)])}), which is not read; merge it into its "
                "base with the tool that trained it and `danceopd extract` the difference, which says what a rank loses"
            )
    marked = [key for key in keys if (split_key(key) or ("", ""))[1] == "magnitude"]
    if marked and not dora:
        raise UserError(
            f"{file} is a DoRA ({len(marked)} tensors such as {few([min(marked)])}), which needs the base's weights; "
            "make a LoRA of it: `danceopd extract BASE FILE -o OUT --rank 64` says what the rank loses"
        )
    unknown = [key for key in keys if split_key(key) is None]
    if len(unknown) == len(keys):
        raise UserError(
            f"{file} is not a LoRA: none of its {len(keys)} tensors is a lora_A, lora_B, lora_down "
            f"or lora_up ({few(unknown)}); give a LoRA file"
        )
    if unknown:
        raise UserError(
            f"{file} holds {len(unknown)} tensors that belong to no LoRA layer ({few(unknown)}), such as biases and "
            "norms, which a LoRA cannot hold; train Linear layers only, or merge it into its base and use that whole"
        )
    header.peft  # noqa: B018 - it is checked


def is_checkpoint(path: str | Path) -> bool:
    """Whether a path is a whole model and not an adapter; headers are read, at most.

    A run folder that was fused is both, and counts as a LoRA. UserError for a file that is no safetensors file.
    """
    path = Path(path)
    if path.is_dir():
        if (path / WEIGHTS).is_file():
            return False
        return (path / "model_index.json").is_file() or (path / "config.json").is_file()
    header = inspect_adapter(path)
    return bool(header.shapes) and not header.ranks and not any(m in k for k in header.shapes for m in OTHER_ADAPTERS)
