"""Whether the fused kernels are right and faster for a model on this machine: found out once, in its own process.

The process makes the model's own class with at most two blocks of a kind and random weights, and asks it what the
merge will ask, with the stock modules and with the fused ones: forward, and forward with backward. Right: not further
from float64 than the stock modules in the same dtype, but for a half. Faster: by a fiftieth, in the mixture of an
update. What a kernel may do to its process (an illegal access ends it) does nothing to the merge. The verdict is kept
in the cache folder for this device, these versions, these sources and this layout.
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
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from danceopd.attention import build, choose, install, installed
from danceopd.cache import cache_folder
from danceopd.disk import replace_file
from danceopd.pipelines.families import FAMILIES
from danceopd.pipelines.record import Condition

BLOCKS = ("num_layers", "num_single_layers", "n_layers", "n_refiner_layers")
FASTER = 1.02
WALK = 10
"""Forwards without a gradient for each one with: about what a walk takes."""
LIMIT = 300.0
"""Seconds that a trial may take."""
ERROR = 1.5
"""Times the stock modules' distance from float64 that is still right."""



class Verdict(NamedTuple):
    """`fused`: they are to be installed. `why`: a sentence. `speed`: how many times as fast, where it came to that."""

    fused: bool
    why: str
    speed: float | None = None


def install_where_better(
    transformer: nn.Module, condition: Condition, device: torch.device, say: Callable[[str], None]
) -> Verdict | None:
    """Install the fused kernels if a trial on `device` says so; where there is nothing to try, say nothing: None.

    `condition`: a few rows of what the transformer will be asked.
    """
    if device.type != "cuda" or choose.active("cuda") == "torch":
        return None
    verdict = known(transformer, condition)
    if verdict is None:
        say("kernels: trying the fused ones, in a process of their own, once for this model on this machine")
        verdict, keep = tried(transformer, condition)
        if keep:
            with suppress(OSError):  # no place for a cache: tried again by the next run
                place = kept_in(transformer, condition)
                place.parent.mkdir(parents=True, exist_ok=True)
                replace_file(place, json.dumps(verdict).encode())
    if verdict.fused:
        install(transformer)
    say(f"kernels: {verdict.why}")
    return verdict


def known(transformer: nn.Module, condition: Condition) -> Verdict | None:
    """What an earlier trial said."""
    with suppress(OSError, ValueError, TypeError):
        return Verdict(*json.loads(kept_in(transformer, condition).read_text(encoding="utf-8")))
    return None


def kept_in(transformer: nn.Module, condition: Condition) -> Path:
    """The file of a verdict."""
    facts = facts_of(transformer)
    device = torch.cuda.get_device_name(facts["device"]) if facts["device"].startswith("cuda") else "cpu"
    sources = [text for name in build.KERNELS for text in build.sources(name)]
    sources += [path.read_text(encoding="utf-8") for path in sorted(Path(__file__).parent.glob("*.py"))]
    asked = device, torch.__version__, choose.requested(), facts, condition.layout, len(condition)
    said = json.dumps([*map(str, asked), *sources])
    return cache_folder() / "kernels" / f"trial-{hashlib.sha256(said.encode()).hexdigest()[:16]}.json"


def tried(transformer: nn.Module, condition: Condition) -> tuple[Verdict, bool]:
    """The verdict of a process of its own, and whether it would be the same another time."""
    with tempfile.TemporaryDirectory(prefix="danceopd-trial-") as folder:
        place = Path(folder)
        save_file(condition.to("cpu").state(), place / "condition.safetensors")
        (place / "model.json").write_text(json.dumps(facts_of(transformer)))
        command = [sys.executable, "-m", __spec__.name, folder]
        try:
            run = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, env=_environment())
        except subprocess.TimeoutExpired:
            return Verdict(False, f"the stock modules run: the trial of the fused ones took over {LIMIT:.0f} s"), True
        with suppress(OSError, ValueError):
            return Verdict(*json.loads((place / "verdict.json").read_text())), True
        signalled = signal.strsignal(-run.returncode) if run.returncode < 0 else None
        last = signalled or (run.stderr.strip().splitlines() or [f"status {run.returncode}"])[-1][:200]
        memory = "out of memory" in last.lower() or run.returncode == -signal.SIGKILL
        return Verdict(False, f"the stock modules run: the trial of the fused ones ended with {last!r}"), not memory


