"""`Studio`: a run's student, its teachers and its base on one stock pipeline, drawn side by side from the same noise.

The pipeline is loaded once, by the first drawing; each LoRA is an adapter of its transformer, switched and weighted
by the stock `set_adapters`. Settings of a call are those of `danceopd sample`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from danceopd.errors import UserError
from danceopd.recipe.recorded import recorded_recipe
from danceopd.sample import check_request, generate, recipe_settings

if TYPE_CHECKING:
    from PIL.Image import Image

BASE, STUDENT, BLEND = "base", "student", "blend"
"""Who can draw besides the teachers; the blend is all teachers at once, at their strengths."""
MOST = 4.0
"""The largest strength of an adapter."""


class Studio:
    """Of the run (or LoRA) `student`; `base` and `device` as for `load_student`.

    `models` are the names of who can draw, `teachers` the LoRAs among the run's teachers by name, `notes` what cannot
    be drawn with, and why.
    """

    def __init__(self, student: str | Path, base: str | None = None, device: str | None = None) -> None:
        from danceopd.adapters.load import base_of_student

        self.student, self.base, self.device = Path(student), base, device
        self.where = base_of_student(student, base)  # refuses what is no student
        self.settings = recipe_settings(self.student)
        self.editing_base, self.family = (self.settings.pop(key, None) for key in ("editing_base", "family"))
        self.teachers, self.notes = _teachers(self.student)
        self.fused = (self.student / "model_index.json").is_file()
        if self.fused:
            self.teachers, self.notes = {}, ["the student is a fused pipeline: its strength cannot be moved"]
        names = [*self.teachers, *([BLEND] if len(self.teachers) > 1 else [])]
        self.models = [STUDENT] if self.fused else [STUDENT, *names, BASE]
        self._pipe: Any = None
        self._loaded = {STUDENT}
        self._lock = Lock()

    def draw(
        self, models: Sequence[str], prompt: str, sources: Sequence[Image] = (), seed: int = 0,
        steps: int | None = None, strengths: Mapping[str, float] | None = None,
        report: Callable[[int, str], object] = lambda done, name: None,
    ) -> Iterator[tuple[str, Image]]:  # fmt: skip
        """A picture of each of `models` with its name, all from the noise of `seed`; with `sources`, edits of them.

        `strengths` of the student and the teachers, 1 being as they were trained. One drawing at a time; `report` is
        called before each. UserError for what `danceopd sample` refuses, an unknown model and a strength beyond 4.
        """
        check_request(prompt, 1, seed)
        given = {**dict.fromkeys((STUDENT, *self.teachers), 1.0), **(strengths or {})}
        for name in models:
            if name not in self.models:
                raise UserError(f"{name!r} cannot draw here; choose of {', '.join(self.models)}")
        if not models:
            raise UserError("nobody is chosen to draw; choose the student, a teacher or the base")
        for name, strength in given.items():
            if not abs(strength) <= MOST:
                raise UserError(f"the strength of {name} is {strength:g}; give at most {MOST:g}")
        if steps is not None and not 1 <= steps <= 1000:
            raise UserError(f"{steps} steps were asked for; give 1 to 1000")
        settings = self.settings | ({} if steps is None else {"num_inference_steps": steps})
        with self._lock:
            for done, name in enumerate(models):
                report(done, name)
                pipe = self._pipeline()
                with self._acting(name, given):
                    shown, settings = list(sources) or None, dict(settings)
                    yield name, next(
                        generate(pipe, prompt, shown, seed, 1, self.editing_base, settings, None, self.family)
                    )

    def _pipeline(self) -> Any:
        if self._pipe is None:
            from danceopd.adapters.load import load_student
            from danceopd.common.system import resolve_device

            self._pipe = load_student(self.student, self.base, resolve_device(self.device or "auto"))
            self._pipe.set_progress_bar_config(disable=True)
        return self._pipe

    @contextmanager
    def _acting(self, name: str, strengths: Mapping[str, float]) -> Iterator[None]:
        """A context in which the pipeline is this model."""
        if self.fused:
            yield
            return
        wanted = [STUDENT] if name == STUDENT else list(self.teachers) if name == BLEND else [name]
        weights = {} if name == BASE else {one: strengths[one] * self._scale(one) for one in wanted}
        for one in weights:
            self._load(one)
        from danceopd.pipelines.two_transformers import parted

        second = parted(self._pipe)
        transformers = [one for one in (self._pipe.transformer, second) if getattr(one, "peft_config", None)]
        for one in transformers:
            if weights:
                one.enable_adapters()
                mine = [adapter for adapter in weights if adapter in one.peft_config]
                one.set_adapters(mine, [weights[adapter] for adapter in mine])
            else:
                one.disable_adapters()
        try:
            yield
        finally:
            for one in transformers:
                one.enable_adapters()

    def _scale(self, name: str) -> float:
        return 1.0 if name == STUDENT else float(self.teachers[name].get("scale") or 1.0)

    def _load(self, name: str) -> None:
        """Put a teacher's LoRA on the pipeline, once, every layer checked."""
        if name in self._loaded:
            return
        from danceopd.adapters.load import load_lora
        from danceopd.adapters.read import read_adapter
        from danceopd.models.base import empty_transformer

        adapter = read_adapter(self.teachers[name]["adapter"], empty_transformer(self.where))
        load_lora(self._pipe, adapter, adapter, name)
        self._loaded.add(name)


def _teachers(student: Path) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The run's teachers that are LoRAs on the shared base and are still there, and what is said of the others."""
    if not (student / "recipe.yaml").is_file():
        return {}, ["no recipe lies beside the student, so its teachers are not known"]
    from danceopd.adapters.header import is_checkpoint
    from danceopd.common.shipped import resolve

    found, notes = {}, []
    for teacher in recorded_recipe(student).get("teachers") or []:
        name, adapter = str(teacher.get("name")), str(teacher.get("adapter", "base"))
        if adapter == "base":
            notes.append(f"teacher {name} is the bare base")
            continue
        try:
            place = resolve(adapter, "adapter")
        except UserError:
            notes.append(f"teacher {name} is no longer at {adapter}")
            continue
        if is_checkpoint(place):
            notes.append(f"teacher {name} is a whole model, which does not fit beside the base")
            continue
        found[name] = {**teacher, "adapter": str(place)}
        if teacher.get("guidance"):
            notes.append(f"teacher {name} was guided in training (scale {teacher['guidance']:g}), and is not here")
    return found, notes
