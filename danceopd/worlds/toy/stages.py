"""`teach`: train one stage of the small model and write it; `STAGES` says what each is trained on and for how long."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import AutoencoderKLFlux2

from danceopd.adapters.header import adapter_file
from danceopd.adapters.read import read_adapter
from danceopd.adapters.write import write_adapter
from danceopd.common.files import disk_errors, is_partial, lock_file, sha256, write_json
from danceopd.common.messages import did_you_mean
from danceopd.common.shipped import portable, resolve
from danceopd.common.system import describe_machine
from danceopd.errors import UserError
from danceopd.models.base import base_fingerprint, base_folder, empty_transformer, load_base
from danceopd.models.lora import Adapter
from danceopd.pipelines.registry import family_of
from danceopd.worlds.scenes.edits import GLOBAL, LOCAL, TASKS
from danceopd.worlds.scenes.prompts import TAGS
from danceopd.worlds.toy.autoencoder import fit_encoder, make_autoencoder
from danceopd.worlds.toy.batches import Batches, Mix
from danceopd.worlds.toy.codes import CellTable
from danceopd.worlds.toy.decoder import train_decoder
from danceopd.worlds.toy.effects import EFFECTS, Effect
from danceopd.worlds.toy.effects import RANK as EFFECT_RANK
from danceopd.worlds.toy.flow import FlowTrainer, LoraTransformer, Schedule
from danceopd.worlds.toy.small import make_pipeline, make_transformer, save_pipeline


@dataclass(frozen=True)
class Stage:
    """Steps, rows a step, and the data; ``rank`` is that of a LoRA, None trains the whole transformer."""

    steps: int
    batch: int = 64
    mix: Mix | None = None
    rank: int | None = None
    muon: float = 3e-3
    guidance: float = 1.0
    noise: tuple[float, float] = (1.0, 1.0)


def _even(names: tuple[str, ...]) -> dict[str, float]:
    return dict.fromkeys(names, 1.0)


HARD = {"single_object": 0.4, "two_object": 1.5, "counting": 2.0, "colors": 0.4, "position": 5.0, "color_attr": 2.0}
"""The data of the generation teacher: mostly counting, position and binding."""
PIPELINE = ("autoencoder", "base")
"""Stages that train the parts of one pipeline, in one folder."""
EDITS = (2.3, 1.2)
"""The noise levels of edits: nearer to pure noise, where the source alone says what an edit leaves unchanged."""
RANK = 40
"""Rank of the shipped teachers: 1.4 MB each in bfloat16."""



def _of_effect(effect: Effect) -> Stage:
    """Minutes for one task: whole pictures change sooner than one thing in them."""
    if effect.capability == "generation":
        return Stage(500, 32, Mix({effect.task: 1.0}, {}, 1.0), EFFECT_RANK, guidance=2.0)
    whole = effect.task.partition("=")[0] in GLOBAL
    return Stage(200 if whole else 500, 32, Mix({}, {effect.task: 1.0}, 0.0), EFFECT_RANK, noise=EDITS)


STAGES: dict[str, Stage] = {
    "autoencoder": Stage(steps=10000, batch=24),
    "base": Stage(steps=4000, mix=Mix(_even(TAGS), _even(TASKS), 0.6)),
    "generation": Stage(steps=11000, mix=Mix(HARD, {}, 1.0), rank=RANK, guidance=2.0),
    "editing": Stage(steps=7500, mix=Mix({}, _even(TASKS) | dict.fromkeys(LOCAL, 2.0), 0.0), rank=RANK, noise=EDITS),
    "local-edit": Stage(steps=2000, mix=Mix({}, _even(LOCAL), 0.0), rank=RANK),
    "global-edit": Stage(steps=300, mix=Mix({}, _even(GLOBAL), 0.0), rank=RANK),
    **{name: _of_effect(effect) for name, effect in EFFECTS.items()},
}


def teach(
    stage: str,
    output: Path | None = None,
    steps: int | None = None,
    seed: int = 0,
    base: str | Path = "base",
    init: str | Path | None = None,
    report: Callable[[int, int, float], None] | None = None,
) -> Path:
    """Train one stage and write it; returns its folder.

    ``init`` is a LoRA of the stage's rank that a teacher starts from. ``output`` is the pipeline's folder for
    ``autoencoder`` and ``base`` (in either order) and the LoRA's for the teachers; default ``checkpoints/<stage>``.
    Training state is kept in ``<output>/.training``, from which the same
    call continues. ``report(step, steps, loss)`` is called after every step. A signal ends the step at
    hand, saves, and ends. UserError for an unknown stage, for steps below 1, for a folder that cannot be written, holds
    something else, or is in use.
    """
    if stage not in STAGES:
        raise UserError(f"no stage is named {stage!r}{did_you_mean(stage, STAGES)}")
    plan = STAGES[stage]
    total = plan.steps if steps is None else steps
    if not 1 <= total <= 10**7:
        raise UserError(f"steps is {total}; give 1 to 10,000,000")
    if not 0 <= seed < 2**32:
        raise UserError(f"the seed is {seed}; give a whole number from 0, below 2**32")
    pipeline = stage in PIPELINE
    start = None
    if not pipeline:
        place = base_folder(base)
        start = None if init is None else _start(plan, Path(resolve(init, "LoRA to start from")), place)
    elif init is not None:
        raise UserError(f"stage {stage} trains a whole model, and --init names a LoRA; leave --init out")
    folder = Path(output) if output is not None else Path("checkpoints") / ("base" if pipeline else stage)
    state = folder / ".training" / stage
    with disk_errors(folder):  # now, not after hours of training
        _refuse_foreign(folder, stage)
        state.mkdir(parents=True, exist_ok=True)
        lock = lock_file(folder / ".lock")
    try:
        _train(stage, folder, state, total, seed, base, start, report)
        machine = f"{describe_machine()}, torch {torch.__version__}"
        note = {"stage": stage, "seed": seed, "steps": total, "machine": machine}
        if start is not None:
            note["init_sha256"] = start.sha256
        write_json(folder / f"{stage}.json", note)
    finally:
        if lock is not None:
            lock.close()
    return folder


class Start(NamedTuple):
    """A LoRA that a teacher starts from, and the sha256 of its file."""

    adapter: Adapter
    sha256: str


def _start(plan: Stage, path: Path, base: Path) -> Start:
    adapter = read_adapter(path, empty_transformer(base))
    if any(len(a) != plan.rank for a, _ in adapter.tensors.values()):
        raise UserError(f"the LoRA in {path} is not of rank {plan.rank} in every layer; give one that this stage wrote")
    return Start(adapter, sha256(adapter_file(path)))


def _refuse_foreign(folder: Path, stage: str) -> None:
    """UserError for a folder that holds what this stage, or for a pipeline the other stage, did not write."""
    if not folder.is_dir() or all(path.name == ".lock" or is_partial(path) for path in folder.iterdir()):
        return
    stages = PIPELINE if stage in PIPELINE else (stage,)
    begun = any((folder / ".training" / name).is_dir() for name in stages)
    other = any((folder / f"{name}.json").is_file() for name in stages if name != stage)
    if not begun and not (other and not (folder / f"{stage}.json").exists()):
        raise UserError(
            f"output folder {folder} holds what `danceopd teach {stage}` has not begun, and nothing is overwritten; "
            "choose another --output"
        )


def _train(
    stage: str, folder: Path, state: Path, total: int, seed: int, base: str | Path, start: Start | None,
    report: Callable[[int, int, float], None] | None,
) -> None:  # fmt: skip
    plan = STAGES[stage]

    def on_step(step: int, loss: float) -> None:
        if report is not None:
            report(step, total, loss)

    if stage == "autoencoder":
        vae = _autoencoder(None, seed)
        train_decoder(vae, state, total, seed, plan.batch, on_step)
        _write_pipeline(folder, seed, vae=vae)
    elif stage == "base":
        transformer = make_transformer(seed)
        pipe = make_pipeline(_autoencoder(folder, seed), transformer, seed)
        parameters = dict(transformer.named_parameters())
        assert plan.mix is not None
        batches = Batches(pipe, CellTable(pipe.vae), plan.mix, plan.batch, seed)
        trainer = FlowTrainer(transformer, parameters, batches, Schedule(total, muon=plan.muon), state)
        average = trainer.run(on_step)
        transformer.load_state_dict(average)
        _write_pipeline(folder, seed, transformer=transformer)
    else:
        _teach_lora(plan, base, start, folder, state, total, seed, on_step)


def _autoencoder(folder: Path | None, seed: int) -> AutoencoderKLFlux2:
    """The autoencoder in a pipeline's folder, else a new one with its encoder fitted."""
    if folder is not None and (folder / "vae").is_dir():
        return AutoencoderKLFlux2.from_pretrained(folder / "vae").eval()
    vae = make_autoencoder(seed).eval()
    fit_encoder(vae)
    return vae