def _environment() -> dict[str, str]:
    """This process's, without what would make a child one of several."""
    return {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")}


def facts_of(transformer: nn.Module) -> dict[str, Any]:
    """What another process needs to make the model."""
    weight = next(transformer.parameters())
    return {
        "class": _named(transformer), "config": _config(transformer), "processors": _processors(transformer),
        "device": str(weight.device), "dtype": str(weight.dtype).removeprefix("torch."),
    }  # fmt: skip


def _config(transformer: nn.Module) -> dict[str, Any]:
    """The model's configuration with at most two blocks of a kind."""
    config = {k: v for k, v in dict(transformer.config).items() if not k.startswith("_")}  # type: ignore[arg-type]
    return config | {key: min(2, config[key]) for key in BLOCKS if config.get(key)}


def _processors(transformer: nn.Module) -> dict[str, str]:
    """Module path -> its attention processor's class: a pipeline may have set others than the model has alone."""
    modules = ((path, getattr(module, "processor", None)) for path, module in transformer.named_modules())
    return {path: _named(processor) for path, processor in modules if processor is not None}


def _named(thing: object) -> str:
    return f"{type(thing).__module__}:{type(thing).__qualname__}"


def _class(name: str) -> Any:
    module, _, kind = name.partition(":")
    return getattr(import_module(module), kind)


# In the process of its own


def main(folder: Path) -> None:
    """Writes `verdict.json`."""
    diffusers.utils.logging.set_verbosity_error()
    facts = json.loads((folder / "model.json").read_text())
    condition = Condition.from_state(load_file(folder / "condition.safetensors")).to(facts["device"])
    verdict = judge(made(facts), condition, getattr(torch, facts["dtype"]))
    (folder / "verdict.json").write_text(json.dumps(verdict))


@torch.no_grad()
def made(facts: dict[str, Any]) -> nn.Module:
    """The model, with random weights under which every input is heard; what a class leaves to a checkpoint, too."""
    with torch.device(facts["device"]):
        model = _class(facts["class"]).from_config(facts["config"]).eval().requires_grad_(False)
    for path, module in model.named_modules():
        name = facts["processors"].get(path)
        if name is not None and name != _named(module.processor):
            module.set_processor(_class(name)())
    generator = torch.Generator(next(model.parameters()).device).manual_seed(0)
    for name, weight in model.named_parameters():
        spread = weight[0].numel() ** -0.5 if weight.ndim > 1 else 0.1
        weight.normal_(0, spread, generator=generator).add_(float(weight.ndim == 1 and name.endswith("weight")))
    return model


def judge(model: nn.Module, condition: Condition, dtype: torch.dtype) -> Verdict:
    """Ask `model (fp32)`, in `dtype`, with and without the kernels."""
    family, rows = FAMILIES[condition.family], len(condition)
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(1)
    x = torch.randn(rows, *condition.shape, generator=generator, device=device)
    sigma = torch.linspace(0.9, 0.4, rows, device=device)

    def ask(kind: torch.dtype) -> tuple[Tensor, Tensor]:
        """Velocity, and the gradient of half its square to the latents."""
        leaf = x.clone().requires_grad_()
        velocity = family.velocity(model, leaf, sigma, _as(condition, kind))
        (0.5 * velocity.float().square().sum()).backward()
        return velocity.detach().double(), leaf.grad.double()  # type: ignore[union-attr]

    model.double()
    exact = ask(torch.float64)
    model.to(dtype)
    errors = {}
    for fused in (False, True):
        with installed(model) if fused else nullcontext():
            errors[fused] = [float((a - b).norm() / b.norm()) for a, b in zip(ask(dtype), exact, strict=True)]
    floor = torch.finfo(dtype).eps / 8
    for what, stock, error in zip(("velocity", "gradient"), *errors.values(), strict=True):
        if not error <= ERROR * max(stock, floor):
            said = f"their {what} is {error:.2g} from float64, the stock modules' {stock:.2g}"
            return Verdict(False, f"the stock modules run: the fused ones are wrong here ({said})")

    def walk() -> None:
        with torch.no_grad():
            family.velocity(model, x, sigma, _as(condition, dtype))

    seconds = _seconds(model, [walk, lambda: ask(dtype)], device)
    stock, fused = ((WALK * walks + learns) for walks, learns in zip(*seconds, strict=True))
    speed = stock / fused
    if speed < FASTER:
        return Verdict(False, f"the stock modules run: the fused ones are {speed:.2f} times as fast here", speed)
    return Verdict(True, f"the fused ones run, {speed:.2f} times as fast as the stock modules here", speed)


def _as(condition: Condition, dtype: torch.dtype) -> Condition:
    """Its words and numbers in `dtype`; positions and masks as they are."""

    def change(name: str, value: Tensor | None) -> Tensor | None:
        whole = value is None or not value.is_floating_point() or name.endswith("_ids")
        return value if whole else value.to(dtype)  # type: ignore[union-attr]

    kwargs = {name: change(name, value) for name, value in condition.kwargs.items()}
    return Condition(
        condition.family, condition.shape, kwargs, condition.context, condition.shared, condition.fixed,
        condition.ragged,
    )  # fmt: skip


def _seconds(model: nn.Module, asked: list[Callable[[], object]], device: torch.device) -> list[list[float]]:
    """Of each question, the median seconds with the stock modules and with the fused ones, in turn."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    found: list[list[list[float]]] = [[[], []] for _ in asked]
    for turn in range(12):
        for fused in (False, True):
            with installed(model) if fused else nullcontext():
                for times, question in zip(found, asked, strict=True):
                    wait()
                    began = time.perf_counter()
                    question()
                    wait()
                    if turn > 1:  # cores are chosen, kernels compiled
                        times[fused].append(time.perf_counter() - began)
    return [[statistics.median(kind) for kind in times] for times in found]


if __name__ == "__main__":
    logging.basicConfig(level=logging.ERROR)
    main(Path(sys.argv[1]))
