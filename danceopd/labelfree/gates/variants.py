"""A teacher's rows under other conditions, as data that is encoded like any other: paraphrases, or degraded sources.

Which rows need which variant is a function of the recipe, so it is known, checked and encoded before a weight is
loaded, and what cannot be made is refused by name. A variant has the rows of its data, under the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from danceopd.data.dataset import TeacherData, Variant
from danceopd.data.degrade import degrade
from danceopd.data.images import ImageSource, Sources, each_source, flattened, open_image
from danceopd.data.routing import draws_all, sample_batch
from danceopd.data.sources import Edits, Prompts
from danceopd.errors import UserError
from danceopd.labelfree.gates.skills import draw_critical
from danceopd.recipe.labelfree import Consensus, Gates, Skills
from danceopd.recipe.parts import Teacher
from danceopd.recipe.sampling import Sampling
from danceopd.worlds.scenes.paraphrase import expanded, paraphrases

PARAPHRASE, EXPANDED, DEGRADED, KEEP = "paraphrase ", "expanded", "degraded ", "keep"
"""Names of variants: "paraphrase 1" and so on, "degraded blur" and so on; the others stand alone."""
KEEP_PROMPT = "keep the picture as it is"
"""What an edit is contrasted with where a family reads its null prompt together with the source."""


class Reworded(Prompts):
    """The rows of `data` with other `prompts`, by row; only these rows can be read."""

    def __init__(self, data: Prompts, prompts: Mapping[int, str]) -> None:
        super().__init__(data.table, data.named)
        self._prompts = prompts

    def _item(self, row: int, cells: Any) -> Any:
        return self._prompts[row]


class RewordedEdits(Edits):
    """The same for edits: the source images stay."""

    def __init__(self, data: Edits, prompts: Mapping[int, str]) -> None:
        super().__init__(data.table, data.named)
        self._prompts = prompts

    def _item(self, row: int, cells: Any) -> tuple[str, Sources]:
        return self._prompts[row], super()._item(row, cells)[1]


class Degraded(Edits):
    """The rows of `data` with degraded source images: one kind of degradation, its strength drawn for each row."""

    def __init__(self, data: Edits, kind: str, seed: int) -> None:
        super().__init__(data.table, data.named)
        self._kind, self._seed = kind, seed

    def _item(self, row: int, cells: Any) -> tuple[str, Sources]:
        prompt, given = super()._item(row, cells)
        worse: list[ImageSource] = [
            degrade(flattened(open_image(one, self.where(row), alpha=self.alpha)), self._kind, self._seed + row)
            for one in each_source(given)
        ]
        return prompt, worse if len(worse) > 1 else worse[0]


def with_variants(
    gates: Gates, sampling: Sampling, rollout_steps: int, teachers: Sequence[Teacher],
    datasets: Mapping[str, TeacherData], captions: bool = False,
) -> dict[str, TeacherData]:  # fmt: skip
    """The teachers' data with the variants that the gates need, and with longer `captions` (nft.contexts).

    UserError where there would be none.
    """
    if captions:
        longer = {t.name: longer_captions(datasets[t.name]) for t in teachers}
        if not any(longer.values()):
            raise UserError(
                "nft.contexts has caption, and no row of the data has a longer caption; add a column `expanded`, or "
                "leave caption out"
            )
        return {
            name: replace(data, variants={EXPANDED: reworded(data.data, longer[name])} if longer[name] else {})
            for name, data in datasets.items()
        }
    if not gates.on:
        return dict(datasets)
    found = {t.name: _variants(gates, t, datasets[t.name]) for t in teachers}
    for (name, variant), made in _degraded(gates.skills, sampling, rollout_steps, datasets).items():
        found[name][variant] = made
    return {name: replace(data, variants=found[name]) for name, data in datasets.items()}


def _variants(gates: Gates, teacher: Teacher, dataset: TeacherData) -> dict[str, Variant]:
    mine, sampled, found = dataset.data, sorted(dataset.rows), dict[str, Variant]()
    if gates.consensus is not None:
        found |= _paraphrased(teacher.name, mine, sampled, gates.consensus)
    skills = gates.skills
    context = None if skills is None or not skills.eta else skills.privileged(teacher.capability)
    if context is not None and "caption" in (context.step, context.episode):
        prompts = longer_captions(dataset)
        if not prompts:
            key = f"gates.skills.{teacher.capability}." + ("step" if context.step == "caption" else "episode")
            raise UserError(
                f"{key} is caption, and no row of {mine.table.path} (teacher {teacher.name!r}) has a longer "
                f"caption; add a column `expanded`, or set {key}: none"
            )
        found[EXPANDED] = reworded(mine, prompts)
    return found


def longer_captions(dataset: TeacherData) -> dict[int, str]:
    """Longer captions of a teacher's rows, by row: of the data, or the synthetic scenes' own."""
    data = dataset.data
    found = {row: data.expanded(row) or expanded(data.prompt(row)) for row in sorted(dataset.rows)}
    return {row: caption for row, caption in found.items() if caption}


def unchanged(data: Prompts, rows: Iterable[int]) -> Variant:
    """The rows with a prompt that asks to change nothing."""
    return reworded(data, dict.fromkeys(rows, KEEP_PROMPT))


def reworded(data: Prompts, prompts: Mapping[int, str]) -> Variant:
    """`data` with other prompts for some rows."""
    made = RewordedEdits(data, prompts) if isinstance(data, Edits) else Reworded(data, prompts)
    return made, sorted(prompts)


def other_prompts(data: Prompts, row: int) -> list[str]:
    """Paraphrases of a row's prompt, each once: those of its data, else those of a rule."""
    own = data.prompt(row)
    return [prompt for prompt in dict.fromkeys(data.paraphrases(row) or paraphrases(own)) if prompt != own]


