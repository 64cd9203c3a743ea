"""How the frozen base is kept where a card is small: quantised, or in the computer's memory but for one block.

In: a transformer in full precision on the CPU. `quantise` makes of it, in place, what diffusers makes of one that it
loads with the same quantisation config; LoRA layers on it stay where they are. `offload` leaves the blocks' weights in
the computer's memory and brings each to the card for its own forward, and for that of its backward. Libraries are
imported when they are needed: torchao alone takes seconds.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from danceopd.common.messages import shown
from danceopd.common.system import gigabytes
from danceopd.errors import UserError
from danceopd.models.base import pipeline_index, quietly
from danceopd.models.flops import block_paths

PACKAGES = {"nf4": "bitsandbytes", "int8": "torchao", "fp8": "torchao", "gguf": "gguf"}
"""What each kind of `base_dtype` needs."""


def check_package(kind: str) -> None:
    """UserError when the library that quantises like this, or reads it, is not installed."""
    if importlib.util.find_spec(PACKAGES[kind]) is None:
        raise UserError(
            f"weights in {kind} need {PACKAGES[kind]}, which is not installed; pip install 'danceopd[quant]'"
        )


def saved_as(config: Mapping[str, Any]) -> str | None:
    """The kind in which a transformer with this configuration was saved quantised; None where it was not.

    UserError for a kind that no merge runs on.
    """
    how = config.get("quantization_config")
    if not how:
        return None
    how = how if isinstance(how, dict) else {}
    method = str(how.get("quant_method") or "quantization_config")
    if method == "bitsandbytes" and (how.get("load_in_4bit") or how.get("_load_in_4bit")):
        return "nf4"
    if method == "torchao":
        name = str(how.get("quant_type"))
        return "int8" if "Int8WeightOnly" in name else "fp8" if "Float8WeightOnly" in name else _refuse(method)
    return _refuse(method)


def _refuse(method: str) -> str:
    raise UserError(
        f"its weights are stored quantised ({shown(method)}), and of such a base only 4 bits of bitsandbytes, and int8 "
        "and float8 weights of torchao are run; use the model in bf16, with base_dtype: nf4 if it has to be small"
    )


def bytes_of(linear: nn.Linear, kind: str) -> float:
    """Bytes of a Linear's weight in this kind, its scales included (`gguf`: its file says that)."""
    out, numbers = linear.out_features, linear.out_features * linear.in_features
    # nf4: a block of 64 has a scale of 8 bits, and 256 of those one of 32; else a row has a scale
    return numbers * (0.5 + 1 / 64 + 4 / (64 * 256)) if kind == "nf4" else numbers + 4 * out


def quantise(transformer: nn.Module, kind: str, dtype: torch.dtype, device: torch.device) -> str:
    """Quantise every Linear of a transformer in place, one at a time on `device`, as diffusers does when it loads it.

    `kind` is "nf4", "int8" or "fp8"; products are in `dtype`. What is said of it, as a sentence.
    """
    with _quiet():
        from diffusers.quantizers import DiffusersAutoQuantizer

        quantizer: Any = DiffusersAutoQuantizer.from_config(quantisation_config(kind, dtype), pre_quantized=False)
        state = dict(transformer.named_parameters())
        before = sum(p.nbytes for name, p in state.items() if ".lora_" not in name)
        kept = list(getattr(transformer, "_keep_in_fp32_modules", None) or [])
        config = transformer.config
        quantizer.preprocess_model(transformer, device_map=None, keep_in_fp32_modules=kept)
        for name, value in state.items():
            if quantizer.check_if_quantized_param(transformer, value, name, state):
                quantizer.create_quantized_param(transformer, value.data, name, device, state, [])
        quantizer.postprocess_model(transformer)
        transformer.hf_quantizer = quantizer
        vars(config).pop("quantization_config", None)  # it is the base's configuration, not that of this run
        del state
    layers = [m for m in transformer.modules() if isinstance(m, nn.Linear)]
    count = 0
    for layer in layers:
        count += kept_as(layer) is not None
        layer.requires_grad_(False)
        if hasattr(layer, "support_avx512bf16_for_cpu"):  # packs weights so that only its own forward reads them
            vars(layer)["support_avx512bf16_for_cpu"] = False
    after = sum(_nbytes(p) for name, p in transformer.named_parameters() if ".lora_" not in name)
    return (
        f"base: {count} of {len(layers)} Linear layers quantised to {kind} by {PACKAGES[kind]} "
        f"({gigabytes(before)} of weights are {gigabytes(after)} now)"
    )


def quantisation_config(kind: str, dtype: torch.dtype) -> Any:
    """The config of diffusers for a kind."""
    from diffusers import BitsAndBytesConfig, TorchAoConfig

    if kind == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        )
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig() if kind == "int8" else Float8WeightOnlyConfig())


def load_gguf(file: str | None, folder: Path, dtype: torch.dtype) -> dict[str, Any]:
    """The `transformer` of a GGUF file on the CPU, its configuration from a pipeline's `folder`; nothing without one.

    UserError if it is none.
    """
    if file is None:
        return {}
    import diffusers

    kind = getattr(diffusers, pipeline_index(folder)["transformer"][1])
    try:
        with quietly():
            found = kind.from_single_file(
                file, config=str(folder), subfolder="transformer", torch_dtype=dtype, local_files_only=True,
                quantization_config=diffusers.GGUFQuantizationConfig(compute_dtype=dtype),
            )  # fmt: skip
            return {"transformer": found}
    except Exception as error:  # gguf, its readers and diffusers' converters each fail in their own way
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{file} does not load as the {kind.__name__} of {folder} ({type(error).__name__}: {reason}); give a GGUF "
            "of this model's transformer"
        ) from error


