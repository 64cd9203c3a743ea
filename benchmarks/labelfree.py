"""Do the label-free gates help? Each alone and all together against plain DanceOPD, at equal teacher forwards and time.

    python benchmarks/labelfree.py                                   # everything: some hours on one core
    python benchmarks/labelfree.py --arms evidence,skills --ranks 4 --seeds 5 --teachers noisy

Every arm is merged from the same init on the shipped teachers, for each rank and seed, with clean teachers and with a
bad one, and scored on validation prompts and edits in latent space (benchmarks/recipes.py). A gate queries its teachers
more often, so plain DanceOPD is also run for as many updates as cost the same teacher forwards, counted row by row
while they happen; plain at equal seconds is interpolated between the plain runs. Differences are paired by seed;
intervals are 95 % of Student's t over seeds. Finished runs are kept, one line each; it can be interrupted and started
again.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from danceopd.adapters.blend import blend
from danceopd.adapters.read import read_adapter
from danceopd.adapters.write import write_adapter
from danceopd.common.console import format_seconds
from danceopd.common.system import describe_machine
from danceopd.engine.trainer import EMA, STUDENT
from danceopd.merge import merge
from danceopd.models.base import base_folder, empty_transformer
from danceopd.models.fields import AdapterField, MergedField
from danceopd.models.lora import Adapter
from danceopd.recipe.recipe import Recipe
from recipes import RESULTS, LatentEvaluator

PLAIN = "plain"
ARMS: dict[str, dict[str, Any]] = {
    "evidence": {"evidence": True},
    "evidence, alpha<0": {"evidence": {"alpha": -0.5}},
    "consensus": {"consensus": True},
    "skills": {"skills": True},
    "all": {"evidence": True, "consensus": True, "skills": True},
    "evidence, rows only": {"evidence": {"tokens": 0.0}},
    "evidence, tokens only": {"evidence": {"alpha": 0.0}},
    "evidence, groups": {"evidence": True, "group": 4},
}
"""The recipe's `gates` of each arm; the first five by default."""
ARM_NAMES = [name.replace(", ", " ") for name in ARMS]
"""The arms as `--arms` takes them, without commas."""
SCALE, NOISE = 0.6, 1.0
TEACHERS = {
    "clean": "the shipped teachers",
    "weak": f"the generation teacher at strength {SCALE:g}: wrong everywhere by the same factor",
    "noisy": f"normal noise of {NOISE:g} standard deviations on each tensor of the editing teacher: no better than the "
    "base, and wrong in places",
}
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Student's t at 97.5 %, for 1 to 10 degrees of freedom."""


@dataclass(frozen=True)
class Run:
    """One merge; `steps` updates of `batch` rows."""

    teachers: str
    rank: int
    arm: str
    seed: int
    steps: int
    batch: int
    items: int


@dataclass(frozen=True)
class Result:
    """What one merge cost (teacher forwards in rows, seconds of the updates and of the whole) and scored."""

    forwards: int
    seconds: float
    whole: float
    generation: float
    editing: float


@contextmanager
def counted_rows() -> Iterator[Counter[str]]:
    """Inside, counts the rows of every forward without a gradient, by the name of the adapter that makes it."""
    rows: Counter[str] = Counter()
    calls = {kind: kind.__call__ for kind in (AdapterField, MergedField)}

    def counting(call: Callable[..., Any]) -> Callable[..., Any]:
        def count(field: Any, x: Any, sigma: Any, condition: Any) -> Any:
            rows[field.name or "base"] += len(x)
            return call(field, x, sigma, condition)

        return count

    for kind, call in calls.items():
        kind.__call__ = counting(call)  # type: ignore[method-assign]
    try:
        yield rows
    finally:
        for kind, call in calls.items():
            kind.__call__ = call  # type: ignore[method-assign]


def noisy(adapter: Adapter) -> Adapter:
    """The adapter with normal noise of `NOISE` standard deviations on each tensor."""
    generator = torch.Generator().manual_seed(0)

    def with_noise(t: torch.Tensor) -> torch.Tensor:
        return t + NOISE * t.std() * torch.randn(t.shape, generator=generator)

    return Adapter({module: (with_noise(a), with_noise(b)) for module, (a, b) in adapter.tensors.items()})


def teachers_of(kind: str, work: Path) -> list[dict[str, Any]]:
    """A recipe's `teachers` for a kind of `TEACHERS`."""
    made: list[dict[str, Any]] = [{"name": c, "adapter": c, "capability": c} for c in ("generation", "editing")]
    if kind == "weak":
        made[0] |= {"scale": SCALE}
    if kind == "noisy":
        base = base_folder(Recipe().base)
        editing = read_adapter(Recipe().teachers[1].adapter, empty_transformer(base))
        write_adapter(noisy(editing), work / "noisy")
        made[1] |= {"adapter": str(work / "noisy")}
    return made


