"""`danceopd kernels`: which attention kernels and cores would run on this machine, and why. Launches nothing."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version


def describe() -> dict[str, str]:
    """What was asked for, what would run, and the reason for each backend that would not.

    UserError when what was asked for does not exist or cannot run here.
    """
    import torch

    from ..attention import build, choose, core, cores
    from ..cache import cache_folder

    cuda = torch.cuda.is_available() and torch.version.cuda is not None
    device = "cuda" if cuda else "cpu"
    choose.demand()
    word = choose.requested()
    facts = {"asked for": f"{word} ({choose.VARIABLE})" if choose.VARIABLE in os.environ else word}
    running = choose.active(device)
    facts["runs"] = {
        "cuda": "CUDA kernels, compiled on first use",
        "triton": "Triton kernels, compiled on first use",
        "torch": "plain torch",
    }[running]
    if cuda:
        major, minor = torch.cuda.get_device_capability()
        facts["device"] = f"{torch.cuda.get_device_name()} (sm_{major}{minor})"
    else:
        facts["device"] = "cpu"
    for name in ("cuda", "triton"):
        reason = choose.missing(name)
        facts[name] = f"no: {reason}" if reason else "yes" + ("" if device == "cuda" else ", in Triton's interpreter")
    facts["compiler"] = build.compiler() or "none"
    facts["torch"] = torch.__version__
    try:
        facts["triton version"] = version("triton")
    except PackageNotFoundError:
        facts["triton version"] = "not installed"
    facts["kept in"] = str(cache_folder() / "kernels")
    facts["switched on by"] = (
        "a merge, where a trial finds them right and faster (kernels: true in a recipe: in any case), or "
        "danceopd.attention.install(pipe.transformer)"
    )
    facts["head dims"] = ", ".join(map(str, choose.HEAD_DIMS))
    facts["attention core"] = "measured once a shape, on first use" if cuda else "SDPA: on a CPU nothing is measured"
    facts["FlashAttention-4"] = cores.flash4_version() or "not installed (pip install 'danceopd[flash]')"
    for key, choice in sorted(core.known().items()) if cuda else ():
        facts[f"core for {key}"] = f"{choice.core} ({choice.why})"
    return facts


def show(facts: dict[str, str]) -> None:
    """Prints what `describe` found as a table."""
    from rich.table import Table

    from ..console import wide

    table = Table(show_header=False, box=None)
    for key, value in facts.items():
        table.add_row(key, value)
    wide().print(table, highlight=False)