def quantised_weight(weight: Tensor, kind: str, device: torch.device) -> Tensor:
    """What a Linear's weight (out, in) is after `quantise`, in its own dtype."""
    box, linear = nn.Module(), nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    box.add_module("linear", linear)
    box.config = SimpleNamespace()  # type: ignore[assignment]
    quantise(box, kind, weight.dtype, device)
    return dequantised(box.linear, weight.dtype)


def computes_in(transformer: Any, dtype: torch.dtype) -> Any:
    """The transformer; one that was saved in 4 bits computes in this dtype, whatever its configuration says."""
    for module in transformer.modules():
        if kept_as(module) == "bitsandbytes":
            module.compute_dtype = dtype
    return transformer


def offload(backbone: Any, device: torch.device, pin: bool = True) -> str:
    """Leave the weights of a backbone's blocks in the computer's memory, and put all else and adapters on `device`.

    A block's weights are on the device during its forward. A backward finds them with gradient checkpointing, which
    runs the forward of one block at a time again. diffusers' group offloading moves all parameters of a block, those
    that learn, too, and fetches ahead in the order of a forward, so that a backward would end with every block on the
    card; hence these hooks. `remove_adapters` leaves them in place. With `pin` the weights are locked in the computer's
    memory, from where copies to a GPU are faster. What is said of it, as a sentence.
    """
    transformer, moved, pin = backbone.transformer, 0, pin and device.type == "cuda"
    if pin:  # torch locks powers of two by default, up to twice as much as is asked for
        with suppress(AttributeError, RuntimeError, ValueError):  # a torch that has no such setting
            torch._C._accelerator_setAllocatorSettings("pinned_max_round_threshold_mb:1")
    inside = {id(p) for path in block_paths(transformer) for p in transformer.get_submodule(path).parameters()}
    ours = {id(p) for name in backbone.adapters for p in backbone.parameters(name)}
    for module in transformer.modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in inside or id(parameter) in ours:
                parameter.data = parameter.data.to(device)
            elif pin:
                parameter.data = parameter.data.pin_memory()
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)
    for path in block_paths(transformer):
        block = transformer.get_submodule(path)
        held = {id(p) for p in block.parameters()} - ours
        moved += sum(p.nbytes for p in block.parameters() if id(p) in held)
        brought = _Brought(block, held, device)
        block.register_forward_pre_hook(brought.bring, prepend=True)
        block.register_forward_hook(brought.put_back, always_call=True)
    backbone.device, transformer.offloaded = device, True
    return f"base: {gigabytes(moved)} of its weights stay in the computer's memory, and come to the card block by block"


class _Brought:
    """Puts copies on the device in place of a block's parameters, and the parameters back.

    Copies, since what autograd has saved of a forward must stay as it is after the parameters are back.
    """

    def __init__(self, block: nn.Module, held: set[int], device: torch.device) -> None:
        self.block, self.held, self.device = block, held, device
        self.kept: list[tuple[nn.Module, str, nn.Parameter]] = []

    def bring(self, *_: Any) -> None:
        for module in self.block.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and (id(parameter) in self.held or parameter.device != self.device):
                    self.kept.append((module, name, parameter))
                    there = parameter.detach().to(self.device, non_blocking=True, copy=True)
                    module._parameters[name] = nn.Parameter(there, requires_grad=False)

    def put_back(self, *_: Any) -> None:
        for module, name, parameter in self.kept:
            module._parameters[name] = parameter
        self.kept.clear()


def check_gguf(file: Path) -> None:
    """UserError for a file that is no GGUF."""
    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise UserError(f"{file} is no GGUF; give the transformer's file, such as flux1-dev-Q4_K_S.gguf")


def kept_as(layer: nn.Module) -> str | None:
    """The library that a Linear's weight is quantised by; None where it is not quantised."""
    weight = type(getattr(layer, "weight", None))
    package = weight.__module__.partition(".")[0]
    return package if package in ("bitsandbytes", "torchao") else "gguf" if weight.__name__ == "GGUFParameter" else None


@torch.no_grad()
def dequantised(layer: Any, dtype: torch.dtype) -> Tensor:
    """A quantised Linear's weight (out, in) in this dtype."""
    kind, weight = kept_as(layer), layer.weight
    if kind == "bitsandbytes":
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state).to(dtype)
    if kind == "gguf":
        from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

        return dequantize_gguf_tensor(weight).to(dtype)
    return weight.dequantize().to(dtype)


def _nbytes(parameter: Any) -> int:
    """Bytes of a parameter; of torchao's, those of the tensors in it."""
    if type(parameter).__module__.startswith("torchao"):
        return sum(getattr(parameter, name).nbytes for name in parameter.__tensor_flatten__()[0])
    return int(parameter.nbytes)


@contextmanager
def _quiet() -> Any:
    """A context in which quantisation libraries print and log nothing that is no error."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            yield
    finally:
        logging.disable(level)
