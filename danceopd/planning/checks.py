"""What a merge would refuse once its encoders or its base are loaded, found by tokenizers, tables and headers alone."""

from __future__ import annotations

import importlib.util
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from danceopd.adapters.blend import check_blend
from danceopd.common.files import disk_errors, lock_file
from danceopd.common.parse import read_json
from danceopd.common.shipped import portable
from danceopd.common.system import out_of_memory
from danceopd.data.dataset import TeacherData
from danceopd.data.encode import check_target
from danceopd.data.images import each_source, image_size
from danceopd.data.null_prompt import check_guidance
from danceopd.engine.teachers import TeacherWeights
from danceopd.engine.warm_start import blend_weights
from danceopd.errors import UserError
from danceopd.models.base import call_defaults, pipeline_index, transformer_config
from danceopd.models.checkpoint import check_stored
from danceopd.models.lora import Adapter
from danceopd.models.storage import check_gguf, check_package, saved_as
from danceopd.pipelines.editing import check_references, editing_class
from danceopd.pipelines.family import Family
from danceopd.pipelines.generation import check_prompts
from danceopd.pipelines.two_transformers import SECOND
from danceopd.recipe.checks import fault_of_quantised
from danceopd.recipe.fast import FEW_STEPS, few_step_name, steps_of
from danceopd.recipe.recipe import Recipe

QUANTISERS = {"quanto": "optimum", "fp8": "torch"}
"""Packages by `quant_method`, where the two have different names."""


def check_output(output: Path) -> None:
    """UserError unless a run folder can be made and written at `output`; leaves nothing there."""
    with disk_errors(output):
        place = output.absolute()
        while not place.exists():
            place = place.parent
        with tempfile.TemporaryDirectory(prefix=".danceopd-", dir=place):
            pass
        if (output / ".lock").is_file() and (lock := lock_file(output / ".lock")) is not None:
            lock.close()


def for_distilled(recipe: Recipe, folder: Path, begun: Recipe | None = None) -> tuple[Recipe, list[str]]:
    """The recipe with the steps of a base that was distilled to few, as its folder or its name says, where the recipe
    names none; what there is to say. UserError where nothing names them, with the number to write.

    A run that has `begun` keeps its steps.
    """
    name = re.split(r"[\\/]", portable(recipe.base).rstrip("\\/"))[-1]
    said, named = list[str](), "steps" in recipe.rollout.model_fields_set
    sure, few = pipeline_index(folder).get("is_distilled") is True, few_step_name(name)
    if recipe.fast is not None and recipe.fast.adapter is None and recipe.small_steps == 1 and not (sure or few):
        said.append(
            f"fast names no adapter, and the base does not say that it is distilled: where it needs many steps, a "
            f"student of {recipe.fast.steps} learns blurred pictures; fast.teacher_steps 4 shows it where they lead"
        )
    if not sure and not few:
        return recipe, said
    what = "the base is distilled to few steps" if sure else f"the base's name says {few!r}"
    given = recipe.call.get("num_inference_steps") or call_defaults(folder).get("num_inference_steps")
    if not (named or given or begun):
        otherwise = "" if sure else f", or rollout: {{steps: {recipe.rollout.steps}}} if it is not distilled"
        raise UserError(f"{what}, and the recipe names no steps; write fast: {{steps: {steps_of(name)}}}{otherwise}")
    steps = recipe.rollout.steps if named else given
    values = ({} if named else {"rollout.steps": steps}) | ({} if given else {"call.num_inference_steps": steps})
    if begun is not None:
        kept = begun.call.get("num_inference_steps")
        values = ({} if named else {"rollout.steps": begun.rollout.steps}) | (
            {} if given or kept is None else {"call.num_inference_steps": kept}
        )
    elif values:
        chosen = " and ".join(f"{key} {value}" for key, value in values.items())
        said.append(f"{what}, so {chosen}; name another in the recipe if you want it")
    if named and recipe.rollout.steps > 2 * FEW_STEPS:
        said.append(f"{what}, and rollout.steps is {recipe.rollout.steps}; {steps_of(name)} is usual")
    guided = [f"teacher {t.name!r}" for t in recipe.teachers if t.guidance is not None]
    guided += ["rollout.guidance"] if recipe.rollout.guidance != 1 else []
    if guided:
        said.append(f"{what} and draws without guidance, and {guided[0]} is guided; leave guidance out")
    return recipe.replaced(values), said


def note_of_triggers(recipe: Recipe) -> list[str]:
    """What there is to say where teachers have triggers, and no teacher keeps prompts without any the base's."""
    asked = dict.fromkeys(teacher.capability for teacher in recipe.teachers if teacher.trigger is not None)
    kept = {teacher.capability for teacher in recipe.teachers if teacher.trigger is None}
    return [
        f"every {capability} teacher has a trigger, so nothing teaches prompts without one; a teacher {{name: plain, "
        f"adapter: base, capability: {capability}, data: …}} keeps them the base's"
        for capability in asked
        if capability not in kept
    ]


