"""Gates on flows with nothing unknown: the gated gradient is the plain one times the weight, row by row, and the
student that the gates end at is the one without them."""

from __future__ import annotations

import pytest
import torch
from flows import Gaussian, Rows, shifted

from danceopd.engine.batches import Batch
from danceopd.engine.objectives import RowLoss, danceopd
from danceopd.engine.query import draw_queries
from danceopd.engine.rollout import StudentRollout
from danceopd.engine.velocities import Velocities
from danceopd.labelfree.gates.context import ELSEWHERE, NULL, PRIVILEGED, WRONG, AlternativeCondition, BatchContext
from danceopd.labelfree.gates.hook import BatchGates
from danceopd.labelfree.gates.weights import RunningMeans
from danceopd.pipelines.family import classifier_free
from danceopd.recipe.recipe import Recipe

SIGMAS = shifted(6, 3.0)
WIDTH = 12
TEACHERS = [Gaussian(0.8, 0.4), Gaussian(-0.5, 0.9)]


class Prompted(Rows):
    """Rows of teachers `teacher` whose prompt is a number that moves the velocity."""

    def __init__(self, prompt: torch.Tensor, teacher: torch.Tensor) -> None:
        super().__init__(len(prompt), (WIDTH,))
        self.prompt, self.teacher = prompt, teacher

    def rows(self, index) -> Prompted:
        return Prompted(self.prompt[index], self.teacher[index])


class CountedTeacher:
    """A teacher whose velocity depends on its prompt, and on nothing else that the rows do not share."""

    def __init__(self, flow: Gaussian) -> None:
        self.flow, self.calls = flow, 0

    def __call__(self, x, sigma, condition):
        self.calls += 1
        places = torch.linspace(-1, 1, WIDTH)
        return self.flow(x, sigma) + condition.prompt[:, None] * places


class Table:
    """A student with a line of its own at each grid level for each teacher: it can be the teacher exactly."""

    def __init__(self) -> None:
        self.p = torch.zeros(2, len(SIGMAS) - 1, 2 + 1, requires_grad=True)
        with torch.no_grad():
            self.p += 0.4 * torch.randn(self.p.shape, generator=torch.Generator().manual_seed(1))

    def __call__(self, x, sigma, condition):
        level = (sigma[:, None] - SIGMAS[None, :-1]).abs().argmin(1)
        line = self.p[condition.teacher, level]
        slope, offset, gain = (line[:, i, None] for i in range(3))
        return slope * x + offset + gain * condition.prompt[:, None] * torch.linspace(-1, 1, WIDTH)


Update = tuple[Batch, Velocities]


def make(files, student, rows=32, step=0, privileged=None, group=1, running=None, **gates) -> Update:
    """A gated batch of two teachers in groups of `group`; its rows have prompt 1, and 0 is the null prompt."""
    recipe = Recipe(**files, batch=rows, rollout={"steps": 6}, gates={"group": group, **gates})
    index = [row // group % 2 for row in range(rows)]
    teacher, every = torch.tensor(index), list(range(rows))
    draws = draw_queries(recipe.seed, step, rows, beta=(1.0, 1.0))
    if group > 1:
        draws = draws[::group].repeat_interleave(group, dim=0)
    prompts = {NULL: 0.0, WRONG: -1.0, ELSEWHERE: 0.5, "paraphrase 1": 1.1, "paraphrase 2": 1.2}
    prompts |= {} if privileged is None else {PRIVILEGED: privileged}
    others = {}
    for name, prompt in prompts.items():
        spread = torch.linspace(-1.0, 3.0, rows) if name.startswith("paraphrase") else torch.ones(rows)
        others[name] = AlternativeCondition(every, Prompted(prompt * spread, teacher))
    names = {"null": NULL, "prompt": WRONG, "source": ELSEWHERE, None: None}
    context = BatchContext(
        conditional=torch.ones(rows, dtype=torch.bool),
        others=others,
        contrasts=[names[recipe.gates.contrast("editing")]] * rows,
        guided=[],
        critical=torch.zeros(rows, dtype=torch.bool),
        keys=torch.zeros(rows, 6),
        guide=classifier_free,
    )
    batch = Batch(
        seed=recipe.seed, step=step, name="0", global_size=rows, rows=every, teacher_index=index,
        unconditional=[False] * rows, condition=Prompted(torch.ones(rows), teacher), null_condition=None, sigmas=SIGMAS,
        query=recipe.query, query_draws=draws, device=torch.device("cpu"),
        hook=BatchGates(recipe.gates, running or RunningMeans(2, torch.device("cpu")), context),
    )  # fmt: skip
    field = StudentRollout(lambda x, s, c: student(x, s, c).detach(), recipe.rollout)
    return batch, Velocities(field, student, [CountedTeacher(flow) for flow in TEACHERS])


def plain(update: Update) -> Update:
    update[0].hook = None
    return update


def backward(update: Update) -> RowLoss:
    """Add the objective's gradient, as the trainer does; its one query's row losses."""
    (query,) = [query for query in danceopd(*update) if (query.loss.sum() / len(update[0])).backward() is None]
    return query.detach()


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
    weights = backward(make(files, student, group=group, **GATES[name])).metrics["weight"]
    found = student.p.grad.clone()
    wanted = torch.zeros_like(found)
    for row in range(32):
        student.p.grad = None
        for query in danceopd(*plain(make(files, student, group=group, **GATES[name]))):
            (query.loss[row] / 32).backward()
        wanted += float(weights[row]) * student.p.grad
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-7)
    assert float(weights.std()) > 1e-2  # it could fail


