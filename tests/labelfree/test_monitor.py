"""The watch: its figures, a planted confident mistake that it rings for, and runs that it must not change."""

import json
import math
from contextlib import suppress

import numpy as np
import pytest
import torch
from flows import Gaussian, shifted
from safetensors.torch import load_file
from test_distributed import check, launch
from tiny import random_adapter, tiny_klein
from torch import nn
from torchmetrics.functional import spearman_corrcoef

from danceopd.adapters.read import read_adapter
from danceopd.adapters.write import write_adapter
from danceopd.engine.rollout import rollout
from danceopd.errors import UserError
from danceopd.labelfree import monitor as watch_module
from danceopd.labelfree.monitor import Watch
from danceopd.labelfree.probes import AGREEMENT, CONSENSUS, Held, Panel
from danceopd.labelfree.statistics import Interval, Limits, Seen, alarms, mistakes, quarter, spearman, spread
from danceopd.merge import merge
from danceopd.recipe.labelfree import Watch as Knobs
from danceopd.recipe.recipe import Recipe

# -- figures ----------------------------------------------------------------------------------------------


def test_ties_share_what_is_left_of_a_quarter():
    assert quarter(np.array([4.0, 1, 3, 2, 8, 7, 6, 5])).tolist() == [0, 1, 0, 1, 0, 0, 0, 0]
    assert quarter(np.array([0.0, 0, 0, 0, 1, 1, 1, 1])).tolist() == [0.5] * 4 + [0] * 4
    assert quarter(np.array([0.0, 1, 1, 1, 1, 2])).tolist() == [1, *[0.125] * 4, 0]
    assert quarter(np.ones((2, 5))).sum(-1).tolist() == [1.25, 1.25]


def test_rate_of_confident_mistakes_is_a_quarter_by_chance():
    numbers = np.random.default_rng(0)
    score = numbers.random((40, 4))
    assert mistakes([(-score, score)]).value == 1 and mistakes([(score, score)]).value == 0
    chance = mistakes([(numbers.random((40, 4)), score), (numbers.random((10, 4)), score[:10])])
    assert chance.low < 0.25 < chance.high and abs(chance.value - 0.25) < 0.1
    constant = mistakes([(numbers.random((40, 4)), np.ones((40, 4)))])
    assert (constant.value, constant.low, constant.high) == pytest.approx((0.25, 0.25, 0.25))


def test_seeds_of_one_prompt_are_one_witness():
    """The same four rows four times over are no narrower an interval; sixteen prompts are."""
    numbers = np.random.default_rng(1)
    confidence, score = numbers.random((16, 1)), numbers.random((16, 1))
    one = mistakes([(confidence, score)])
    many = mistakes([(confidence.repeat(16, 1), score.repeat(16, 1))])
    assert many.high - many.low == pytest.approx(one.high - one.low, rel=0.2)
    apart = mistakes([(confidence.repeat(16, 0), score.repeat(16, 0))])
    assert apart.high - apart.low < 0.5 * (one.high - one.low)


def test_rank_correlation_is_spearman_s():
    numbers = np.random.default_rng(2)
    confidence, score = numbers.integers(0, 9, (20, 3)).astype(float), numbers.integers(0, 3, (20, 3)).astype(float)
    wanted = spearman_corrcoef(torch.tensor(confidence.ravel()), torch.tensor(score.ravel()))
    found = spearman([(confidence, score)])
    assert found.value == pytest.approx(float(wanted), abs=1e-6) and found.low < found.value < found.high
    assert spearman([(confidence, np.ones((20, 3)))]).value == 0


def test_spread():
    same = torch.tensor([[1.0, 2], [2, 4], [0, 3], [0, 1]])
    assert spread(same, 2) == pytest.approx(0, abs=1e-6)
    assert spread(torch.tensor([[1.0, 0], [0, 1], [1, 0], [-1, 0]]), 2) == pytest.approx((1 + 2) / 2)


