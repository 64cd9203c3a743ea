"""Gates on flows with nothing unknown: the gated gradient is the plain one times the weight, row by row, and the
student that the gates end at is the one without them. Targets of the student's own making end elsewhere."""

from __future__ import annotations

import pytest
import torch
from flows import Gaussian, Rows, shifted

from danceopd.engine.batches import Fields, Lesson
from danceopd.engine.objectives import danceopd
from danceopd.engine.query import draw_queries
from danceopd.labelfree.hook import ELSEWHERE, NULL, TOLD, WRONG, As, Gating
from danceopd.labelfree.weights import RunningMeans
from danceopd.pipelines.family import classifier_free
from danceopd.recipe.recipe import Recipe

SIGMAS = shifted(6, 3.0)
WIDTH = 12
TEACHERS = [Gaussian(0.8, 0.4), Gaussian(-0.5, 0.9)]


class Said(Rows):
    """Rows of teachers `whose` that were told something: a number that moves what is answered."""

    def __init__(self, words: torch.Tensor, whose: torch.Tensor) -> None:
        super().__init__(len(words), (WIDTH,))
        self.words, self.whose = words, whose

    def rows(self, index) -> Said:
        return Said(self.words[index], self.whose[index])


class Asked:
    """A teacher whose answer depends on its words, and on nothing else that the rows do not share."""

    def __init__(self, flow: Gaussian) -> None:
        self.flow, self.calls = flow, 0

    def __call__(self, x, sigma, condition):
        self.calls += 1
        places = torch.linspace(-1, 1, WIDTH)
        return self.flow(x, sigma) + condition.words[:, None] * places


class Table:
    """A student with a line of its own at each grid level for each teacher: it can be the teacher exactly."""

    def __init__(self) -> None:
        self.p = torch.zeros(2, len(SIGMAS) - 1, 2 + 1, requires_grad=True)
        with torch.no_grad():
            self.p += 0.4 * torch.randn(self.p.shape, generator=torch.Generator().manual_seed(1))

    def __call__(self, x, sigma, condition):
        level = (sigma[:, None] - SIGMAS[None, :-1]).abs().argmin(1)
        line = self.p[condition.whose, level]
        slope, offset, heard = (line[:, i, None] for i in range(3))
        return slope * x + offset + heard * condition.words[:, None] * torch.linspace(-1, 1, WIDTH)


def make(files, student, rows=32, step=0, told=None, group=1, running=None, **gates) -> Lesson:
    """A lesson of two teachers in blocks of `group`, gated; its rows are asked with words 1, contrasted with 0."""
    recipe = Recipe(**files, batch=rows, rollout={"steps": 6}, gates={"group": group, **gates})
    routes = [row // group % 2 for row in range(rows)]
    whose = torch.tensor(routes)
    every = list(range(rows))
    drawn = draw_queries(recipe.seed, step, rows, beta=(1.0, 1.0))
    if group > 1:
        drawn = drawn[::group].repeat_interleave(group, dim=0)
    said = {NULL: 0.0, WRONG: -1.0, ELSEWHERE: 0.5, "framing 1": 1.1, "framing 2": 1.2}
    said |= {} if told is None else {TOLD: told}
    asked = {name: As(every, Said(torch.full((rows,), words), whose)) for name, words in said.items()}
    names = {"null": NULL, "prompt": WRONG, "source": ELSEWHERE, None: None}
    knobs = recipe.gates
    gating = Gating(
        gates=knobs,
        running=running or RunningMeans(2, torch.device("cpu")),
        gated=torch.ones(rows, dtype=torch.bool),
        asked=asked,
        contrasts=[names[knobs.contrast("editing")]] * rows,
        guided=[],
        critical=torch.zeros(rows, dtype=torch.bool),
        keys=torch.zeros(rows, 6),
        guide=classifier_free,
    )
    return Lesson(
        recipe=recipe, fields=Fields(lambda x, s, c: student(x, s, c).detach(), student, [Asked(t) for t in TEACHERS]),
        step=step, name="0", whole=rows, mine=every, routes=routes, blank=[False] * rows,
        condition=Said(torch.ones(rows), whose), null=None, sigmas=SIGMAS, drawn=drawn, device=torch.device("cpu"),
        gates=gating,
    )  # fmt: skip


def plain(lesson: Lesson) -> Lesson:
    lesson.gates = None
    return lesson


GATES = {
    "evidence": {"evidence": {"tokens": 0.0}},
    "the other sign": {"evidence": {"tokens": 0.0, "alpha": -0.8}},
    "another prompt": {"evidence": {"tokens": 0.0, "contrast": "prompt"}},
    "consensus": {"consensus": True},
    "together": {"evidence": {"tokens": 0.0}, "consensus": True},
}


@pytest.mark.parametrize("name", GATES)
def test_the_gated_gradient_is_the_weight_times_the_plain_one(files, name):
    """Row by row: the weights that are reported, times the gradient that each row has without a gate."""
    student = Table()
    group = 4 if "evidence" in GATES[name] else 1
    lesson = make(files, student, group=group, **GATES[name])
    danceopd(lesson)
    found, weights = student.p.grad.clone(), lesson.told[0].gate["weight"]
    wanted = torch.zeros_like(found)
    for row in range(32):
        student.p.grad = None
        alone = plain(make(files, student, group=group, **GATES[name]))
        alone.learn = lambda surrogate, *rest, row=row, **more: (surrogate[row] / 32).backward()
        alone.told = []
        danceopd(alone)
        wanted += float(weights[row]) * student.p.grad
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-7)
    assert float(weights.std()) > 1e-2  # it could fail


