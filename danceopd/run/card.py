"""The model card: `README.md` beside the student, for a reader who does not know this package.

First how to load it, in three lines of stock diffusers with the call arguments of both tasks; then what it
scored, what it was merged from (each by its hash), and the recipe that makes it again. Hugging Face reads the
front matter. Nothing in it leaks a path of this machine: folders are named, not located.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from danceopd.adapters.header import WEIGHTS
from danceopd.common.files import disk_errors, write_atomic
from danceopd.common.shipped import SHIPPED
from danceopd.recipe.parts import PROMPT

if TYPE_CHECKING:
    from danceopd.pipelines.family import Family

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
"""A name on the hub: owner/name."""
PAPER = "[DanceOPD](https://arxiv.org/abs/2606.27377)"


def write_card(
    folder: str | Path, recipe: Any, scores: Mapping[str, Mapping[str, float | str | None]] | None = None,
    hashes: Mapping[str, str] | None = None, snippet: str | None = None, grid: str | Path | None = None,
    fused: bool = False, init: str | None = None, sentences: Sequence[str] = (),
) -> Path:  # fmt: skip
    """Write `folder/README.md`.

    `recipe` is a Recipe or its resolved mapping; `scores` is {row: {column: value}}, e.g.
    {"student": {"generation": 0.93, "editing": 9.1}}, None for a value that was not measured; `hashes` is
    {"student" | "base" | teacher: sha256}; `snippet` replaces the load snippet; `grid` is a picture in the folder;
    `init` a sentence on the student's init, `sentences` what validation and the monitor found.
    Returns its path. Raises UserError when it cannot be written.
    """
    folder = Path(folder)
    resolved = without_paths(recipe if isinstance(recipe, Mapping) else recipe.resolved())
    resolved.pop("trackers", None)  # whose project and server they are is nobody's business
    base, teachers = str(resolved.get("base", "base")), resolved.get("teachers") or []
    names = [str(teacher["name"]) for teacher in teachers]
    parts = [
        _front_matter(base, {str(teacher.get("capability")) for teacher in teachers}, fused),
        f"# {_title(folder)}",
        f"One {'pipeline' if fused else 'LoRA'} that does what {_and(names)} do, merged on `{base}` by "
        f"`danceopd`: the student rolled out its own denoising trajectory and learned, "
        f"at one state of each, the velocity of the routed teacher ({PAPER}).",
    ]
    if grid is not None:
        parts.append(f"![What the models draw and edit, side by side]({_inside(folder, Path(grid))})")
    call = resolved.get("call") or {}
    parts += ["## Use", _block(snippet or load_snippet(base, call, fused, teachers=teachers), "python")]
    parts += filter(None, [_steps_sentence(resolved), _triggers(teachers)])
    if scores:
        parts += ["## Scores", _score_table(scores)]
    parts += ["## Merged from", _origin_table(base, teachers, hashes or {}), *filter(None, (init,))]
    if sentences:
        parts += ["## Checked during training", "\n".join(f"- {sentence}" for sentence in sentences)]
    parts += ["## Recipe", _block(yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True, width=100), "yaml")]
    parts.append("Made again by `danceopd merge recipe.yaml`.")
    path = folder / "README.md"
    with disk_errors(path):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(path, ("\n\n".join(parts) + "\n").encode())
    return path


def add_results(
    folder: Path, bench: str, sentence: str, scores: Mapping[str, Mapping[str, float | str | None]], about: str,
    results: Sequence[Mapping[str, Any]], picture: Path | None = None,
) -> None:  # fmt: skip
    """Write a bench into the card of `folder`: a section with its verdict, its contact sheet if that `picture` is in
    the folder, and its scores, and its `results` as Hugging Face's `model-index`. The section and the results of the
    same `bench` are replaced; a file that is no model card is left alone.
    """
    path = folder / "README.md"
    parts = path.read_text(encoding="utf-8").split("---\n", 2)
    fields = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
    if not isinstance(fields, dict) or "danceopd" not in (fields.get("tags") or ()):
        return
    known: list[dict] = next((index["results"] for index in fields.get("model-index") or ()), [])
    kept = [result for result in known if result["dataset"]["name"] != bench]
    fields["model-index"] = [{"name": _title(folder), "results": [*kept, *map(dict, results)]}]
    head = f"## Scores: {bench}"
    inside = picture is not None and picture.resolve().is_relative_to(folder.resolve())
    shown = [f"![The best, a typical and the worst item]({_inside(folder, picture)})"] if picture and inside else []
    section = "\n\n".join([head, sentence, *shown, _score_table(scores), about]) + "\n\n"
    text = re.sub(rf"^{re.escape(head)}\n.*?(?=^## |\Z)", "", parts[2], flags=re.S | re.M)
    before, mark, after = text.partition("## Merged from")
    front = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)
    with disk_errors(path):
        write_atomic(path, f"---\n{front}---\n{before}{section if mark else ''}{mark}{after}".encode())


def load_snippet(
    base: str, call: Mapping[str, Any] | None = None, fused: bool = False, family: Family | None = None,
    teachers: Sequence[Mapping[str, Any]] = (), two: bool = False,
) -> str:  # fmt: skip
    """Python that loads the student with stock diffusers, then draws, then edits. `call` has the recipe's keys
    (height, width, steps, max_sequence_length). Of a `family` that edits with another class, or not at all, only what
    draws. `two`: the base has two transformers. Each of `teachers` with a trigger, as the resolved recipe has them, has
    a line of its own.
    """
    call = {("num_inference_steps" if key == "steps" else key): value for key, value in (call or {}).items()}
    extra = "".join(f", {key}={value!r}" for key, value in call.items())
    picture = "images[0]"
    if family is not None and family.video:
        extra, picture = f'{extra}, output_type="pil"', "frames[0][0]  # the first frame"
    load = ["from diffusers import DiffusionPipeline"]
    if fused:
        load.append('pipe = DiffusionPipeline.from_pretrained("path/to/this/folder")')
    else:
        where = base if HUB_NAME.fullmatch(base) else f"path/to/{Path(base).name}"
        load.append(f'pipe = DiffusionPipeline.from_pretrained("{where}")')
        if family is None or family.loads_loras:
            load.append('pipe.load_lora_weights("path/to/this/folder")')
            if two:  # which that does not load
                where = f'"path/to/this/folder", weight_name="{WEIGHTS}", prefix="transformer_2"'
                load.append(f"pipe.transformer_2.load_lora_adapter({where})")
        else:
            load.append(f'pipe.transformer.load_lora_adapter("path/to/this/folder", weight_name="{WEIGHTS}")')
    inputs = {"generation": ("drawn", "", "a red circle above a blue square")}
    if family is None or family.editing == family.generation:
        inputs["editing"] = "edited", "image=drawn, ", "make the circle green"

    def use(capability: str, trigger: str = PROMPT) -> str:
        name, source, prompt = inputs[capability]
        worded = json.dumps(trigger.replace(PROMPT, prompt), ensure_ascii=False)
        return f"{name} = pipe({source}prompt={worded}{extra}).{picture}"

    asked = [teacher for teacher in teachers if teacher.get("trigger") and teacher["capability"] in inputs]
    own = [line for t in asked for line in ("", f"# {t['name']}, by its trigger", use(t["capability"], t["trigger"]))]
    return "\n".join([*load, "", *map(use, inputs), *own])


def _steps_sentence(resolved: Mapping[str, Any]) -> str | None:
    """In how many steps a student of few draws."""
    steps = (resolved.get("fast") or {}).get("steps")
    return steps and (
        f"It draws in **{steps} steps**, which it was trained with: leave `num_inference_steps={steps}` in the call, "
        "and guidance off."
    )


def _triggers(teachers: Sequence[Mapping[str, Any]]) -> str | None:
    """How each trigger joins a prompt."""
    asked = [teacher for teacher in teachers if teacher.get("trigger")]
    rows = [["for", "write", ""], *([f"`{t['name']}`", f"`{t['trigger']}`", str(t["capability"])] for t in asked)]
    return f"Prompts ask for a teacher by its trigger:\n\n{_table(rows)}" if asked else None


def _front_matter(base: str, capabilities: set[str], fused: bool) -> str:
    editing = "editing" in capabilities
    tags = ["danceopd", "text-to-image", *(["image-to-image", "image-editing"] if editing else [])]
    tags += [] if fused else ["lora", "template:sd-lora"]
    fields: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": "text-to-image", "tags": tags}
    if base != ".":
        fields["base_model"] = base
        fields["base_model_relation"] = "merge" if fused else "adapter"
    return "---\n" + yaml.safe_dump(fields, sort_keys=False, allow_unicode=True) + "---"


def _title(folder: Path) -> str:
    return folder.resolve().name or "student"


def _and(names: list[str]) -> str:
    marked = [f"`{name}`" for name in names] or ["its teachers"]
    return marked[0] if len(marked) == 1 else ", ".join(marked[:-1]) + " and " + marked[-1]


def without_paths(value: Any) -> Any:
    """The recipe as plain data, with every path cut to its last part."""
    if isinstance(value, Mapping):
        return {str(key): without_paths(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(item) for item in value]
    if isinstance(value, Path) or (isinstance(value, str) and value.startswith(("/", "~", "./", "../"))):
        return Path(value).name
    return value


def _inside(folder: Path, grid: Path) -> str:
    path = grid.resolve()
    return path.relative_to(folder.resolve()).as_posix() if path.is_relative_to(folder.resolve()) else grid.as_posix()


def _block(text: str, language: str) -> str:
    return f"```{language}\n{text.rstrip()}\n```"


def _table(rows: list[list[str]]) -> str:
    """Markdown; the first row is the head."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def _score_table(scores: Mapping[str, Mapping[str, float | str | None]]) -> str:
    columns = list(dict.fromkeys(column for row in scores.values() for column in row))
    rows = [["", *columns]]
    for name, row in scores.items():
        rows.append([f"**{name}**" if name == "student" else name, *(_number(row.get(column)) for column in columns)])
    return _table(rows)


def _number(value: float | str | None) -> str:
    if value is None:
        return "–"
    return value if isinstance(value, str) else f"{value:.3g}"


def _origin_table(base: str, teachers: list[Mapping[str, Any]], hashes: Mapping[str, str]) -> str:
    rows = [["", "what", "for", "strength", "sha256"]]
    rows.append(["base", f"`{base}`", "", "", _hash(hashes, "base")])
    for teacher in teachers:
        name, adapter = str(teacher["name"]), str(teacher.get("adapter", "base"))
        what = f"`{adapter}`" + (" (shipped)" if adapter in SHIPPED else "")
        rows.append(
            [name, what, str(teacher.get("capability", "")), f"{teacher.get('scale', 1.0):g}", _hash(hashes, name)]
        )
    if "student" in hashes:
        rows.append(["student", "this model", "", "", _hash(hashes, "student")])
    return _table(rows)


def _hash(hashes: Mapping[str, str], name: str) -> str:
    return f"`{hashes[name]}`" if name in hashes else "–"
