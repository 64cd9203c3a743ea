"""Find out whether the fused kernels are right and faster for a model on this machine, and install them if so.

`install_if_faster` runs a trial, once: a process of its own builds the model's class with at most two blocks of a kind
and random weights, and computes what the merge will compute (forward; forward and backward), with the stock modules
and with the fused ones. Right: velocity and gradient at most `MAX_ERROR_RATIO` times as far from float64 as the stock
modules' in the same dtype. Faster: at least `MIN_SPEEDUP` in the mixture of an update. Then it finds out whether a
forward replayed as a CUDA graph is right and faster, too (`rollout.cuda_graphs: auto`). A kernel that crashes ends only
that process. The verdict is kept in the cache folder under a hash of the device's name, the sources of this
package, the versions of torch and diffusers, `DANCEOPD_KERNELS`, the model's configuration and the condition's shapes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from danceopd.common.cache import cache_folder
from danceopd.common.files import write_json
from danceopd.common.tensors import compute_dtype
from danceopd.errors import UserError
from danceopd.kernels import backend, install, installed
from danceopd.kernels.capture import CudaGraphs, GraphCapture, NotCapturable, capture_forward, first_line
from danceopd.pipelines.condition import Condition
from danceopd.pipelines.registry import FAMILIES

ROOT = Path(__file__).parent
"""The package whose sources belong to a verdict: `danceopd/kernels`, with its sub-folders."""
BLOCK_COUNTS = ("num_layers", "num_single_layers", "n_layers", "n_refiner_layers")
"""Keys of a transformer's configuration that count its blocks."""
MIN_SPEEDUP = 1.02
ROLLOUT_FORWARDS = 10
"""Forwards without a gradient for each forward with one: about as many as a rollout has."""
TIMEOUT = 300.0
"""Seconds that a trial may take."""
MAX_ERROR_RATIO = 1.5
TURNS = 12
"""How often each way is timed; the first two times do not count."""


class Verdict(NamedTuple):
    """`fused`: whether to install the fused kernels. `reason`: a sentence. `speedup`: if it was measured.

    `graphs`, `graphs_reason`: the same of forwards replayed as CUDA graphs, with the modules that were chosen.
    """

    fused: bool
    reason: str
    speedup: float | None = None
    graphs: bool = False
    graphs_reason: str = "eager rollouts: CUDA graphs were not tested"


def install_if_faster(
    transformer: nn.Module, condition: Condition, device: torch.device, report: Callable[[str], None],
    graphs: bool = False,
) -> Verdict | None:  # fmt: skip
    """Install the fused kernels if a trial on `device` finds them right and faster; returns the verdict.

    `condition`: a few rows like those that the transformer will get. `report` gets each line for the user; with
    `graphs` one about CUDA graphs, too. None, and no line, where there is nothing to try: on a CPU, or if the only
    kernel backend is torch.
    """
    if device.type != "cuda" or backend.active("cuda") == "torch":
        return None
    verdict = cached_verdict(transformer, condition)
    if verdict is None:
        report("kernels: testing the fused kernels in a separate process, once for this model on this machine")
        verdict, keep = run_trial(transformer, condition)
        if keep:
            with suppress(OSError, UserError):  # no place for a cache: tried again by the next run
                file = verdict_file(transformer, condition)
                file.parent.mkdir(parents=True, exist_ok=True)
                write_json(file, verdict)
    if verdict.fused:
        install(transformer)
    report(f"kernels: {verdict.reason}")
    if graphs:
        report(f"rollout.cuda_graphs: {verdict.graphs_reason}")
    return verdict


def cached_verdict(transformer: nn.Module, condition: Condition) -> Verdict | None:
    """The verdict of an earlier trial; None if there is none, or its file is damaged."""
    with suppress(OSError, ValueError, TypeError):
        return Verdict(*json.loads(verdict_file(transformer, condition).read_text(encoding="utf-8")))
    return None


def verdict_file(transformer: nn.Module, condition: Condition) -> Path:
    """Where the verdict for a model and a layout of conditions is kept."""
    spec = model_spec(transformer)
    device = torch.cuda.get_device_name(spec["device"]) if spec["device"].startswith("cuda") else "cpu"
    spec |= {"device": ""}  # one verdict for all devices of a kind, whatever their index
    versions = torch.__version__, diffusers.__version__
    facts = device, *versions, backend.requested(), spec, condition.layout, len(condition)
    sources = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in source_files()}
    content = json.dumps([*map(str, facts), sources])
    return cache_folder() / "kernels" / f"trial-{hashlib.sha256(content.encode()).hexdigest()[:16]}.json"