def recipe_of(run: Run, teachers: list[dict[str, Any]], output: Path) -> Recipe:
    """The shipped demo's recipe with the gates, rank, updates and seed of `run`; no monitor, no validation."""
    return Recipe(
        teachers=teachers,
        output=output,
        steps=run.steps,
        batch=run.batch,
        seed=run.seed,
        student={"rank": run.rank, "init": "blend", "init_weights": {"generation": 0.7, "editing": 0.9}},
        optimizer={"lr": 1e-3, "warmup": 10, "schedule": "cosine"},
        ema=0.98,
        rollout={"steps": 5},
        query={"law": "high-noise"},
        data={"rows": 512},
        gates=ARMS.get(run.arm, {}),
        monitor={"every": 0},
        validation={"every": 0},
        samples={"every": 0, "count": 1},
        save_every=run.steps,
        keep_last=1,
    )


def measure(run: Run, teachers: list[dict[str, Any]], evaluate: LatentEvaluator) -> Result:
    """Merge and score."""
    began, times = time.monotonic(), [0.0]
    with tempfile.TemporaryDirectory() as folder, counted_rows() as counted:
        student = merge(recipe_of(run, teachers, Path(folder) / "run"), lambda *_: times.append(time.monotonic()))
        scores = evaluate(read_adapter(student.folder))
    forwards = sum(rows for name, rows in counted.items() if name not in (STUDENT, EMA))
    seconds = statistics.median(b - a for a, b in zip(times[1:], times[2:])) if run.steps > 1 else 0.0
    return Result(forwards, round(seconds * run.steps, 2), round(time.monotonic() - began, 2), *scores)


def wanted(grid: Sequence[Run], done: dict[Run, Result]) -> list[Run]:
    """The runs of the grid, with plain for as many updates as cost each arm's teacher forwards, once those are known.

    Teacher forwards are a function of the recipe and hardly of the seed: the first seed's are taken.
    """
    found: dict[Run, None] = {}
    for run in grid:
        plain = Run(**{**asdict(run), "arm": PLAIN})
        found |= dict.fromkeys((plain, run))
        first = Run(**{**asdict(run), "seed": min(r.seed for r in grid)})
        if first in done and (same := Run(**{**asdict(first), "arm": PLAIN})) in done:
            steps = round(run.steps * done[first].forwards / done[same].forwards)
            found[Run(**{**asdict(plain), "steps": steps})] = None
    return list(found)


# -- the table ------------------------------------------------------------------------------------------------


Interval = tuple[float, float | None, float | None]
"""A mean and the ends of its 95 % interval."""


def interval(differences: Sequence[float]) -> Interval:
    """Mean and its 95 % interval; one seed has none."""
    mean = statistics.mean(differences)
    if len(differences) < 2:
        return mean, None, None
    t = T975[len(differences) - 2] if len(differences) - 2 < len(T975) else 1.96
    half = t * statistics.stdev(differences) / len(differences) ** 0.5
    return mean, mean - half, mean + half


def at_seconds(points: Sequence[tuple[float, float]], seconds: float) -> float:
    """A score at `seconds`, on straight lines through (seconds, score); beyond the last point, that point's."""
    points = sorted(points)
    for (t0, a), (t1, b) in zip(points, points[1:]):
        if t0 <= seconds <= t1:
            return a + (b - a) * (seconds - t0) / (t1 - t0) if t1 > t0 else b
    return points[0][1] if seconds < points[0][0] else points[-1][1]


def rows_of(grid: Sequence[Run], done: dict[Run, Result]) -> list[dict[str, Any]]:
    """One row an arm: what it cost, what it scored, and its differences to plain at equal cost (see `_against`)."""
    rows: list[dict[str, Any]] = []
    cells = dict.fromkeys((run.teachers, run.rank) for run in grid)
    for teachers, rank in cells:
        here = {r: d for r, d in done.items() if (r.teachers, r.rank) == (teachers, rank)}
        arms = dict.fromkeys(r.arm for r in grid if (r.teachers, r.rank) == (teachers, rank))
        base = next(r for r in grid if (r.teachers, r.rank) == (teachers, rank))
        lengths = sorted({r.steps for r in here if r.arm == PLAIN})
        for arm, steps in [*((PLAIN, n) for n in lengths), *((a, base.steps) for a in arms)]:
            runs = {r.seed: d for r, d in here.items() if (r.arm, r.steps) == (arm, steps)}
            if not runs:
                continue
            row: dict[str, Any] = {"teachers": teachers, "rank": rank, "arm": arm, "steps": steps, "seeds": len(runs)}
            for name in ("forwards", "seconds", "generation", "editing"):
                row[name] = statistics.mean(getattr(d, name) for d in runs.values())
            if arm != PLAIN:
                row |= _against(here, runs, row["forwards"], base.steps)
            rows.append(row)
    return rows


