"""The monitor: its figures, a planted confident mistake that raises its alarm, and runs that it must not change."""

import json
import math

import numpy as np
import pytest
import torch
from flows import Gaussian, shifted
from safetensors.torch import load_file
from tiny_merge import WEIGHTS, check_student, json_lines, tiny_recipe, two_processes
from tiny_merge import run as merge_run
from torch import nn
from torchmetrics.functional import spearman_corrcoef

from danceopd.adapters.read import read_adapter
from danceopd.engine.rollout import rollout
from danceopd.errors import UserError
from danceopd.labelfree import monitor as monitor_module
from danceopd.labelfree import probes as probes_module
from danceopd.labelfree.gates.consensus import agreement
from danceopd.labelfree.monitor import Monitor
from danceopd.labelfree.probes import AGREEMENT, CONSENSUS, ProbeBatch, ProbeSet
from danceopd.labelfree.statistics import Check, Interval, Limits, alarms, mistakes, quarter, spearman, spread
from danceopd.recipe.labelfree import Monitor as Options
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
CHECK = Check(0.5, {"trust": 0.5}, 1.0, 1.0, [0.5, 0.5])


def alarms_of(checks=(CHECK,), confidences=None, share=None):
    return alarms(Limits(), confidences or {"trust": FINE}, {"editing": checks}, share)


def check_with(**fields):
    return Check(**{**vars(CHECK), **fields})


def test_limits():
    assert not alarms_of() and not alarms_of(share=0.5)
    wrong = {"t": (Interval(0.4, 0.3, 0.5), FINE[1])}
    assert "surest of, 40% is among the worst (30% to 50%" in alarms_of(confidences=wrong)[0]
    assert "rank correlation -0.30" in alarms_of(confidences={"t": (FINE[0], Interval(-0.3, -0.5, -0.1))})[0]
    assert not alarms_of(confidences={"t": (Interval(0.4, 0.2, 0.6), Interval(-0.3, -0.7, 0.1))})
    assert "the weights count as 40% of their rows" in alarms_of(share=0.4)[0]
    assert "editing: it follows its prompt 0.4 times" in alarms_of([CHECK, check_with(strength=0.4)])[0]
    assert "follows its prompt 2.1 times" in alarms_of([CHECK, check_with(strength=2.1)])[0]
    assert not alarms_of([check_with(strength=0.1), check_with(strength=0.4)])  # it began further out
    assert "differ 60% as much as is usual" in alarms_of([check_with(diversity=0.6)])[0]
    for name in ("score", "strength", "diversity"):
        assert "not finite" in alarms_of([CHECK, check_with(**{name: math.nan})])[0]


def test_divergence_is_three_falls_that_are_no_noise():
    def checks_of(scores, confidence):
        return [
            check_with(score=float(np.mean(s)), confidence={"trust": c}, scores=s) for s, c in zip(scores, confidence)
        ]

    falling = [[0.9] * 8, [0.8] * 8, [0.7] * 8, [0.6] * 8]
    assert "trust rose and the score fell 3 checks in a row, by 0.3" in alarms_of(checks_of(falling, [1, 2, 3, 4]))[0]
    assert not alarms_of(checks_of(falling[:3], [1, 2, 3]))
    assert not alarms_of(checks_of(falling, [1, 2, 3, 2.9]))
    noisy = [[0.5, 0.5, 0.5, 0.5], [0.9, 0.1, 0.5, 0.4], [0.1, 0.9, 0.8, 0.0], [0.8, 0.9, 0.0, 0.0]]
    assert not alarms_of(checks_of(noisy, [1, 2, 3, 4]))


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

    def reworded(self, generator):
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

    def calibrate(self, clean):
        pass


