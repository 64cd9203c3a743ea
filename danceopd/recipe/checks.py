"""What must hold between the parts of a recipe: a table of faults, each with its sentence.

`check` is called when a `Recipe` is made. A row is (when it is wrong, what to say); `{r...}` in a sentence is looked up
in the recipe. Checks of one part alone stand in that part, checks that need a model in the room that has it. `plugged`
lists the plug-ins that a recipe names, which are looked at where they are used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from danceopd.common.messages import did_you_mean, shown
from danceopd.errors import UserError
from danceopd.plugins import check_name
from danceopd.recipe.labelfree import REFERENCES
from danceopd.recipe.nft import NFT, Likelihood, OwnReward
from danceopd.recipe.parts import FlowOPD, OffPolicy, Query, Rollout
from danceopd.recipe.values import BLENDS, LAWS, OBJECTIVES

if TYPE_CHECKING:
    from danceopd.recipe.recipe import Recipe

EVERY_STEP = ("diffusionopd", "flowopd")
"""Objectives that query the teacher at every step of a trajectory."""
NO_ROLLOUT = ("offpolicy", "supervised")
"""Objectives that learn from noised clean pictures, without a trajectory of the student."""
NO_QUERY = (*NO_ROLLOUT, "nft", "flowopd")
"""Objectives that learn from more than a teacher's velocity at one state."""
TAKEN = ("student", "base", "blend", "ema", *BLENDS)
"""Names that mean something else than a teacher."""

CALL_MOST = {"height": 2**14, "width": 2**14, "num_inference_steps": 1000, "max_sequence_length": 2**13,
             "output_resolution": 2**13, "num_frames": 1000, "guidance_scale": 1e4}  # fmt: skip
"""Keys of `call`, and the largest value of each."""

Check = tuple[Callable[["Recipe"], object], str]


def _only_if(condition: Callable[[Recipe], bool], check: Check) -> Check:
    wrong, sentence = check
    return lambda recipe: condition(recipe) and wrong(recipe), sentence


OF_QUANTISED: tuple[Check, ...] = (
    (
        lambda r: r.objective == "flowopd",
        "objective flowopd weighs rollouts by how likely the student's steps are, which rounded weights change, and "
        "the base is quantised; choose danceopd or diffusionopd, or a base in bf16",
    ),
    (
        lambda r: r.rollout.merged is True,
        "rollout.merged adds the student to the base's weights, which are quantised; leave it out",
    ),
    (
        lambda r: r.parallel == "fsdp",
        "parallel fsdp shares out weights in full precision, and the base is quantised; keep one of the two",
    ),
    (
        lambda r: r.compile,
        "compile was never tried on a quantised base; keep one of the two",
    ),
    (
        lambda r: r.offload != "none",
        "offload brings weights in full precision, and the base is quantised; keep one of the two",
    ),
)
"""Faults of a merge on a quantised base: of base_dtype, or as its folder says (planning/outline.py)."""