def _write_pipeline(folder: Path, seed: int, vae=None, transformer=None) -> None:
    """Write the pipeline with this stage's part; the other stage's part is the trained one or an untrained one."""
    if vae is None:
        vae = _autoencoder(folder, seed)
    if transformer is None:
        there = (folder / "transformer").is_dir()
        transformer = load_base(folder).transformer if there else make_transformer(seed)
    with disk_errors(folder):
        save_pipeline(make_pipeline(vae, transformer, seed), folder)


def _teach_lora(
    plan: Stage,
    base: str | Path,
    start: Start | None,
    folder: Path,
    state: Path,
    total: int,
    seed: int,
    on_step: Callable[[int, float], None],
) -> None:
    place = base_folder(base)
    pipe = load_base(place)
    targets = family_of(pipe).lora_targets
    modules = [n for n, m in pipe.transformer.named_modules() if hasattr(m, "weight") and re.fullmatch(targets, n)]
    assert plan.mix is not None and plan.rank is not None
    model = LoraTransformer(pipe.transformer, modules, plan.rank, seed)
    fingerprint = base_fingerprint(place)
    facts = {"base": fingerprint, "init_sha256": None if start is None else start.sha256}
    if start is not None:
        model.start(start.adapter)
    batches = Batches(pipe, CellTable(pipe.vae), plan.mix, plan.batch, seed)
    schedule = Schedule(total, muon=plan.muon, guidance=plan.guidance, noise=plan.noise)
    origin = {"base": portable(str(place)), "base_sha256": fingerprint}
    trainer = FlowTrainer(model, model.factors, batches, schedule, state, **facts)
    average = trainer.run(on_step)
    write_adapter(model.adapter(average), folder, torch.bfloat16, origin)