def check_storage(recipe: Recipe, folder: Path, transformer: nn.Module) -> tuple[str | None, int | None, bool]:
    """UserError for a base whose weights are not all there, or quantised in a way that this merge does not run on.

    In which kind it was saved quantised (None: it was not); the bytes of a quantised file; whether the weights are
    there in full precision. `transformer` is its own, on the meta device.
    """
    place = folder / "transformer"
    if hasattr(transformer, SECOND) and (key := _untried_on_two(recipe)):
        raise UserError(f"{folder} has two transformers, of which the noise level chooses: leave out {key}")
    try:
        saved = saved_as(transformer_config(place))
    except UserError as error:
        raise UserError(f"{place}: {error}") from None
    if saved or recipe.base_dtype:
        check_package(saved or recipe.base_dtype or "")
    if saved is None and recipe.base_dtype != "gguf":
        check_stored(folder, transformer)
        return None, None, True
    if saved is None:
        file = Path(recipe.gguf or "")
        check_gguf(file)
        return None, file.stat().st_size, any(place.glob("*.safetensors"))
    if recipe.base_dtype is not None:
        raise UserError(f"{place} was saved quantised in {saved}, so base_dtype has no meaning; leave it out")
    if fault := fault_of_quantised(recipe):
        raise UserError(f"{place} was saved quantised in {saved}: {fault}")
    return saved, sum(file.stat().st_size for file in place.glob("*.safetensors")), False


def _untried_on_two(recipe: Recipe) -> str | None:
    """A setting of the recipe that was never tried on a base of two transformers."""
    settings = {
        f"base_dtype: {recipe.base_dtype}": recipe.base_dtype is not None,
        f"offload: {recipe.offload}": recipe.offload != "none",
        f"parallel: {recipe.parallel}": recipe.parallel == "fsdp",
        "compile: true": recipe.compile,
        f"student.init_method: {recipe.student.init_method}, which records inputs": (
            recipe.student.init == "blend" and recipe.student.init_method in ("regmean", "regmean++", "ssr")
        ),
    }
    return next((key for key, given in settings.items() if given), None)


def check_encoders(folder: Path, family: Family) -> None:
    """UserError for a text encoder that is not there, or was quantised by a package that is not."""
    index = pipeline_index(folder)
    for name in family.text_components:
        if not (isinstance(index.get(name), list) and index[name][1]):
            continue
        if not (folder / name).is_dir():
            raise UserError(f"{folder} has no folder {name}, which its model_index.json names; fetch the base again")
        config = folder / name / "config.json"
        with does_not_load(config):
            how = read_json(config, "the encoder's configuration") if config.is_file() else {}
            kind = str((how.get("quantization_config") or {}).get("quant_method") or "")
        package = QUANTISERS.get(kind, kind)
        if package and importlib.util.find_spec(package) is None:
            raise UserError(f"{folder / name} was saved quantised by {kind}, which is not installed; install {package}")


def tokenizers(index: Mapping[str, Any]) -> list[str]:
    """The tokenizers that a pipeline's model_index.json names."""
    listed = [(name, value) for name, value in index.items() if name.startswith("tokenizer")]
    return [name for name, value in listed if isinstance(value, list) and value[1]]


def check_start(recipe: Recipe, adapters: Mapping[str, Adapter | None]) -> None:
    """UserError for a blend that the student cannot start from."""
    held = {name: adapter for name, adapter in adapters.items() if adapter is not None}
    if recipe.student.init == "blend" and held:
        weights = blend_weights(recipe.student, held, len(adapters))
        check_blend(list(held.values()), weights, recipe.student.rank, recipe.student.init_method)


def check_contrast(recipe: Recipe, datasets: Mapping[str, TeacherData]) -> None:
    """UserError for a contrast with another row's prompt, or source image, where all rows have the same one."""
    for teacher in recipe.teachers:
        contrast, mine = recipe.contrast_of(teacher), datasets[teacher.name]
        if contrast is None or contrast.reference not in ("prompt", "source"):
            continue
        found = set()
        for row in mine.rows:
            found.add(mine.data.prompt(row) if contrast.reference == "prompt" else str(mine.data[row][1]))
            if len(found) > 1:
                break
        else:
            raise UserError(
                f"contrast of teacher {teacher.name!r} has reference {contrast.reference}, and all rows of "
                f"{recipe.data_source(teacher)} share one, so it would move nothing; add rows, or choose base or null"
            )