CHECKS: tuple[Check, ...] = (
    # the base
    *(_only_if(lambda r: r.base_dtype is not None, check) for check in OF_QUANTISED),
    (
        lambda r: (r.base_dtype == "gguf") != (r.gguf is not None),
        "base_dtype is {r.base_dtype} and gguf names {r.gguf}; give both base_dtype: gguf and the file, or neither",
    ),
    (
        lambda r: r.offload == "blocks" and r.rollout.merged is True,
        "offload blocks keeps one block on the card, and rollout.merged a copy of all; leave one of the two out",
    ),
    (
        lambda r: r.offload == "blocks" and r.gradient_checkpointing is False,
        "offload blocks without gradient_checkpointing would hold every block until the backward; leave that out",
    ),
    (
        lambda r: r.offload == "blocks" and (r.compile or r.parallel == "fsdp"),
        "offload blocks exchanges weights that compile and parallel fsdp hold on to; keep one of the two",
    ),
    (
        lambda r: r.parallel == "fsdp" and r.student.init_method in ("regmean", "regmean++", "ssr"),
        "student.init_method {r.student.init_method} records inputs of whole layers, which parallel fsdp shares out; "
        "write that blend with `danceopd blend` and name it as student.init",
    ),
    # teachers
    (lambda r: len(r.teachers) < 2, "a merge needs at least two teachers and here is {n_teachers}; add another"),
    (
        lambda r: r.small_steps == 1
        and all(t.adapter == "base" and t.guidance is None and t.field is None for t in r.teachers),
        "every teacher is the bare base, so there is nothing to merge; give one an adapter",
    ),
    (
        lambda r: r.routing.per == "turn" and len(set(r.shares().values())) > 1,
        "routing.per turn gives each teacher equal turns; leave out the weights",
    ),
    (
        lambda r: r.routing.per == "need" and not r.validation.every,
        "routing.per need goes by the validation error, and validation.every is 0; set it, such as 50",
    ),
    (
        lambda r: r.routing.per == "need" and (r.gates.on or r.objective == "nft"),
        "routing.per need was never tried with gates or objective nft; give row",
    ),
    # fast
    (
        lambda r: r.fast is not None and r.fast.adapter and r.student.init_method in ("regmean", "regmean++", "ssr"),
        "fast.adapter goes on top of a start whose inputs {r.student.init_method} would record without it, which was "
        "never tried; write that blend with `danceopd blend` and name it as student.init",
    ),
    (
        lambda r: r.small_steps > 1 and (r.objective in NO_QUERY or r.gates.on),
        "fast.teacher_steps goes along the steps of a student's rollout, which objective {r.objective} and gates do "
        "not ask for; leave it out, or give objective danceopd without gates",
    ),
    (
        lambda r: r.small_steps > 1 and r.monitored_every,
        "the monitor draws with the teachers, in steps that fast.teacher_steps says are too few for them; set "
        "monitor.every: 0",
    ),
    (
        lambda r: r.fast is not None and r.rollout.noise,
        "fast trains the steps that the student will draw with, and rollout.noise makes others; leave one of them out",
    ),
    # objective
    (
        lambda r: r.rollout.noise and r.rollout.solver != "euler",
        "rollout.solver {r.rollout.solver} cannot take random steps; leave it out, or rollout.noise",
    ),
    (
        lambda r: r.objective == "flowopd" and not r.rollout.noise,
        "objective flowopd learns from stochastic rollouts; set rollout.noise (its paper: 0.7)",
    ),
    (
        lambda r: r.objective == "flowopd" and r.batch % r.flowopd.group,
        "batch {r.batch} is no multiple of flowopd.group, {r.flowopd.group}; give one",
    ),
    (
        lambda r: r.objective in EVERY_STEP and r.query != Query(),
        "objective {r.objective} queries the teacher at every step, so query has no meaning; leave it out",
    ),
    (
        lambda r: r.objective != "flowopd" and r.flowopd != FlowOPD(),
        "flowopd is set, and the objective is {r.objective}; leave it out",
    ),
    (
        lambda r: r.objective != "offpolicy" and r.offpolicy != OffPolicy(),
        "offpolicy is set, and the objective is {r.objective}; leave it out",
    ),
    (
        lambda r: r.objective_options and r.objective in OBJECTIVES,
        "objective_options are for a plug-in, and objective {r.objective} is built in; leave them out",
    ),
    (
        lambda r: r.query.law_options and r.query.law in LAWS,
        "query.law_options are for a plug-in, and law {r.query.law} is built in; leave them out",
    ),
    (
        lambda r: r.query.beta and r.query.law not in LAWS,
        "query.beta is of the built-in laws, and law {r.query.law} is a plug-in; leave it out",
    ),
    (
        lambda r: r.objective in NO_ROLLOUT and r.rollout != Rollout(steps=r.rollout.steps, merged=r.rollout.merged),
        "objective {r.objective} has no student rollout; of rollout, keep steps only",
    ),
    (
        lambda r: r.rollout.cache_source and r.parallel == "fsdp",
        "rollout.cache_source needs the whole base in each process; leave it out, or parallel fsdp",
    ),
    # nft
    (
        lambda r: r.objective != "nft" and r.nft != NFT(),
        "nft is set, and the objective is {r.objective}; write objective: nft, or leave it out",
    ),
    (
        lambda r: r.objective == "nft" and r.batch % r.nft.group,
        "batch {r.batch} is no multiple of nft.group, {r.nft.group}; give one",
    ),
    (
        lambda r: r.nft.round % r.nft.reuse,
        "nft.round {r.nft.round} is no multiple of nft.reuse, {r.nft.reuse}; give one",
    ),
    (
        lambda r: r.objective == "nft" and (r.rollout.noise or r.rollout.guidance != 1),
        "objective nft ranks samples of the student's plain flow; leave out rollout.noise and rollout.guidance",
    ),
    (
        lambda r: r.objective == "nft" and r.guidance.unconditional,
        "objective nft ranks answers to prompts, and guidance.unconditional drops some of them; leave it out",
    ),
    (
        lambda r: r.objective == "nft" and r.moves_targets and not r.nft.asks_teacher,
        "contrast moves the teachers' velocities, and nft.share 1 without an anchor asks for none; lower nft.share, or "
        "give nft.anchor",
    ),
    (
        lambda r: r.nft.contexts and not r.nft.asks_teacher,
        "nft.contexts are for the teachers' answers, and nft.share 1 without an anchor asks for none; lower nft.share, "
        "or give nft.anchor",
    ),
    (
        lambda r: r.objective == "nft" and r.validation.decides,
        "validation.{r.validation.decides} goes by the distance to the teachers, which objective nft leaves behind; "
        "leave it out",
    ),
    # gates
    (
        lambda r: r.gates.on and r.objective != "danceopd",
        "gates weigh what objective danceopd learns, and the objective is {r.objective}; leave them out",
    ),
    (
        lambda r: r.gates.on and r.batch % r.gates.group,
        "batch {r.batch} is no multiple of gates.group, {r.gates.group}; give one",
    ),
    (
        lambda r: r.gates.evidence is not None and r.gates.evidence.contrast == "source" and not r.has("editing"),
        "gates.evidence.contrast is source, and no teacher edits; choose prompt or null",
    ),
    (
        lambda r: r.gates.skills is not None and r.gates.skills.critical and r.rollout.steps < 2,
        "gates.skills.critical compares steps of a rollout, and rollout.steps is 1; give two or more",
    ),
    # contrast
    (
        lambda r: r.contrast and r.objective == "supervised",
        "contrast moves a teacher's velocity, and objective supervised asks no teacher; leave it out",
    ),
    (
        lambda r: r.contrast and r.gates.on,
        "contrast moves the targets that gates weigh, which was never tried; keep one of the two",
    ),
    # batches
    (
        lambda r: r.rows_at_once < r.group_size,
        "micro_batch {r.micro_batch} splits the rollouts of one sample, {group_key} {r.group_size}; raise it",
    ),
    # validation and monitor
    (
        lambda r: r.validation.decides and not r.validation.every,
        "validation.{r.validation.decides} needs validation, and validation.every is 0; set it, such as 100",
    ),
    (
        lambda r: r.monitor.rollback and not r.monitored_every,
        "monitor.rollback is {r.monitor.rollback}, and nothing is monitored; set monitor.every, such as 100",
    ),
    (
        lambda r: r.monitor.rollback == "plain" and not (r.gates.on or r.moves_targets or r.objective == "nft"),
        "monitor.rollback plain goes on without gates, contrast and rewards, and none is on; give stop",
    ),
)


