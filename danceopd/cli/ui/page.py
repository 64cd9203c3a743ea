"""The page of `danceopd ui`, in Gradio: the run's pictures, curves and card, and a form on which its student is tried.

It works without a network: no font, script or count of visits comes from elsewhere. Errors are the sentences of the
command line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from danceopd.cli.boundary import sentence
from danceopd.cli.ui.studio import BASE, MOST, STUDENT, Studio
from danceopd.data.images import open_image
from danceopd.errors import UserError

FONTS = ["system-ui", "sans-serif"]
CSS = """.gradio-container {max-width: 1100px !important; margin: auto; overflow-x: hidden}
footer {display: none !important}"""
GRIDS = 4
"""Sample grids over training that are shown: the first, the last and some between."""


def page(runs: Sequence[str | Path], base: str | None = None, device: str | None = None) -> gr.Blocks:
    """The page of some finished runs, or LoRAs; UserError where one of them is none."""
    studios = [Studio(run, base, device) for run in runs]
    with gr.Blocks(title="danceopd", analytics_enabled=False) as made:
        gr.Markdown("# " + (studios[0].student.resolve().name if len(studios) == 1 else "Students"))
        if len(studios) == 1:
            _run(studios[0])
        else:
            for studio in studios:
                with gr.Tab(studio.student.resolve().name):
                    _run(studio)
    return made


def launch(made: gr.Blocks, port: int | None, host: str, folders: Sequence[Path]) -> str:
    """Serve the page until it is closed; its address. `folders` are the only ones whose files it may show."""
    theme = gr.themes.Default(font=FONTS, font_mono=["ui-monospace", "monospace"])
    try:
        _, address, _ = made.queue(default_concurrency_limit=1).launch(
            server_name=host, server_port=port, prevent_thread_lock=True, quiet=True, theme=theme, css=CSS,
            allowed_paths=[str(folder.resolve()) for folder in folders], footer_links=[], share=False,
        )  # fmt: skip
    except OSError:
        where = f"port {port}" if port else "every port that was tried"
        raise UserError(f"{where} of {host} is taken, or not allowed; give another with --port") from None
    return str(address)


def _run(studio: Studio) -> None:
    with gr.Tab("Try it"):
        _form(studio)
    folder = studio.student
    grids = _grids(folder)
    pictures = [path for path in (folder / "validation.png", folder / "bench" / "contact.png") if path.is_file()]
    if grids or pictures:
        with gr.Tab("Training"):
            shown = [(path, path.stem) for path in pictures] + [(path, f"samples, step {n}") for n, path in grids[::-1]]
            for path, label in shown:
                gr.Image(str(path), label=label, show_label=True, interactive=False)
    card = folder / "README.md"
    if card.is_file():
        with gr.Tab("Card"):
            gr.Markdown(_card(card.read_text(encoding="utf-8")))


def _form(studio: Studio) -> None:
    prompt = gr.Textbox(label="Prompt, or what to change in the source", placeholder="a red fox in the snow", lines=2)
    sources = gr.File(label="Source pictures, for an edit", file_count="multiple", file_types=["image"], height=110)
    default = [STUDENT] if studio.fused else [name for name in (STUDENT, *studio.teachers, BASE)]
    models = gr.CheckboxGroup(studio.models, value=default, label="Who draws")
    with gr.Row():
        seed = gr.Number(0, label="Seed", precision=0, minimum=0)
        steps = gr.Number(0, label="Steps (0: as the run has them)", precision=0, minimum=0)
    movable = [] if studio.fused else [STUDENT, *studio.teachers]
    sliders = [
        gr.Slider(-1.0, MOST / 2, value=1.0, step=0.05, label=f"Strength of {name}", info="1: as it was trained")
        for name in movable
    ]
    for note in studio.notes:
        gr.Markdown(f"*{note}*")
    button = gr.Button("Draw", variant="primary")
    gallery = gr.Gallery(label="All from the same noise", columns=2, object_fit="contain", format="png")

    def draw(
        prompt: str, files: list[str] | None, models: list[str], seed: float, steps: float | None, *strengths: float
    ) -> Iterator[list[tuple[Any, str]]]:
        given = dict(zip(movable, strengths))
        found: list[tuple[Any, str]] = []
        progress = gr.Progress()
        try:
            alpha = [open_image(Path(file), alpha=True) for file in files or []]
            for name, picture in studio.draw(
                models, prompt or "", alpha, int(seed or 0), int(steps) if steps else None, given,
                report=lambda done, name: progress((done, len(models)), f"{name} draws"),
            ):  # fmt: skip
                at = f", strength {given[name]:g}" if given.get(name, 1.0) != 1.0 else ""
                found.append((picture, name + at))
                yield found
        except Exception as error:
            raise gr.Error(sentence(error, "ui"), duration=None, print_exception=False) from error

    button.click(draw, [prompt, sources, models, seed, steps, *sliders], gallery, api_name="draw")


def _grids(folder: Path) -> list[tuple[int, Path]]:
    """Sample grids of a run by step: the first, the last, and some between."""
    found = sorted((int(path.stem.removeprefix("step-")), path) for path in (folder / "samples").glob("step-*.png")
                   if path.stem.removeprefix("step-").isdigit())  # fmt: skip
    if len(found) <= GRIDS:
        return found
    return [found[round(n * (len(found) - 1) / (GRIDS - 1))] for n in range(GRIDS)]


def _card(text: str) -> str:
    """The card without its front matter, and without pictures, which stand in the other tab."""
    parts = text.split("---\n", 2)
    body = parts[2] if len(parts) == 3 and not parts[0].strip() else text
    return re.sub(r"!\[[^\]]*\]\([^)]*\)\n*", "", body)