def probes(live=None, patch=None):
    """The probes of a consensus gate; `live` is the student itself, in place of its frozen teacher (by `patch`)."""
    numbers = torch.Generator().manual_seed(3)
    prompts = Prompts(torch.arange(MODES).repeat(4))
    wordings = [prompts, *(prompts.reworded(numbers) for _ in range(FRAMINGS - 1))]

    def paraphrased(field, x, sigma, rows):
        answers = torch.stack([field(x, sigma, one.rows(rows)) for one in wordings])
        return answers, torch.ones(answers.shape[:2], dtype=torch.bool)

    noise = torch.randn(len(prompts) * 6, 2, generator=numbers)
    other = prompts.rows(torch.arange(len(prompts)).roll(1))
    if live is not None:  # the contrast is the student's own as well
        wrong = []

        def paraphrased(field, x, sigma, rows):
            answers = torch.stack([live(x, sigma, one.rows(rows)) for one in wordings])
            wrong[:] = [live(x, sigma, other.rows(rows))]
            return answers, torch.ones(answers.shape[:2], dtype=torch.bool)

        patch.setattr(probes_module, "agreement", lambda framed, there, _: agreement(framed, there, wrong[0]))
    batch = ProbeBatch(prompts, other, noise, shifted(6, 1.0), Near(), paraphrased)
    return ProbeSet("flow", exact, [batch], torch.device("cpu"), 1024)


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


def training(mistaken, live, patch=None):
    """The checks of 160 updates, and the alarms by step. A student that is its own teacher is judged by the frozen
    teacher, as runs are, or with a `patch` by itself."""
    student, numbers, sigmas = Student(), torch.Generator().manual_seed(9), shifted(6, 1.0)
    student.load_state_dict(mistaken)
    optimizer = torch.optim.Adam(student.parameters(), 3e-3)

    @torch.no_grad()
    def field(x, sigma, condition):
        return student(x, sigma, condition)

    monitor, alarmed = Monitor(Options(), [probes(field, patch) if patch else probes()], "the distance"), {}
    monitor.check(0, field)
    for step in range(1, 161):
        prompts = Prompts(torch.randint(MODES, (64,), generator=numbers))
        stop = torch.randint(0, 6, (64,), generator=numbers)
        x, sigma = rollout(field, torch.randn(64, 2, generator=numbers), sigmas, stop, prompts), sigmas[stop]
        if live:
            velocities = [field(x, sigma, prompts.reworded(numbers)) for _ in range(FRAMINGS)]
            target = torch.stack(velocities).mean(0)
        else:
            target = exact(x, sigma, prompts)
        loss = (student(x, sigma, prompts) - target).square().mean()
        optimizer.zero_grad(), loss.backward(), optimizer.step()
        if step % 20 == 0:
            monitor.check(step, field)
            alarmed |= {step: monitor.alarms} if monitor.alarms else {}
    return [line["probes"]["flow"] for line in monitor._lines], alarmed


def test_confidences_are_taken_at_the_middle_of_the_rollout():
    """Of six steps before the fourth: the student's state and noise level there."""
    seen, sigmas, probe_set = [], shifted(6, 1.0), probes()

    def teacher(x, sigma, condition):
        seen.append((x.clone(), sigma))
        return exact(x, sigma, condition)

    probe_set.teacher = teacher
    probe_set.measure(exact)
    (batch,) = probe_set.batches
    rows = [row for row in range(len(batch.condition)) for _ in range(batch.seeds)]
    stop = torch.full((len(rows),), 3)
    wanted = rollout(exact, batch.noise, sigmas, stop, batch.condition.rows(torch.tensor(rows)))
    assert len(seen) == 2 + FRAMINGS  # its prompt, another's, and the wordings
    for x, sigma in seen:
        torch.testing.assert_close(x, wanted)
        assert set(sigma.tolist()) == {float(sigmas[3])}


def test_the_effective_share_is_the_mean_since_the_last_check():
    monitor = Monitor(Options(), [probes()], "the distance")
    for share in (0.5, 0.9):
        monitor.note({"gate/ess": share, "loss": 1.0})
    monitor.note({"loss": 1.0})
    assert monitor.check(1, exact)["monitor/effective"] == pytest.approx(0.7)
    assert "monitor/effective" not in monitor.check(2, exact)


def test_plain_danceopd_mends_the_mistake_in_silence(mistaken):
    lines, alarmed = training(mistaken, live=False)
    assert not alarmed
    assert min(lines[0]["scores"][::MODES]) < -2 and min(lines[-1]["scores"]) > -1.2


