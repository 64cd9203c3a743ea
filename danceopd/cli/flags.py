"""What flags hold: words and numbers with commas between, pairs of a name and a value; what every command takes, -q and
-v; and the options that several commands share.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from danceopd.errors import UserError

LIBRARIES = ("torch", "torchao", "diffusers", "transformers", "peft", "accelerate", "huggingface_hub", "tensorboard")
"""Their warnings are for programmers, or about parts that are not installed."""
OWN_LEVELS = ("torch.utils._pytree",)
"""Of torch, which sets the level of its own logger as it is imported."""
_verbose = False


Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="No progress; results, warnings and errors only.")]
Verbose = Annotated[
    bool,
    typer.Option("-v", "--verbose", help="Also say what is assumed, and what other libraries warn of."),
]


class App(typer.Typer):
    """Commands that all take -q and -v, which are in effect before they run."""

    def command(self, *names: Any, **how: Any) -> Callable[[Any], Any]:
        register = super().command(*names, **how)

        def add(function: Callable[..., Any]) -> Callable[..., Any]:
            def run(*values: Any, quiet: bool, verbose: bool, **named: Any) -> Any:
                hush(quiet)
                raise_voice(verbose)
                return function(*values, **named)

            own = {"quiet": Quiet, "verbose": Verbose}
            parameters = [*signature(function).parameters.values()]
            parameters += [Parameter(name, Parameter.KEYWORD_ONLY, default=False) for name in own]
            run.__name__, run.__doc__ = function.__name__, function.__doc__
            run.__annotations__ = get_type_hints(function, include_extras=True) | own
            run.__signature__ = Signature(  # type: ignore[attr-defined]
                [one.replace(annotation=run.__annotations__[one.name]) for one in parameters]
            )
            register(run)
            return function

        return add


def hush(quiet: bool) -> None:
    """-q: no progress from here on."""
    if quiet:
        from danceopd.common import console

        console.hide_progress()


def raise_voice(verbose: bool, last: bool = True) -> None:
    """-v: what danceopd assumes is said, and other libraries say what they like. Without it, by the `last` who asks,
    they say errors only: a check of ours says what a user can mend."""
    global _verbose
    _verbose = _verbose or verbose
    if _verbose:
        own = logging.getLogger("danceopd")
        own.setLevel(logging.INFO)
        for handler in own.handlers:
            handler.setLevel(logging.INFO)
    elif last:
        for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):  # both set their own levels when imported
            os.environ.setdefault(name, "error")
        for name in (*LIBRARIES, *OWN_LEVELS):
            logging.getLogger(name).setLevel(logging.ERROR)
        if not sys.warnoptions:
            warnings.filterwarnings("ignore", module=rf"({'|'.join(LIBRARIES)})\b")


def settings(texts: Iterable[str]) -> dict[str, Any]:
    """`--set key=value` as a mapping; values are read as in a recipe."""
    from yaml import YAMLError

    from danceopd.common.parse import parse_yaml

    found = {}
    for key, text in pairs(texts, "--set", "optimizer.lr=1e-4").items():
        try:
            found[key] = parse_yaml(text)
        except YAMLError:
            raise UserError(f"--set {key} has {text!r}, which is not valid YAML; put it in quotes") from None
    return found


def print_json(facts: Any) -> None:
    """Print facts for a script."""
    import json

    from danceopd.cli.boundary import echo

    echo(json.dumps(facts, indent=1))


def one_of(*choices: str) -> Callable[[], list[str]]:
    """What a shell completes a value with."""
    return lambda: list(choices)


def words(text: str) -> list[str]:
    """`a, b` as its parts."""
    return [word.strip() for word in text.split(",") if word.strip()]


def number(text: str, flag: str) -> float:
    """A number, or a sentence that names the flag."""
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{flag} has {text!r}, which is no number; write numbers with commas between") from None


def pairs(texts: Iterable[str], flag: str, example: str) -> dict[str, str]:
    """`name=value` texts as a mapping; a sentence for one without `=` or a name, and for a name that comes twice."""
    found: dict[str, str] = {}
    for text in texts:
        name, sign, value = (part.strip() for part in text.partition("="))
        if not (sign and name and value):
            raise UserError(f"{flag} has {text!r}; write a name and what it stands for, as {example}")
        if name in found:
            raise UserError(f"{flag} names {name!r} twice; name each once")
        found[name] = value
    return found


# Options that several commands take

Seed = Annotated[int, typer.Option(min=0, help="Same seed, same machine: the same bytes.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder for what is made.")]
DEVICES, DTYPES = one_of("auto", "cpu", "cuda"), one_of("fp32", "bf16", "fp16")
Device = Annotated[
    str | None,
    typer.Option(help="auto, cpu or cuda; default: auto, a GPU where there is one.", autocompletion=DEVICES),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any key of the recipe, such as optimizer.lr=1e-4; repeatable."),
]
RecipeSeed = Annotated[
    int | None, typer.Option(help="Same seed, same machine: the same bytes; default: the recipe's, or 0.")
]
TimeLimit = Annotated[float | None, typer.Option(help="Minutes after which to stop, with a student.")]
Base = Annotated[str | None, typer.Option(help="Base model: a folder, or owner/name on the hub; default: the LoRA's.")]
Drop = Annotated[list[str] | None, typer.Option(help="A part of the file not to read: text-encoder.")]
TEACHER = '{} teacher: a LoRA, a whole model, a shipped name, or "base".'
MergeBase = Annotated[
    str | None, typer.Option(help="Base model: a folder, or owner/name on the hub; default: the shipped one.")
]
RunFolder = Annotated[Path | None, typer.Option("--output", "-o", help="Run folder; default: student.")]
Height = Annotated[int | None, typer.Option(help="Pixels; default: the model's, and of an edit the source's shape.")]
Width = Annotated[int | None, typer.Option(help="Pixels, with --height.")]
MergeSteps = Annotated[int | None, typer.Option(help="Optimizer steps; default: 2000, of the shipped recipe 180.")]
Trackers = Annotated[
    str | None,
    typer.Option(help="tensorboard, wandb, mlflow with commas, or none; default: the recipe's, or tensorboard."),
]
