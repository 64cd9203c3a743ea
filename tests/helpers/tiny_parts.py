"""Parts for tiny, randomly initialised stock pipelines: the class `Tiny`, seeds, and tokenizers without a download.

A `Tiny` says how to build a family's stock pipelines and how to call them; `test_families.py` and
`test_family_merges.py` need nothing else. Each `tiny_<family>.py` exports one as `TINY`; `tinies.py` lists them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer, Qwen2TokenizerFast, T5Tokenizer

ALPHABET = sorted(ByteLevel.alphabet())  # one printable character a byte: any text, no merges


@dataclass(frozen=True)
class Tiny:
    """A family's tiny pipelines of the real classes, and how to call them.

    `build(folder=None, seed=0)` is the stock generation pipeline in eval mode, fp32, on the CPU, every weight from
    `seed`, the global random state untouched; also saved to `folder` when one is given. `editing(pipe)` is the
    stock editing pipeline over the SAME transformer (None: the family has none). `call` is for
    `GenerationPipeline` (height, width, steps, …). `components(folder)` saves what the editing pipeline needs and
    `build` lacks, as a pipeline folder (None: it lacks nothing). `silent` names modules that cannot
    have a gradient, since the model drops their output; `source_only` those that have none without a source image.
    """

    family: str
    build: Callable[..., Any]
    editing: Callable[[Any], Any] | None
    call: dict[str, Any]
    tolerance: float = 1e-5
    components: Callable[[Path], Any] | None = None
    silent: tuple[str, ...] = ()
    source_only: tuple[str, ...] = ()

    @property
    def tasks(self) -> tuple[str, ...]:
        return ("generation",) if self.editing is None else ("generation", "editing")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """A context in which global random numbers come from `seed`; the global state is restored after it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@torch.no_grad()
def scale_matrices(module: torch.nn.Module, factor: float) -> None:
    """Scale every matrix: with default initialisations some inputs hardly change the output, and a test misses it."""
    for weight in module.parameters():
        if weight.ndim >= 2:
            weight.mul_(factor)


def finish(pipe: Any, folder: str | Path | None) -> Any:
    """Eval mode, no progress bar, and saved when a folder is given."""
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    pipe.set_progress_bar_config(disable=True)
    if folder is not None:
        pipe.save_pretrained(folder)
    return pipe


def recorded_steps(pipe: Any, **call: Any) -> tuple[Any, list[tuple[torch.Tensor, ...]]]:
    """The stock pipeline's pictures, and (velocity, x, next x) of every `scheduler.step`, fp32."""
    steps, scheduler = [], pipe.scheduler

    def step(velocity: torch.Tensor, t: Any, x: torch.Tensor, **kwargs: Any) -> Any:
        after = type(scheduler).step(scheduler, velocity, t, x, **kwargs)
        steps.append(tuple(part.clone().float() for part in (velocity, x, after[0])))
        return after

    scheduler.step = step
    try:
        output = pipe(**call)
        return (output.images if hasattr(output, "images") else [video[0] for video in output.frames]), steps
    finally:
        del scheduler.step


def qwen_tokenizer(specials: Sequence[str] = (), template: str | None = None) -> Qwen2TokenizerFast:
    """One token a byte, pad 0; `specials` are single tokens; `template` is its chat template."""
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *specials]
    vocabulary = {token: i for i, token in enumerate([*names, *ALPHABET])}
    tokenizer = Qwen2TokenizerFast(
        vocab=vocabulary, merges=[], pad_token=names[0], unk_token=names[0], extra_special_tokens=names[1:]
    )
    tokenizer.chat_template = template
    return tokenizer


def clip_tokenizer() -> CLIPTokenizer:
    """One token a byte between <|startoftext|> and <|endoftext|>, at most 77."""
    tokens = [*ALPHABET, *(c + "</w>" for c in ALPHABET), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[], model_max_length=77)


def t5_tokenizer() -> T5Tokenizer:
    """One token a character, then </s>; pad 0."""
    tokens = ["<pad>", "</s>", "<unk>", "▁", *(chr(c) for c in range(33, 127))]
    return T5Tokenizer(vocab=[(token, 0.0 if i < 3 else -1.0) for i, token in enumerate(tokens)], extra_ids=0)


def load_lora(pipe: Any, folder: str | Path, name: str = "student") -> None:
    """The LoRA of a folder in a stock pipeline, by the pipeline's loader, else by its transformer's."""
    load = getattr(pipe, "load_lora_weights", None) or pipe.transformer.load_lora_adapter
    load(folder, weight_name="pytorch_lora_weights.safetensors", adapter_name=name)


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Assert that no number differs by more than `tolerance`."""
    assert a.shape == b.shape and (a - b).abs().max() <= tolerance, (a - b).abs().max()


def calls_of(transformer: Any, run: Callable[[], Any]) -> list[dict[str, Any]]:
    """The kwargs of every call of the transformer while `run()` runs."""
    calls: list[dict[str, Any]] = []
    hook = transformer.register_forward_pre_hook(lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True)
    run()
    hook.remove()
    return calls