FINE = (Interval(0.2, 0.1, 0.3), Interval(0.3, 0.1, 0.5))
CHECK = Seen(0.5, {"trust": 0.5}, 1.0, 1.0, [0.5, 0.5])


def rung(checks=(CHECK,), beliefs=None, share=None):
    return alarms(Limits(), beliefs or {"trust": FINE}, {"editing": checks}, share)


def seen(**fields):
    return Seen(**{**vars(CHECK), **fields})


def test_limits():
    assert not rung() and not rung(share=0.5)
    assert "surest of, 40% is among the worst (30% to 50%" in rung(beliefs={"t": (Interval(0.4, 0.3, 0.5), FINE[1])})[0]
    assert "rank correlation -0.30" in rung(beliefs={"t": (FINE[0], Interval(-0.3, -0.5, -0.1))})[0]
    assert not rung(beliefs={"t": (Interval(0.4, 0.2, 0.6), Interval(-0.3, -0.7, 0.1))})
    assert "the weights count as 40% of their rows" in rung(share=0.4)[0]
    assert "editing: it heeds its prompt 0.4 times" in rung([CHECK, seen(strength=0.4)])[0]
    assert "heeds its prompt 2.1 times" in rung([CHECK, seen(strength=2.1)])[0]
    assert not rung([seen(strength=0.1), seen(strength=0.4)])  # it began further out
    assert "differ 60% as much as is usual" in rung([seen(diversity=0.6)])[0]
    for name in ("score", "strength", "diversity"):
        assert "not finite" in rung([CHECK, seen(**{name: math.nan})])[0]


def test_divergence_is_three_falls_that_are_no_noise():
    def course(scores, confidence):
        return [
            seen(score=float(np.mean(s)), confidence={"trust": c}, scores=s) for s, c in zip(scores, confidence)
        ]

    falling = [[0.9] * 8, [0.8] * 8, [0.7] * 8, [0.6] * 8]
    assert "trust rose and the score fell 3 checks in a row, by 0.3" in rung(course(falling, [1, 2, 3, 4]))[0]
    assert not rung(course(falling[:3], [1, 2, 3]))
    assert not rung(course(falling, [1, 2, 3, 2.9]))
    noisy = [[0.5, 0.5, 0.5, 0.5], [0.9, 0.1, 0.5, 0.4], [0.1, 0.9, 0.8, 0.0], [0.8, 0.9, 0.0, 0.0]]
    assert not rung(course(noisy, [1, 2, 3, 4]))


# -- a planted confident mistake: two dimensions, eight prompts, one of them drawn on the wrong side ----------

MODES, WIDE, FRAMINGS = 8, 0.5, 4
ANGLE = torch.arange(MODES) * 2 * math.pi / MODES
CENTRES = 2 * torch.stack([ANGLE.cos(), ANGLE.sin()], 1)
WORDS = torch.randn(MODES, 8, generator=torch.Generator().manual_seed(1))


class Prompts:
    """A condition: which prompt each row has, and the words that say so."""

    def __init__(self, mode, words=None):
        self.mode, self.words = mode, WORDS[mode] if words is None else words

    def __len__(self):
        return len(self.mode)

    def rows(self, index):
        return Prompts(self.mode[index], self.words[index])

    def to(self, device=None):
        return self

    def said_otherwise(self, generator):
        return Prompts(self.mode, self.words + 0.3 * torch.randn(self.words.shape, generator=generator))


def exact(x, sigma, condition):
    """The flow of N(centre of the prompt, WIDE²)."""
    slope, _ = Gaussian(0.0, WIDE).line(sigma[:, None])
    centre = CENTRES[condition.mode]
    return slope * x - centre - slope * (1 - sigma[:, None]) * centre


