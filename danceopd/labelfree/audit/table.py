"""The tables of an audit, for the terminal and for Markdown: `audit.json` goes in, titles and rows of text come out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

HEADS = ("signal", "", "AUC", "best of {n}", "gain", "fwd", "s")
WITHOUT = (
    "Nothing here knows what is right. Agreement shows that signals from different sources see one thing in the "
    "samples, not that it is quality: they may share a taste, such as for smooth pictures."
)


def tables(facts: Mapping[str, Any]) -> Iterator[tuple[str, str, list[str], list[list[str]]]]:
    """(title, sentence below it, heads, rows) of each teacher's questions."""
    count = facts["samples"]
    for name, of in facts["teachers"].items():
        title = f"{name} ({of['capability']}): {of['questions']} questions, {count} samples each by {facts['by']}"
        rows = []
        for signal, one in of["signals"].items():
            cells = [signal, one["verdict"].removeprefix("is "), _figure(one["auc"])]
            cells += [_figure(one.get("best")), _figure(one.get("gain"), sign=True)] if of["truth"] else []
            rows.append([*cells, str(one["forwards"]), f"{one['seconds']:.2g}"])
        heads = [head.format(n=count) for head in HEADS]
        if of["truth"]:
            below = (
                f"judged by {of['truth']}: mean {_figure(of['mean'])}, oracle {_figure(of['oracle'])}, headroom "
                f"{_figure(of['headroom'])}; samples differ in {of['mixed']} questions, over which AUC is taken"
            )
        else:
            heads, below = [*heads[:2], "agreement", *heads[5:]], WITHOUT
        yield title, below, heads, rows


def _figure(figure: Mapping[str, Any] | None, sign: bool = False) -> str:
    """0.74 [0.68, 0.80]"""
    if not figure:
        return "-"
    mean, low, high = (f"{round(figure[key], 2) + 0.0:{'+' if sign else ''}.2f}" for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def markdown(facts: Mapping[str, Any]) -> str:
    """The text of audit.md."""
    parts = []
    for title, below, heads, rows in tables(facts):
        lines = [f"## {title}", "", f"| {' | '.join(heads)} |", "|---|---" + "|---:" * (len(heads) - 2) + "|"]
        lines += [*(f"| {' | '.join(row)} |" for row in rows), "", f"{below[:1].upper()}{below[1:].rstrip('.')}."]
        parts.append("\n".join(lines))
    about = f"{facts['command']}; {facts['machine']}; {facts['seconds']:.0f} seconds. Brackets are 95 % intervals over "
    about += "questions; fwd and s are forwards and seconds for one sample."
    return "\n\n".join(["# Which signals rank", *parts, about]) + "\n"