def source_files() -> list[Path]:
    """Every Python, CUDA and header file below `ROOT`: after a change in any of them the trial is run again."""
    return sorted(path for path in ROOT.rglob("*") if path.suffix in (".py", ".cu", ".cuh"))


def run_trial(transformer: nn.Module, condition: Condition) -> tuple[Verdict, bool]:
    """Run the trial in a process of its own: the verdict, and whether to keep it (not if memory ran out)."""
    with tempfile.TemporaryDirectory(prefix="danceopd-trial-") as folder:
        place = Path(folder)
        save_file(condition.to("cpu").state(), place / "condition.safetensors")
        (place / "model.json").write_text(json.dumps(model_spec(transformer)))
        command = [sys.executable, "-m", __spec__.name, folder]
        run = None
        with suppress(subprocess.TimeoutExpired):
            run = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, env=_environment())
        with suppress(OSError, ValueError):  # written before CUDA graphs are tested, which may end the process
            found = Verdict(*json.loads((place / "verdict.json").read_text()))
            return found, run is not None and run.returncode != -signal.SIGKILL and "memory" not in found.graphs_reason
        if run is None:
            return _rejected(f"the test of the fused kernels took over {TIMEOUT:.0f} s"), True
        signalled = signal.strsignal(-run.returncode) if run.returncode < 0 else None
        last = signalled or (run.stderr.strip().splitlines() or [f"status {run.returncode}"])[-1][:200]
        memory = "out of memory" in last.lower() or run.returncode == -signal.SIGKILL
        return _rejected(f"the test of the fused kernels ended with {last!r}"), not memory


def _rejected(reason: str, speedup: float | None = None) -> Verdict:
    return Verdict(False, f"the stock modules stay: {reason}", speedup)