def test_the_student_as_its_own_teacher_raises_an_alarm(mistaken, monkeypatch):
    """Its own consensus stays high while the pictures go astray, and there is an alarm."""
    lines, alarmed = training(mistaken, live=True, patch=monkeypatch)
    assert alarmed and min(alarmed) <= 80
    assert lines[-1]["score"] < lines[0]["score"] - 0.5
    assert 0.5 < lines[-1]["confidence"][CONSENSUS] < 0.999  # the exact flow, which reads no words, would say 1
    assert lines[-1]["confidence"][AGREEMENT] < lines[0]["confidence"][AGREEMENT]


def test_the_frozen_teacher_raises_an_alarm_of_that_student_too(mistaken):
    """What a run's monitor sees: the teacher is never fooled, and pictures of one prompt become the same."""
    lines, alarmed = training(mistaken, live=True)
    assert alarmed and min(alarmed) <= 80
    assert "pictures of one prompt differ" in alarmed[min(alarmed)][0]
    assert lines[-1]["score"] < lines[0]["score"] - 0.5


# -- runs -----------------------------------------------------------------------------------------------------

MONITORED = {"every": 2, "prompts": 8, "seeds": 2}


def recipe(models, output, **fields):
    return tiny_recipe(models, output, **{"student": {"rank": 4}, **fields})


def run(models, output, kill=None, **fields):
    return merge_run(recipe(models, output, **fields), kill)


def lines_of(folder, name="monitor.jsonl"):
    return json_lines(folder / name)


def manifest(folder):
    return (folder / "checkpoints" / "step-000004" / "manifest.json").read_text()