class Student(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(11, 48), nn.SiLU(), nn.Linear(48, 48), nn.SiLU(), nn.Linear(48, 2))

    def forward(self, x, sigma, condition):
        return self.net(torch.cat([x, sigma[:, None], condition.words], 1))


class Near:
    """The judge: how near the middle of its prompt a picture lies."""

    def __call__(self, clean):
        prompt = torch.arange(MODES).repeat(4).repeat_interleave(len(clean) // (4 * MODES))
        return -(clean - CENTRES[prompt]).norm(dim=1)

    def remember(self, clean):
        pass


def panel(live=None):
    """The panel of a consensus gate; `live` is the student itself, asked in place of its frozen teacher."""
    numbers = torch.Generator().manual_seed(3)
    asked = Prompts(torch.arange(MODES).repeat(4))
    framings = [asked, *(asked.said_otherwise(numbers) for _ in range(FRAMINGS - 1))]

    def framed(field, x, sigma, rows):
        answers = torch.stack([(live or field)(x, sigma, one.rows(rows)) for one in framings])
        return answers, torch.ones(answers.shape[:2], dtype=torch.bool)

    noise = torch.randn(len(asked) * 6, 2, generator=numbers)
    other = asked.rows(torch.arange(len(asked)).roll(1))
    held = Held(asked, other, noise, shifted(6, 1.0), Near(), framed)
    return Panel("flow", exact, [held], torch.device("cpu"), 1024)


@pytest.fixture(scope="module")
def mistaken():
    """A student of all prompts, which draws the first one at the opposite side."""
    numbers = torch.Generator().manual_seed(2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        student = Student()
    optimizer = torch.optim.Adam(student.parameters(), 5e-3)
    centres = CENTRES.clone()
    centres[0] *= -1
    for _ in range(500):
        mode, sigma = torch.randint(MODES, (256,), generator=numbers), torch.rand(256, generator=numbers)
        noise = torch.randn(256, 2, generator=numbers)
        clean = centres[mode] + WIDE * torch.randn(256, 2, generator=numbers)
        x = torch.lerp(clean, noise, sigma[:, None])
        loss = (student(x, sigma, Prompts(mode)) - (noise - clean)).square().mean()
        optimizer.zero_grad(), loss.backward(), optimizer.step()
    return student.state_dict()


def course(mistaken, live):
    """What the watch sees of 160 updates, and when it rings."""
    student, numbers, sigmas = Student(), torch.Generator().manual_seed(9), shifted(6, 1.0)
    student.load_state_dict(mistaken)
    optimizer = torch.optim.Adam(student.parameters(), 3e-3)

    @torch.no_grad()
    def field(x, sigma, condition):
        return student(x, sigma, condition)

    watch, rang = Watch(Knobs(), [panel(field if live else None)], "the distance"), []
    watch.check(0, field)
    for step in range(1, 161):
        asked = Prompts(torch.randint(MODES, (64,), generator=numbers))
        stop = torch.randint(0, 6, (64,), generator=numbers)
        x, sigma = rollout(field, torch.randn(64, 2, generator=numbers), sigmas, stop, asked), sigmas[stop]
        if live:
            said = [field(x, sigma, asked.said_otherwise(numbers)) for _ in range(FRAMINGS)]
            target = torch.stack(said).mean(0)
        else:
            target = exact(x, sigma, asked)
        loss = (student(x, sigma, asked) - target).square().mean()
        optimizer.zero_grad(), loss.backward(), optimizer.step()
        if step % 20 == 0:
            watch.check(step, field)
            rang += [step] * bool(watch.ringing)
    return [line["panels"]["flow"] for line in watch._lines], rang


def test_plain_danceopd_mends_the_mistake_in_silence(mistaken):
    lines, rang = course(mistaken, live=False)
    assert not rang
    assert min(lines[0]["scores"][::MODES]) < -2 and min(lines[-1]["scores"]) > -1.2


def test_the_live_self_as_target_rings(mistaken):
    """It loves what it says itself: its own consensus stays high while the pictures go astray, and the watch rings."""
    lines, rang = course(mistaken, live=True)
    assert rang and rang[0] <= 80
    assert lines[-1]["score"] < lines[0]["score"] - 0.5
    assert 0.5 < lines[-1]["confidence"][CONSENSUS] < 0.999  # the exact flow, which reads no words, would say 1
    assert lines[-1]["confidence"][AGREEMENT] < lines[0]["confidence"][AGREEMENT]


# -- runs -----------------------------------------------------------------------------------------------------

WATCHED = {"every": 2, "prompts": 8, "seeds": 2}
WEIGHTS = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    pipe = tiny_klein(folder / "base")
    for i, name in enumerate(("draws", "edits")):
        write_adapter(random_adapter(pipe.transformer, seed=i, size=0.1), folder / name)
    return folder


def recipe(models, output, **fields):
    given = {
        "base": str(models / "base"),
        "generation": str(models / "draws"),
        "editing": str(models / "edits"),
        "output": output,
        "steps": 4,
        "batch": 4,
        "student": {"rank": 4},
        "data": {"rows": 6},
        "samples": {"every": 0, "count": 1},
        "save_every": 2,
        "rollout": {"steps": 3},
        "call": {"height": 64, "width": 64, "steps": 3, "max_sequence_length": 24},
    }
    return Recipe(**{**given, **fields})


def run(models, output, stop=None, **fields):
    """Merge; `stop` ends it after that update, as a kill would."""

    class Stop(Exception):
        pass

    steps = []

    def report(done, total):
        steps.append(done.step)
        if done.step == stop and len(steps) == steps.index(stop) + 1:
            raise Stop

    with suppress(Stop):
        merge(recipe(models, output, **fields), report)
    return steps


def lines_of(folder, name="watch.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def manifest(folder):
    return (folder / "checkpoints" / "step-000004" / "manifest.json").read_text()


@pytest.fixture(scope="module")
def plain(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain") / "run"
    run(models, folder)
    return folder


@pytest.fixture(scope="module")
def watched(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("watched") / "run"
    run(models, folder, watch=WATCHED)
    return folder


def test_a_watched_run_is_the_run(plain, watched):
    """The same student, and the same last checkpoint with all random states."""
    assert (watched / WEIGHTS).read_bytes() == (plain / WEIGHTS).read_bytes()
    assert manifest(watched) == manifest(plain)
    assert not (plain / "watch.jsonl").exists()


def test_what_it_saw_is_written_everywhere(watched):
    checks = lines_of(watched)
    assert [line["step"] for line in checks] == [0, 2, 4]
    assert set(checks[0]["panels"]) == {"generation", "editing"} and set(checks[0]["beliefs"]) == {AGREEMENT}
    whole = json.loads((watched / "watch.json").read_text())
    assert whole["prompts"] == {"generation": 4, "editing": 4} and "exact scorer" in whole["judge"]
    assert len(whole["checks"]) == 3 and "scores" not in whole["checks"][0]["panels"]["editing"]
    logged = {line["step"]: line for line in lines_of(watched, "metrics.jsonl")}
    assert {step for step, line in logged.items() if "watch/alarms" in line} == {0, 2, 4}
    assert "loss" in logged[2] and "watch/score editing" in logged[2]
    assert "judged by the exact scorer" in (watched / "README.md").read_text()


def test_a_gate_is_watched_and_plain_danceopd_is_not():
    assert Recipe().watch.steps(Recipe().gates.on) == 0
    gated = Recipe(gates={"evidence": True})
    assert gated.watch.steps(gated.gates.on) == 100
    assert Recipe(gates={"evidence": True}, watch={"every": 0}).watch.steps(True) == 0


def test_a_continued_run_sees_what_the_whole_run_saw(models, tmp_path, watched):
    run(models, tmp_path / "run", stop=3, watch=WATCHED)
    assert [line["step"] for line in lines_of(tmp_path / "run")] == [0, 2]
    run(models, tmp_path / "run", watch=WATCHED)
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == (watched / WEIGHTS).read_bytes()
    for here, there in zip(lines_of(tmp_path / "run"), lines_of(watched), strict=True):
        assert {**here, "seconds": 0} == {**there, "seconds": 0}


def test_an_alarm_brings_the_first_state_back_and_goes_on_plainly(models, tmp_path, plain, caplog):
    """Gated until the first check, which no state before it passed: what follows is the plain run, to the byte."""
    gates = {"evidence": {"alpha": 1.0}}
    knobs = {**WATCHED, "diversity": 9.0, "rollback": "plain"}
    steps = run(models, tmp_path / "run", stop=3, gates=gates, watch=knobs)
    assert steps == [1, 1, 2, 3]
    assert run(models, tmp_path / "run", gates=gates, watch=knobs) == [3, 4]
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == (plain / WEIGHTS).read_bytes()
    assert "watch, step 2: the state after step 0 is brought back, and the run goes on without gates" in caplog.text
    assert [line["step"] for line in lines_of(tmp_path / "run", "metrics.jsonl")] == [0, 0, 0, 1, 2, 3, 4]
    checks = lines_of(tmp_path / "run")
    assert [line["step"] for line in checks] == [0, 2, 2, 2, 4] and checks[2]["rolled_back_to"] == 0
    card = (tmp_path / "run" / "README.md").read_text()
    assert "After step 2 the state of step 0 was brought back" in card and "Step 4: generation: pictures of" in card


def test_an_alarm_ends_the_run_at_the_last_good_state(models, tmp_path, monkeypatch):
    """The third check rings: the student is that of two updates, and running again leaves it alone."""

    def third(limits, beliefs, checks, share):
        return ["enough"] * (len(checks["editing"]) > 2)

    monkeypatch.setattr(watch_module, "alarms", third)
    knobs = {**WATCHED, "rollback": "stop"}
    assert run(models, tmp_path / "run", watch=knobs) == [1, 2, 3]
    run(models, tmp_path / "two", steps=2)
    found, wanted = (read_adapter(tmp_path / name).sha256 for name in ("run", "two"))
    assert found == wanted
    assert run(models, tmp_path / "run", watch=knobs) == []
    assert [p.name for p in sorted((tmp_path / "run" / "checkpoints").iterdir())] == ["good-000002", "step-000002"]


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_are_watched_and_brought_back(models, tmp_path, parallel):
    """One of them looks, or both where the base is sharded; the alarms are said once, and both go back."""
    fields = {"batch": 3, "optimizer": {"warmup": 1}}
    run(models, tmp_path / "one", **fields)
    knobs = {**WATCHED, "diversity": 9.0, "rollback": "plain"}
    gated = recipe(models, tmp_path / "two", parallel=parallel, gates={"evidence": True}, watch=knobs, **fields)
    said = launch(gated, tmp_path)
    assert said.count("the state after step 0 is brought back") == 1 == said.count("watch, step 4: editing:")
    check(tmp_path / "two", load_file(tmp_path / "one" / WEIGHTS))
    assert [line["step"] for line in lines_of(tmp_path / "two")] == [0, 2, 2, 2, 4]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"watch": {"rollback": "plain"}}, "nothing is watched"),
        ({"watch": {"every": 5, "rollback": "plain"}}, "no gate is on; give stop"),
        ({"watch": {"strength": [2, 1]}}, "lower bound first"),
        ({"watch": {"judge": "nowhere/at/all"}}, "watch.judge: similarity model"),
        ({"watch": {"evry": 5}}, "did you mean 'every'"),
    ],
)
def test_recipes_that_would_not_be_watched(fields, said):
    with pytest.raises(UserError, match=said):
        Recipe(**fields)