def test_token_weights_are_in_the_gradient(files):
    """By autograd of the written-out loss, each token's error times its weight."""
    student = Table()
    backward(make(files, student, evidence={"alpha": 0.0, "tokens": 1.0}))
    found = student.p.grad.clone()
    student.p.grad = None
    batch, velocities = make(files, student, evidence={"alpha": 0.0, "tokens": 1.0})
    x = batch.hook.rollout(batch, velocities)[:, 0]
    sigma = batch.query_sigma[:, 0]
    teacher = velocities.teacher(batch, x, sigma)
    answers = batch.hook.query(batch, velocities, x, sigma, teacher)
    velocity = student(x, sigma, batch.condition)
    tokens = answers.weights(velocity.detach()).tokens
    assert float(tokens.std()) > 0.1 and torch.allclose(tokens.mean(1), torch.ones(32), atol=1e-5)
    # The contrast moves the ends of a row and leaves its middle: that is where the weight goes.
    assert float(tokens[:, [0, -1]].mean()) > 1.3 > 0.8 > float(tokens[:, [5, 6]].mean())
    ((tokens * (velocity - teacher).square()).mean(1).sum() / 32).backward()
    torch.testing.assert_close(found, student.p.grad, rtol=1e-5, atol=1e-8)


def learn(files, steps=300, **gates) -> Table:
    """The student after gradient descent."""
    student, running = Table(), RunningMeans(2, torch.device("cpu"))
    optimizer = torch.optim.Adam([student.p], lr=0.05)
    for step in range(steps):
        optimizer.zero_grad()
        update = make(files, student, rows=32 * gates.get("group", 1), step=step, running=running, **gates)
        backward(update if update[0].hook.gates.on else plain(update))
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
    batch, velocities = make(files, Table(), privileged=3.0, skills={"eta": 0.5, "radius": 0.05})
    x, sigma = batch.noise(), batch.sigma_at(0)
    teacher = velocities.teacher(batch, x, sigma)
    answers = batch.hook.query(batch, velocities, x, sigma, teacher)
    moved = (answers.target - teacher).norm(dim=1)
    assert torch.allclose(moved, 0.5 * 0.05 * teacher.norm(dim=1), rtol=1e-4)
    direction = (answers.target - teacher) / moved[:, None]
    wanted = torch.linspace(-1, 1, WIDTH)
    assert torch.allclose(direction, (wanted / wanted.norm()).expand(32, -1), atol=1e-4)
    assert 0 < float(backward((batch, velocities)).metrics["shift share"].mean()) < 1


@pytest.mark.parametrize(
    "gates",
    [{"evidence": {"alpha": 0, "tokens": 0}}, {"consensus": {"bound": 0}},
     {"skills": {"eta": 0, "critical": 0}}],
)  # fmt: skip
def test_gates_of_no_strength_are_not_there_bit_for_bit(files, gates):
    grads = []
    for gated in (True, False):
        student = Table()
        update = make(files, student, privileged=3.0, **gates)
        query = backward(update if gated else plain(update))
        grads.append((student.p.grad, query.loss, query.error))
    for a, b in zip(*grads):
        assert torch.equal(a, b)


def test_frozen_fields_are_called_no_more_than_the_gates_need(files):
    """Calls of frozen fields, each for all rows of a teacher: what docs/labelfree.md says they cost."""

    def calls(privileged=None, **gates):
        batch, velocities = make(files, Table(), privileged=privileged, **gates)
        wanted = {NULL} if "evidence" in gates else set()
        wanted |= {WRONG, "paraphrase 1", "paraphrase 2"} if "consensus" in gates else set()
        wanted |= {PRIVILEGED} if privileged is not None else set()
        context = batch.hook.context
        context.others = {k: v for k, v in context.others.items() if k in wanted}
        backward((batch, velocities))
        return sum(teacher.calls for teacher in velocities.teachers) / 2

    assert calls(evidence=True) == 1 + 1
    assert calls(consensus=True) == 1 + 3
    assert calls(privileged=2.0, skills=True) == 1 + 1
    assert calls(privileged=2.0, evidence=True, consensus=True, skills=True) == 1 + 5