def _environment() -> dict[str, str]:
    """This process's environment without the variables of a distributed launch."""
    return {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")}


def model_spec(transformer: nn.Module) -> dict[str, Any]:
    """What another process needs to build the model, as JSON: classes, configuration, device, dtype."""
    weight = next(transformer.parameters())
    dtype = next((compute_dtype(m) for m in transformer.modules() if isinstance(m, nn.Linear)), weight.dtype)
    return {
        "class": _class_name(transformer), "config": _config(transformer), "processors": _processors(transformer),
        "device": str(weight.device), "dtype": str(dtype).removeprefix("torch."),
    }  # fmt: skip


def _config(transformer: nn.Module) -> dict[str, Any]:
    """The model's configuration with at most two blocks of a kind."""
    given: Any = transformer.config
    config = {k: v for k, v in dict(given).items() if not k.startswith("_") and k != "quantization_config"}
    return config | {key: min(2, config[key]) for key in BLOCK_COUNTS if config.get(key)}


def _processors(transformer: nn.Module) -> dict[str, str]:
    """Module path -> its attention processor's class: a pipeline may have set others than the model has alone."""
    modules = ((path, getattr(module, "processor", None)) for path, module in transformer.named_modules())
    return {path: _class_name(processor) for path, processor in modules if processor is not None}


def _class_name(thing: object) -> str:
    return f"{type(thing).__module__}:{type(thing).__qualname__}"


def _class(name: str) -> Any:
    module, _, kind = name.partition(":")
    return getattr(import_module(module), kind)


# In the trial's own process


def main(folder: Path) -> None:
    """Read the model and the condition from `folder`, write `verdict.json` there."""
    diffusers.utils.logging.set_verbosity_error()
    spec = json.loads((folder / "model.json").read_text())
    condition = Condition.from_state(load_file(folder / "condition.safetensors")).to(spec["device"])
    device = torch.device(spec["device"])

    def write(verdict: Verdict) -> None:
        (folder / "verdict.json").write_text(json.dumps(verdict))

    graphs = CudaGraphs(device) if device.type == "cuda" else None
    write(evaluate(build_model(spec), condition, getattr(torch, spec["dtype"]), graphs, write))


@torch.no_grad()
def build_model(spec: dict[str, Any]) -> nn.Module:
    """The model with random weights everywhere, also where its class starts at zero, so that every input matters."""
    with torch.device(spec["device"]):
        model = _class(spec["class"]).from_config(spec["config"]).eval().requires_grad_(False)
    for path, module in model.named_modules():
        name = spec["processors"].get(path)
        if name is not None and name != _class_name(module.processor):
            module.set_processor(_class(name)())
    generator = torch.Generator(next(model.parameters()).device).manual_seed(0)
    for name, weight in model.named_parameters():
        spread = weight[0].numel() ** -0.5 if weight.ndim > 1 else 0.1
        weight.normal_(0, spread, generator=generator).add_(float(weight.ndim == 1 and name.endswith("weight")))
    return model


def evaluate(
    model: nn.Module, condition: Condition, dtype: torch.dtype, graphs: GraphCapture | None = None,
    report: Callable[[Verdict], None] = lambda verdict: None,
) -> Verdict:  # fmt: skip
    """Compare stock and fused modules of `model` (in fp32), run in `dtype`: errors against float64, then speed.

    With `graphs` a captured forward is compared with an eager one, too; `report` gets the verdict before that, since a
    capture that fails may end the process.
    """
    trial = Trial(model, condition, dtype)
    verdict = trial.kernels()
    if graphs is None:
        return verdict
    report(verdict._replace(graphs_reason="eager rollouts: the test of CUDA graphs ended its process"))
    with installed(model) if verdict.fused else nullcontext():
        worked, reason = trial.graphs(graphs)
    return verdict._replace(graphs=worked, graphs_reason=reason)


class Trial:
    """`model` in `dtype` on random latents under `condition`, with what float64 gives for its velocity and gradient."""

    def __init__(self, model: nn.Module, condition: Condition, dtype: torch.dtype) -> None:
        self.model, self.condition, self.dtype = model, condition, dtype
        self.family, rows = FAMILIES[condition.family], len(condition)
        self.device = next(model.parameters()).device
        generator = torch.Generator(self.device).manual_seed(1)
        self.x = torch.randn(rows, *condition.shape, generator=generator, device=self.device)
        self.sigma = torch.linspace(0.9, 0.4, rows, device=self.device)
        model.to(dtype).double()  # the weights that both will have
        with ChunkedAttention():
            self.exact = self.forward_backward(torch.float64)
        model.to(dtype)

    def forward_backward(self, kind: torch.dtype) -> tuple[Tensor, Tensor]:
        """The velocity, and the gradient of half its squared norm to the latents."""
        leaf = self.x.clone().requires_grad_()
        velocity = self.family.velocity(self.model, leaf, self.sigma, _cast(self.condition, kind))
        (0.5 * velocity.float().square().sum()).backward()
        return velocity.detach().double(), leaf.grad.double()  # type: ignore[union-attr]

    @torch.no_grad()
    def velocity(self, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """A forward as a rollout makes it."""
        return self.family.velocity(self.model, x, sigma, condition)

    def kernels(self) -> Verdict:
        """Whether the fused modules are right and faster."""
        errors = {}
        for fused in (False, True):
            with installed(self.model) if fused else nullcontext():
                found = self.forward_backward(self.dtype)
            errors[fused] = [_error(a, b) for a, b in zip(found, self.exact, strict=True)]
        for what, stock, error in zip(("velocity", "gradient"), *errors.values(), strict=True):
            if not error <= self._rounding(stock):
                detail = f"their {what} is {error:.2g} from float64, the stock modules' {stock:.2g}"
                return _rejected(f"the fused kernels are wrong here ({detail})")
        cast = _cast(self.condition, self.dtype)
        calls = [lambda: self.velocity(self.x, self.sigma, cast), lambda: self.forward_backward(self.dtype)]
        seconds = _seconds(self.model, calls, self.device)
        stock, fused = (ROLLOUT_FORWARDS * one + with_gradient for one, with_gradient in zip(*seconds, strict=True))
        speedup = stock / fused
        if speedup < MIN_SPEEDUP:
            return _rejected(f"the fused kernels are {speedup:.2f} times as fast here", speedup)
        how = f"the fused kernels are installed: {speedup:.2f} times as fast as the stock modules"
        return Verdict(True, how, speedup)

    def graphs(self, graphs: GraphCapture) -> tuple[bool, str]:
        """Whether a forward replayed as a CUDA graph is right and faster, and a sentence."""
        if self.family.sync_free is None:
            return False, f"eager rollouts: a forward of {self.family.name} waits for the device"
        condition = self.family.sync_free(_cast(self.condition, self.dtype))
        try:
            eager, call = capture_forward(self.velocity, graphs, self.x, self.sigma, condition)
        except (NotCapturable, RuntimeError) as error:
            return False, f"eager rollouts: a forward cannot be captured, because {first_line(error)}"

        def replay() -> Tensor:
            call.inputs.fill(self.x, self.sigma, condition)
            return call.replay()

        stock, captured = (_error(found.double(), self.exact[0]) for found in (eager, replay()))
        if not captured <= self._rounding(stock):
            detail = f"its velocity is {captured:.2g} from float64, an eager one's {stock:.2g}"
            return False, f"eager rollouts: a CUDA graph is wrong here ({detail})"
        times = _in_turn([lambda: self.velocity(self.x, self.sigma, condition), replay], self.device)
        speedup = times[0] / times[1]
        if speedup < MIN_SPEEDUP:
            return False, f"eager rollouts: CUDA graphs are {speedup:.2f} times as fast here"
        return True, f"rollouts are replayed as CUDA graphs: {speedup:.2f} times as fast as eager ones"

    def _rounding(self, stock: float) -> float:
        """The largest error that counts as rounding, where that of the stock modules is `stock`."""
        return MAX_ERROR_RATIO * max(stock, torch.finfo(self.dtype).eps / 8)


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


class ChunkedAttention(TorchFunctionMode):
    """Inside, SDPA is computed a head and `ROWS` queries at a time, and again in the backward.

    torch's fused attention takes no float64; its plain one would keep all scores, 8 bytes for each pair of tokens of
    each head and layer: more than a card of 80 GB has for a picture of 1024 pixels and its source.
    """

    ROWS = 1024

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is not scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        return self.attention(*args, **(kwargs or {}))

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
        is_causal: bool = False, **how: Any,
    ) -> Tensor:  # fmt: skip
        """Of `(B, H, S, D)`; `attn_mask` broadcasts to `(B, H, S, T)`."""
        q, k, v = query, key, value
        assert not (dropout_p or is_causal) and q.shape[1] == k.shape[1]
        mask = None if attn_mask is None else attn_mask.expand(*q.shape[:3], k.shape[2])
        heads = []
        for row, head in product(range(len(q)), range(q.shape[1])):
            parts = []
            for start in range(0, q.shape[2], self.ROWS):
                at = (slice(row, row + 1), slice(head, head + 1))
                queries = (*at, slice(start, start + self.ROWS))
                call = partial(scaled_dot_product_attention, attn_mask=None if mask is None else mask[queries], **how)
                parts.append(checkpoint(call, q[queries], k[at], v[at], use_reentrant=False))
            heads.append(torch.cat(parts, dim=2))
        return torch.cat(heads).squeeze(1).unflatten(0, q.shape[:2])


def _cast(condition: Condition, dtype: torch.dtype) -> Condition:
    """The condition with embeddings in `dtype`; position ids and masks as they are."""

    def change(name: str, value: Tensor | None) -> Tensor | None:
        kept = value is None or not value.is_floating_point() or name.endswith("_ids")
        return value if kept else value.to(dtype)  # type: ignore[union-attr]

    return replace(condition, kwargs={name: change(name, value) for name, value in condition.kwargs.items()})


def _seconds(model: nn.Module, calls: list[Callable[[], object]], device: torch.device) -> list[list[float]]:
    """For each call, the median seconds with the stock modules and with the fused ones, which take turns."""
    found: list[list[list[float]]] = [[[], []] for _ in calls]
    for turn in range(TURNS):
        for fused in (False, True):
            with installed(model) if fused else nullcontext():
                for times, call in zip(found, calls, strict=True):
                    took = _timed(call, device)
                    if turn > 1:  # after two turns kernels are compiled and attention backends chosen
                        times[fused].append(took)
    return [[statistics.median(kind) for kind in times] for times in found]


def _in_turn(calls: list[Callable[[], object]], device: torch.device) -> list[float]:
    """The median seconds of each call; they take turns."""
    turns = [[_timed(call, device) for call in calls] for _ in range(TURNS)]
    return [statistics.median(times) for times in zip(*turns[2:], strict=True)]


def _timed(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began


if __name__ == "__main__":
    logging.basicConfig(level=logging.ERROR)
    main(Path(sys.argv[1]))