def check_sources(recipe: Recipe, datasets: Mapping[str, TeacherData], family: Family, base_class: str) -> None:
    """UserError for an edit with more sources than the stock pipeline takes."""
    for teacher in recipe.teachers:
        mine = datasets[teacher.name]
        if teacher.capability != "editing" or family.editing is None:
            continue
        counts = {row: len(each_source(mine.data[row][1])) for row in mine.rows}
        if max(counts.values()) > 1:
            editing = editing_class(family, base_class, recipe.editing_base)
            for row, count in counts.items():
                check_references(count, editing, family, mine.data.where(row))


def check_streamed(recipe: Recipe, teachers: Iterable[TeacherWeights], sharded: bool) -> None:
    """UserError for a whole model that would be streamed into weights which are not there as they were stored."""
    name = next((one.teacher.name for one in teachers if one.streamed), None)
    key = "parallel: fsdp" if sharded else "offload: blocks" if recipe.offload == "blocks" else None
    key = f"base_dtype: {recipe.base_dtype}" if recipe.base_dtype else key
    if name is not None and key is not None:
        raise UserError(
            f"teacher {name!r} is a whole model that is streamed through the base, which {key} does not keep whole; "
            f"raise the teacher's rank or residual so that it is kept as a difference, or leave out {key}"
        )


def check_settings(recipe: Recipe, family: Family, pipe: Any, call: Mapping[str, Any]) -> list[str]:
    """What there is to say of a call's settings: a size that is rounded, a guidance that the base does not read.

    UserError for a size that the stock class refuses.
    """
    said, size = list[str](), (call["height"], call["width"])
    drawn = family.drawn(pipe, *size)
    if recipe.has("generation") and drawn != size:
        said.append(
            f"call.height {size[0]} and call.width {size[1]} are drawn as {drawn[0]} and {drawn[1]}, whole tokens of "
            f"{family.name}"
        )
    if "guidance_scale" in recipe.call and not pipe.transformer.config.get("guidance_embeds"):
        said.append(
            "call.guidance_scale changes nothing, since the base reads no guidance (guidance_embeds is false); "
            "guidance on a teacher is classifier-free guidance"
        )
    return said


def check_prompts_of(
    recipe: Recipe, folder: Path, family: Family, pipe: Any, call: Mapping[str, Any],
    datasets: Mapping[str, TeacherData],
) -> list[str]:  # fmt: skip
    """UserError for a prompt that the encoder would cut, or guidance that the family lacks; what was not checked."""
    asking = {
        "guidance.unconditional": recipe.guidance.unconditional > 0, "rollout.guidance": recipe.rollout.guidance != 1,
        "guided in nft.contexts": "guided" in recipe.nft.contexts,
    }  # fmt: skip
    for key in (key for key, asked in asking.items() if asked):
        check_guidance(family, key, recipe.has("editing"))
    for t in recipe.teachers:
        if t.guidance is not None:
            check_guidance(family, f"guidance of teacher {t.name!r}", t.capability == "editing")
    named, cuts = tokenizers(pipeline_index(folder)), family.prompt_limit(pipe, dict(call)) < sys.maxsize
    if cuts and (not named or any(pipe.components.get(name) is None for name in named)):
        return [f"{folder} has no tokenizer, so the length of prompts is not checked, and a merge would not load it"]
    settings = {key: value for key, value in call.items() if key != "num_inference_steps"}
    for teacher in recipe.teachers:
        mine = datasets[teacher.name]
        prompts = {mine.data.prompt(row): mine.data.where(row) for row in reversed(mine.rows)}  # each once
        check_prompts(
            pipe, family, list(prompts), settings, list(prompts.values()), teacher.capability == "editing"
        )
        if teacher.negative and teacher.negative.strip():
            check_prompts(pipe, family, [teacher.negative], settings, [f"the negative prompt of {teacher.name!r}"])
    return []


def check_target_shapes(
    recipe: Recipe, datasets: Mapping[str, TeacherData], family: Family, pipe: Any, call: Mapping[str, Any]
) -> None:
    """UserError for a target picture that would be squeezed into the size that is drawn, or where a video is drawn."""
    if family.frames(pipe, dict(call)) > 1:
        raise UserError(
            f"objective {recipe.objective} learns from pictures, and call.num_frames {call['num_frames']} draws "
            "videos; set call.num_frames: 1, or take an objective without targets"
        )
    settings = {key: value for key, value in call.items() if key != "num_inference_steps"}
    for teacher in recipe.teachers:
        data = datasets[teacher.name].data
        for row in datasets[teacher.name].rows:
            size = (call["height"], call["width"])
            if teacher.capability == "editing":
                size = family.edited_size(pipe, data.sizes(row), settings)  # type: ignore[attr-defined]
            check_target(image_size(data.target(row), data.where(row), data.alpha), size, data.where(row))


@contextmanager
def does_not_load(place: Path) -> Iterator[None]:
    """A context in which an error becomes a UserError: `place` does not load."""
    try:
        yield
    except Exception as error:  # transformers raises a dozen kinds
        if out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{place} does not load ({reason}); fetch it again") from error