def _against(here: dict[Run, Result], runs: dict[int, Result], forwards: float, steps: int) -> dict[str, Any]:
    """Differences to plain: with as many teacher forwards, in as many seconds, after as many updates."""
    found: dict[str, Any] = {}
    plain = {(r.seed, r.steps): d for r, d in here.items() if r.arm == PLAIN}
    matched = min({n for _, n in plain}, key=lambda n: abs(n - _steps_for(forwards, plain)), default=steps)
    for name in ("generation", "editing"):
        ways: dict[str, list[float]] = {"forwards": [], "seconds": [], "updates": []}
        for seed, result in runs.items():
            own = {n: d for (s, n), d in plain.items() if s == seed}
            score = getattr(result, name)
            if matched in own:
                ways["forwards"].append(score - getattr(own[matched], name))
            if steps in own:
                ways["updates"].append(score - getattr(own[steps], name))
                points = [(d.seconds, getattr(d, name)) for d in own.values()]
                ways["seconds"].append(score - at_seconds(points, result.seconds))
        found |= {f"{name} at equal {way}": interval(values) for way, values in ways.items() if values}
    return found


def _steps_for(forwards: float, plain: dict[tuple[int, int], Result]) -> float:
    """The updates in which plain makes as many teacher forwards."""
    rates = [d.forwards / steps for (_, steps), d in plain.items()]
    return forwards / statistics.mean(rates) if rates else 0.0