def test_token_weights_are_in_the_gradient(files):
    """By autograd of the written-out loss, each token's error times its weight."""
    student = Table()
    lesson = make(files, student, evidence={"alpha": 0.0, "tokens": 1.0})
    danceopd(lesson)
    found = student.p.grad.clone()
    student.p.grad = None
    again = make(files, student, evidence={"alpha": 0.0, "tokens": 1.0})
    x = again.gates.walk(again)[:, 0]
    sigma = again.levels[:, 0]
    answer = again.ask(x, sigma)
    heard = again.gates.ask(again, x, sigma, answer)
    velocity = student(x, sigma, again.condition)
    tokens = heard.trust(velocity.detach()).tokens
    assert float(tokens.std()) > 0.1 and torch.allclose(tokens.mean(1), torch.ones(32), atol=1e-5)
    # The contrast moves the ends of a row and leaves its middle: that is where the weight goes.
    assert float(tokens[:, [0, -1]].mean()) > 1.3 > 0.8 > float(tokens[:, [5, 6]].mean())
    ((tokens * (velocity - answer).square()).mean(1).sum() / 32).backward()
    torch.testing.assert_close(found, student.p.grad, rtol=1e-5, atol=1e-8)


def learn(files, steps=300, **gates) -> Table:
    """The student after gradient descent."""
    student, running = Table(), RunningMeans(2, torch.device("cpu"))
    optimizer = torch.optim.Adam([student.p], lr=0.05)
    for step in range(steps):
        optimizer.zero_grad()
        lesson = make(files, student, rows=32 * gates.get("group", 1), step=step, running=running, **gates)
        if not lesson.gates.gates.on:
            plain(lesson)
        danceopd(lesson)
        running.fold(lambda total: None)
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (1 - step / steps)
    return student


def away(student: Table) -> float:
    """Largest distance of the student's lines from its teachers', at every grid level."""
    distance = 0.0
    for m, teacher in enumerate(TEACHERS):
        for k in range(len(SIGMAS) - 1):
            line = torch.stack([v.float() for v in teacher.line(SIGMAS[k])])
            distance = max(distance, float((student.p[m, k].detach() - torch.cat([line, torch.ones(1)])).abs().max()))
    return distance


ENDS = {
    "plain": {},
    "evidence": {"evidence": {"tokens": 1.0}},
    "the other sign": {"evidence": {"alpha": -0.5}},
    "in groups": {"evidence": True, "consensus": True, "group": 2},
    "consensus": {"consensus": True},
}


@pytest.mark.parametrize("name", ENDS)
def test_gates_do_not_move_where_learning_ends(files, name):
    """A student that can be its teacher ends as its teacher, whatever the weights."""
    assert away(Table()) > 0.5
    student = learn(files, **ENDS[name])
    assert away(student) < 0.05, away(student)


def test_a_shifted_target_moves_it_no_further_than_the_trust_region(files):
    """`eta d` within `radius |v|`: the student ends at the shifted answer, and that is near the teacher's."""
    lesson = make(files, Table(), told=3.0, skills={"eta": 0.5, "radius": 0.05})
    x, sigma = lesson.noise(), lesson.level(0)
    answer = lesson.ask(x, sigma)
    heard = lesson.gates.ask(lesson, x, sigma, answer)
    moved = (heard.target - answer).norm(dim=1)
    assert torch.allclose(moved, 0.5 * 0.05 * answer.norm(dim=1), rtol=1e-4)
    direction = (heard.target - answer) / moved[:, None]
    wanted = torch.linspace(-1, 1, WIDTH)
    assert torch.allclose(direction, (wanted / wanted.norm()).expand(32, -1), atol=1e-4)
    danceopd(lesson)
    assert 0 < float(lesson.told[0].gate["shift share"].mean()) < 1


@pytest.mark.parametrize(
    "gates",
    [{"evidence": {"alpha": 0, "tokens": 0}}, {"consensus": {"bound": 0}},
     {"skills": {"eta": 0, "critical": 0}}],
)  # fmt: skip
def test_gates_of_no_strength_are_not_there_bit_for_bit(files, gates):
    grads = []
    for gated in (True, False):
        student = Table()
        lesson = make(files, student, told=3.0, **gates)
        danceopd(lesson if gated else plain(lesson))
        grads.append((student.p.grad, lesson.told[0].loss, lesson.told[0].error))
    for a, b in zip(*grads):
        assert torch.equal(a, b)


def test_a_state_is_asked_no_more_than_the_gates_need(files):
    """Calls of frozen fields, each for all rows of a teacher: what docs/labelfree.md says they cost."""

    def calls(told=None, **gates):
        lesson = make(files, Table(), told=told, **gates)
        wanted = {NULL} if "evidence" in gates else set()
        wanted |= {WRONG, "framing 1", "framing 2"} if "consensus" in gates else set()
        wanted |= {TOLD} if told is not None else set()
        lesson.gates.asked = {k: v for k, v in lesson.gates.asked.items() if k in wanted}
        danceopd(lesson)
        return sum(teacher.calls for teacher in lesson.fields.teachers) / 2

    assert calls(evidence=True) == 1 + 1
    assert calls(consensus=True) == 1 + 3
    assert calls(told=2.0, skills=True) == 1 + 1
    assert calls(told=2.0, evidence=True, consensus=True, skills=True) == 1 + 5