def check_call(call: dict[str, Any]) -> dict[str, Any]:
    """The settings of a pipeline call, unchanged; ValueError for a number that no call takes."""
    for key, value in call.items():
        kinds, kind = ((int, float), "a number") if key == "guidance_scale" else ((int,), "a whole number")
        most = CALL_MOST.get(key, 2**14)
        if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value <= most:
            raise ValueError(f"{key} is {shown(value)}; it must be {kind} greater than 0 and at most {most:g}")
    return call


def check(recipe: Recipe) -> None:
    """ValueError with the first fault's sentence."""
    for sentence in (*_names(recipe), *_table(recipe)):
        raise ValueError(sentence)


def fault_of_quantised(recipe: Recipe) -> str | None:
    """Why a merge on a quantised base is refused, whoever quantised it; None where it is not."""
    return next(iter(_table(recipe, OF_QUANTISED)), None)


def _table(recipe: Recipe, checks: tuple[Check, ...] = CHECKS) -> Iterator[str]:
    group_key = {"flowopd": "flowopd.group", "nft": "nft.group"}.get(recipe.objective, "gates.group")
    for wrong, sentence in checks:
        if wrong(recipe):
            yield sentence.format(r=recipe, n_teachers=len(recipe.teachers), group_key=group_key)


def _names(recipe: Recipe) -> Iterator[str]:
    """Faults of names, whose sentences say which."""
    names = [teacher.name for teacher in recipe.teachers]
    for name in names:
        if names.count(name) > 1:
            yield f"two teachers are named {name!r}; give each its own name"
        if name in TAKEN:
            yield f"a teacher may not be named {name!r}, which means something else; rename it"
    for teacher in recipe.teachers:
        if teacher.capability == "generation" and teacher.columns and (
            teacher.columns.source or teacher.columns.instruction
        ):
            key = "source" if teacher.columns.source else "instruction"
            yield f"teacher {teacher.name!r} draws from prompts, so columns.{key} has no meaning; leave it out"
        if teacher.negative is not None and teacher.guidance is None:
            yield (
                f"teacher {teacher.name!r} has a negative prompt and no guidance; give it guidance, such as 3.5"
            )
        if teacher.trigger is not None and teacher.adapter == "base":
            yield f"teacher {teacher.name!r} is the bare base, which no trigger asks for; leave trigger out"
    asked: dict[tuple[str, str], str] = {}
    for teacher in recipe.teachers:
        if teacher.trigger is not None:
            other = asked.setdefault((teacher.capability, teacher.trigger.lower()), teacher.name)
            if other != teacher.name:
                yield (
                    f"teachers {other!r} and {teacher.name!r} have one trigger, {teacher.trigger!r}, so one prompt "
                    "would ask for both; give each its own"
                )
    weights = {"routing.weights": recipe.routing.weights, "student.init_weights": recipe.student.init_weights}
    for key, given in weights.items():
        for name in given:
            if name not in names:
                yield f"{key} names {name!r}, which is no teacher{did_you_mean(name, names)}"
    capabilities = list(dict.fromkeys(teacher.capability for teacher in recipe.teachers))
    for key, contrast in recipe.contrast.items():
        if key not in (*names, *capabilities):
            yield f"contrast.{key} is no teacher and no capability{did_you_mean(key, [*names, *capabilities])}"
        if contrast.reference not in (*REFERENCES, *names):
            hint = did_you_mean(contrast.reference, [*REFERENCES, *names])
            yield f"contrast.{key}.reference is {contrast.reference!r}{hint}"
    for teacher in recipe.teachers:
        if teacher.field_options and teacher.field is None:
            yield f"teacher {teacher.name!r} has field_options and no field; name the plug-in that takes them"
        moved = recipe.contrast_of(teacher)
        if moved is not None and moved.reference == teacher.name:
            yield f"contrast of teacher {teacher.name!r} has itself as its reference; name another, or weaker"
        if moved is not None and moved.reference == "source" and teacher.capability != "editing":
            yield f"contrast of teacher {teacher.name!r} has reference source, and it edits no source; choose prompt"
        if moved is not None and moved.reference in ("base", "weaker") and teacher.adapter == "base":
            yield f"contrast of teacher {teacher.name!r} has the base as reference, which it is itself; leave it out"
        if moved is not None and moved.reference != "weaker" and moved.strength != 0.5:
            yield f"contrast of teacher {teacher.name!r} has a strength, which is of reference weaker; leave it out"
    for name, reward in recipe.nft.rewards.items():
        if isinstance(reward, Likelihood) and reward.teacher not in (None, "base", *names):
            hint = did_you_mean(reward.teacher, ["base", *names])
            yield f"nft.rewards.{name}.teacher is {reward.teacher!r}, which is no teacher{hint}"
    for teacher in recipe.teachers if recipe.objective == "nft" else ():
        if not recipe.nft.applying(teacher.capability):
            yield (
                f"nft.rewards has {' and '.join(recipe.nft.rewards)}, which say nothing of pictures without a source, "
                f"and teacher {teacher.name!r} draws such; add likelihood"
            )
    if recipe.family is not None:
        from danceopd.pipelines.registry import BUILTIN  # late: it imports torch

        try:
            check_name("family", recipe.family, BUILTIN)
        except UserError as error:
            yield f"family: {error}"
    if recipe.output.exists() and not recipe.output.is_dir():
        yield f"output {recipe.output} is a file; name a folder"


class Plugged(NamedTuple):
    """A plug-in of a kind, and the options that the recipe gives it."""

    kind: str
    name: str
    options: Mapping[str, Any] = {}


def plugged(recipe: Recipe) -> list[Plugged]:
    """Every plug-in that a recipe names and a merge of it uses, each once."""
    found = []
    if recipe.family is not None:
        from danceopd.pipelines.registry import BUILTIN  # late: it imports torch

        found += [Plugged("family", recipe.family)] if recipe.family not in BUILTIN else []
    if recipe.objective not in OBJECTIVES:
        found.append(Plugged("objective", recipe.objective, recipe.objective_options))
    if recipe.query.law not in LAWS:
        found.append(Plugged("query law", recipe.query.law, recipe.query.law_options))
    if recipe.student.init == "blend" and recipe.student.init_method not in BLENDS:
        found.append(Plugged("blend method", recipe.student.init_method))
    found += [Plugged("teacher field", t.field, t.field_options) for t in recipe.teachers if t.field is not None]
    rewards = recipe.nft.rewards.items()
    found += [Plugged("reward", name, part.options) for name, part in rewards if isinstance(part, OwnReward)]
    return found + [Plugged("callback", name, options) for name, options in recipe.callbacks.items()]