def report(rows: Sequence[dict[str, Any]], references: dict[str, tuple[float, float]], grid: Sequence[Run]) -> str:
    """The table in Markdown."""
    first = grid[0]
    lines = [
        f"{first.steps} updates of {first.batch} rows, {first.items} validation prompts and as many edits, "
        f"{len({r.seed for r in grid})} seeds; {describe_machine()}, torch {torch.__version__}.",
        "",
        "Differences are to plain DanceOPD, in points, paired by seed, with the 95 % interval of Student's t: to plain "
        "with as many teacher forwards (more updates), and to plain in as many seconds of updates.",
        "",
    ]
    lines += [f"- {kind}: {TEACHERS[kind]}" for kind in dict.fromkeys(r.teachers for r in grid)]
    lines += ["", "| | generation | editing, exact |", "|---|---|---|"]
    lines += [f"| {name} | {correct:.3f} | {exact:.3f} |" for name, (correct, exact) in references.items()]
    lines += [
        "",
        "| teachers | rank | arm | updates | teacher forwards | s | generation | editing, exact "
        "| generation, equal forwards | editing, equal forwards | generation, equal s | editing, equal s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ways = [f"{name} at equal {way}" for way in ("forwards", "seconds") for name in ("generation", "editing")]
        cells = [_points(row[way]) if way in row else "" for way in ways]
        lines.append(
            f"| {row['teachers']} | {row['rank']} | {row['arm']} | {row['steps']} | {row['forwards']:.0f} "
            f"| {row['seconds']:.0f} | {row['generation']:.3f} | {row['editing']:.3f} | {' | '.join(cells)} |"
        )
    return "\n".join(lines) + "\n"


def _points(found: Interval) -> str:
    """`+1.2 (-0.3 to +2.7)`, bold where the interval leaves out 0."""
    mean, low, high = found
    if low is None or high is None:
        return f"{100 * mean:+.1f} (one seed)"
    clear = "**" if low > 0 or high < 0 else ""
    return f"{clear}{100 * mean:+.1f}{clear} ({100 * low:+.1f} to {100 * high:+.1f})"


# -- running --------------------------------------------------------------------------------------------------


def read_lines(path: Path) -> dict[Run, Result]:
    """The finished runs of a .jsonl file; a line that was cut short is left out."""
    done = {}
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            facts = json.loads(line)
            done[Run(**facts["run"])] = Result(**facts["done"])
        except (ValueError, KeyError, TypeError):
            continue
    return done


def time_left(todo: Sequence[Run], done: dict[Run, Result]) -> str:
    """How long the runs will take, by the seconds of an update in finished runs of their arm."""
    seconds: dict[str, list[float]] = {}
    for run, found in done.items():
        for name in (run.arm, ""):
            seconds.setdefault(name, []).append(found.whole / run.steps)
    if not seconds:
        return "…"
    return format_seconds(sum(run.steps * statistics.mean(seconds.get(run.arm, seconds[""])) for run in todo))


def references_of(
    kinds: Sequence[str], teachers: dict[str, list[dict[str, Any]]], evaluate: LatentEvaluator
) -> dict[str, Any]:
    """Scores of the base, the teachers of each kind and their blend: every student's init, at full rank."""
    base = empty_transformer(base_folder(Recipe().base))
    found: dict[str, Any] = {"base": evaluate(None)}
    for kind in kinds:
        adapters = {}
        for teacher in Recipe(teachers=teachers[kind]).teachers:
            adapters[teacher.name] = blend([read_adapter(teacher.adapter, base)], [teacher.scale])
            found[f"{teacher.name} teacher, {kind}"] = evaluate(adapters[teacher.name])
        found[f"blend, {kind}"] = evaluate(blend([adapters["generation"], adapters["editing"]], [0.7, 0.9]))
    return found


def main(
    arms: Annotated[str, typer.Option(help=f"Of {'; '.join(ARM_NAMES)}.")] = ",".join(ARM_NAMES[:5]),
    ranks: Annotated[str, typer.Option(help="LoRA ranks of the students.")] = "4,32",
    teachers: Annotated[str, typer.Option(help=f"Of {', '.join(TEACHERS)}.")] = "clean,noisy",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each arm.")] = 3,
    steps: Annotated[int, typer.Option(min=2, help="Updates of each arm; plain gets as many, and more.")] = 80,
    batch: Annotated[int, typer.Option(min=4, help="Batch size of an update.")] = 16,
    items: Annotated[int, typer.Option(min=6, help="Validation prompts, and as many edits.")] = 192,
    threads: Annotated[int, typer.Option(min=1, help="Of torch.")] = 1,
    name: Annotated[str, typer.Option(help="Written to benchmarks/results/NAME.md, .json and .jsonl.")] = "labelfree",
) -> None:
    """Merge and score the runs that are not finished yet, and write the table after every run."""
    torch.set_num_threads(threads)
    known = dict(zip(ARM_NAMES, ARMS, strict=True))
    chosen = [known.get(arm.strip(), arm.strip()) for arm in arms.split(",")]
    kinds = [kind.strip() for kind in teachers.split(",")]
    for one, there in [*((arm, list(ARMS)) for arm in chosen), *((kind, list(TEACHERS)) for kind in kinds)]:
        if one not in there:
            raise typer.BadParameter(f"{one!r} is none of {'; '.join(there)}")
    widths = [int(rank) for rank in ranks.split(",")]
    grid = [
        Run(kind, rank, arm, seed, steps, batch, items)
        for seed in range(seeds) for kind in kinds for rank in widths for arm in chosen
    ]  # fmt: skip
    console, path = Console(), RESULTS / f"{name}.jsonl"
    RESULTS.mkdir(exist_ok=True)
    evaluate, done = LatentEvaluator(base_folder(Recipe().base), items), read_lines(path)
    with tempfile.TemporaryDirectory() as work:
        made = {kind: teachers_of(kind, Path(work)) for kind in kinds}
        references = references_of(kinds, made, evaluate)
        write(name, grid, done, references)
        while todo := [run for run in wanted(grid, done) if run not in done]:
            run = todo[0]
            found = done[run] = measure(run, made[run.teachers], evaluate)
            with open(path, "a") as file:
                file.write(json.dumps({"run": asdict(run), "done": asdict(found)}) + "\n")
            write(name, grid, done, references)
            known_runs = len(wanted(grid, done))
            console.print(
                f"{known_runs - len(todo) + 1}/{known_runs}  {run.teachers}, rank {run.rank}, {run.arm}, "
                f"{run.steps} updates, seed {run.seed}: {found.generation:.3f} {found.editing:.3f}, "
                f"{found.whole:.0f} s; {time_left(todo[1:], done)} left",
                highlight=False,
            )


def write(name: str, grid: Sequence[Run], done: dict[Run, Result], references: dict[str, tuple[float, float]]) -> None:
    """`NAME.md` and `NAME.json`, of the runs that are finished so far."""
    finished = {run: done[run] for run in wanted(grid, done) if run in done}
    rows = rows_of(grid, finished)
    facts = {"machine": describe_machine(), "torch": torch.__version__, "references": references, "rows": rows}
    (RESULTS / f"{name}.json").write_text(json.dumps(facts, indent=1) + "\n")
    (RESULTS / f"{name}.md").write_text(report(rows, references, grid))


if __name__ == "__main__":
    typer.run(main)