@pytest.fixture(scope="module")
def plain(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain") / "run"
    run(models, folder)
    return folder


@pytest.fixture(scope="module")
def monitored(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("monitored") / "run"
    run(models, folder, monitor=MONITORED)
    return folder


def test_a_monitored_run_is_the_run(plain, monitored):
    """The same student, and the same last checkpoint with all random states."""
    assert (monitored / WEIGHTS).read_bytes() == (plain / WEIGHTS).read_bytes()
    assert manifest(monitored) == manifest(plain)
    assert not (plain / "monitor.jsonl").exists()


def test_what_it_saw_is_written_everywhere(monitored):
    checks = lines_of(monitored)
    assert [line["step"] for line in checks] == [0, 2, 4]
    assert set(checks[0]["probes"]) == {"generation", "editing"} and set(checks[0]["confidences"]) == {AGREEMENT}
    whole = json.loads((monitored / "monitor.json").read_text())
    assert whole["prompts"] == {"generation": 4, "editing": 4} and "exact scorer" in whole["judge"]
    assert len(whole["checks"]) == 3 and "scores" not in whole["checks"][0]["probes"]["editing"]
    logged = {line["step"]: line for line in lines_of(monitored, "metrics.jsonl")}
    assert {step for step, line in logged.items() if "monitor/alarms" in line} == {0, 2, 4}
    assert "loss" in logged[2] and "monitor/score editing" in logged[2]
    assert logged[2]["monitor/best of seeds generation"] >= logged[2]["monitor/score generation"]
    assert 0 <= logged[2]["monitor/open shift generation"] <= 1 and "monitor/open shift editing" not in logged[2]
    assert "judged by the exact scorer" in (monitored / "README.md").read_text()


@pytest.mark.parametrize(
    "fields",
    [
        {"gates": {"evidence": True}},
        {"contrast": {"generation": {"weight": 0.5}}},
        {"objective": "nft", "batch": 6},
    ],
)
def test_what_goes_beyond_plain_distillation_is_monitored(fields):
    assert Recipe(**fields).monitored_every == 100
    assert Recipe(**fields, monitor={"every": 0}).monitored_every == 0
    assert Recipe(**fields, monitor={"every": 7, "rollback": "plain"}).monitored_every == 7


def test_plain_danceopd_is_not_monitored():
    assert Recipe().monitored_every == 0 == Recipe(contrast={"generation": {"weight": 0.0}}).monitored_every


def test_a_continued_run_sees_what_the_whole_run_saw(models, tmp_path, monitored):
    run(models, tmp_path / "run", kill=3, monitor=MONITORED)
    assert [line["step"] for line in lines_of(tmp_path / "run")] == [0, 2]
    run(models, tmp_path / "run", monitor=MONITORED)
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == (monitored / WEIGHTS).read_bytes()
    for here, there in zip(lines_of(tmp_path / "run"), lines_of(monitored), strict=True):
        assert {**here, "seconds": 0} == {**there, "seconds": 0}


@pytest.mark.parametrize(
    "how",
    [{"gates": {"evidence": {"alpha": 1.0}}}, {"contrast": {"generation": {"weight": 1.0}}}],
    ids=["gate", "contrast"],
)
def test_an_alarm_brings_the_first_state_back_and_goes_on_plainly(models, tmp_path, plain, caplog, how):
    """Not plain until the first check, which no state before it passed: what follows is the plain run, to the byte."""
    options = {**MONITORED, "diversity": 9.0, "rollback": "plain"}
    steps = run(models, tmp_path / "run", kill=3, **how, monitor=options)
    assert steps == [1, 1, 2, 3]
    assert run(models, tmp_path / "run", **how, monitor=options) == [3, 4]
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == (plain / WEIGHTS).read_bytes()
    assert "step 2: the state after step 0 is restored, and the run goes on as plain distillation" in caplog.text
    assert [line["step"] for line in lines_of(tmp_path / "run", "metrics.jsonl")] == [0, 0, 0, 1, 2, 3, 4]
    checks = lines_of(tmp_path / "run")
    assert [line["step"] for line in checks] == [0, 2, 2, 2, 4] and checks[2]["rolled_back_to"] == 0
    card = (tmp_path / "run" / "README.md").read_text()
    assert "After step 2 the state of step 0 was restored" in card and "Step 4: generation: pictures of" in card


def test_patience_that_was_spent_on_undone_steps_does_not_end_the_run(models, tmp_path):
    """Step 2 has an alarm and no patience left: after the roll-back it is made again, plainly, and then it counts."""
    options = {**MONITORED, "diversity": 9.0, "rollback": "plain"}
    validation = {"every": 2, "rows": 2, "patience": 1, "min_delta": 0.99}
    assert run(models, tmp_path / "run", gates={"evidence": True}, monitor=options, validation=validation) == [1, 1, 2]


def test_an_alarm_ends_the_run_at_the_last_good_state(models, tmp_path, monkeypatch):
    """The third check has an alarm: the student is that of two updates, and running again leaves it alone."""

    def third(limits, confidences, checks, share):
        return ["enough"] * (len(checks["editing"]) > 2)

    monkeypatch.setattr(monitor_module, "alarms", third)
    options = {**MONITORED, "rollback": "stop"}
    assert run(models, tmp_path / "run", monitor=options) == [1, 2, 3]
    run(models, tmp_path / "two", steps=2)
    found, wanted = (read_adapter(tmp_path / name).sha256 for name in ("run", "two"))
    assert found == wanted
    assert run(models, tmp_path / "run", monitor=options) == []
    assert [p.name for p in sorted((tmp_path / "run" / "checkpoints").iterdir())] == ["good-000002", "step-000002"]


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_are_monitored_and_brought_back(models, tmp_path, parallel):
    """One of them checks, or both where the base is sharded; the alarms are logged once, and both go back."""
    fields = {"batch": 3, "optimizer": {"warmup": 1}}
    run(models, tmp_path / "one", **fields)
    options = {**MONITORED, "diversity": 9.0, "rollback": "plain"}
    gated = recipe(models, tmp_path / "two", parallel=parallel, gates={"evidence": True}, monitor=options, **fields)
    said = two_processes(gated, tmp_path)
    assert said.count("the state after step 0 is restored") == 1 == said.count("monitor, step 4: editing:")
    check_student(tmp_path / "two", load_file(tmp_path / "one" / WEIGHTS))
    assert [line["step"] for line in lines_of(tmp_path / "two")] == [0, 2, 2, 2, 4]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"monitor": {"rollback": "plain"}}, "nothing is monitored"),
        ({"monitor": {"every": 5, "rollback": "plain"}}, "none is on; give stop"),
        ({"monitor": {"strength": [2, 1]}}, "lower bound first"),
        ({"monitor": {"judge": "nowhere/at/all"}}, "monitor.judge: similarity model"),
        ({"monitor": {"evry": 5}}, "did you mean 'every'"),
    ],
)
def test_recipes_that_would_not_be_monitored(fields, said):
    with pytest.raises(UserError, match=said):
        Recipe(**fields)