def _paraphrased(name: str, data: Prompts, rows: Sequence[int], options: Consensus) -> dict[str, Variant]:
    prompts: list[dict[int, str]] = [{} for _ in range(options.framings - 1)]
    for row in rows:
        for place, prompt in zip(prompts, other_prompts(data, row)):
            place[row] = prompt
    if not prompts[0]:
        raise UserError(
            f"gates.consensus needs paraphrases, and no row of {data.table.path} (teacher {name!r}) has any; add a "
            "column `paraphrases`, or leave the gate out"
        )
    return {f"{PARAPHRASE}{i}": reworded(data, some) for i, some in enumerate(prompts, start=1) if some}


def _degraded(
    options: Skills | None, sampling: Sampling, rollout_steps: int, datasets: Mapping[str, TeacherData]
) -> dict[tuple[str, str], Variant]:
    """The rows whose students will see a degraded source, by teacher and name of the variant."""
    if options is None or not options.eta or options.editing.step != "source":
        return {}
    names, data = list(datasets), [one.data for one in datasets.values()]
    lengths = [len(one) for one in data]
    wanted: dict[tuple[int, str], set[int]] = {}
    edits = [m for m, one in enumerate(data) if isinstance(one, Edits)]
    each = options.critical / len(options.degrade)
    every = all(draws_all(sampling, sampling.shares[m] * each, lengths[m]) for m in edits)
    if every:
        wanted = {(m, kind): set(range(lengths[m])) for m in edits for kind in options.degrade}
    for step in range(0 if every else sampling.steps):
        teachers, samples = sample_batch(sampling, step, lengths)
        drawn = draw_critical(sampling.seed, step, sampling.groups_per_step, rollout_steps, options)
        for g in drawn.critical.nonzero()[0]:
            wanted.setdefault((teachers[g], options.degrade[drawn.kind[g]]), set()).add(samples[g])
    return {
        (names[m], DEGRADED + kind): (Degraded(one, kind, sampling.seed), sorted(rows))
        for (m, kind), rows in wanted.items()
        if isinstance(one := data[m], Edits)
    }
