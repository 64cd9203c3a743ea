"""The trainer on a real, tiny FLUX.2 transformer: what it matches, where it queries, what it refuses, callbacks."""

from __future__ import annotations

import pytest
import torch
from tiny import random_adapter, tiny_klein
from tiny_trainer import (
    KLEIN,
    Recorder,
    TinyData,
    backward,
    batches_of,
    make_trainer,
    query_teachers,
    tiny_data,
    train,
)

from danceopd.common.distributed import Processes
from danceopd.data.dataset import ConditionDataset, of_one_layout
from danceopd.engine.callbacks import Callback
from danceopd.engine.rollout import rollout
from danceopd.engine.trainer import STUDENT, Trainer
from danceopd.errors import UserError
from danceopd.models.backbone import Backbone
from danceopd.models.fields import AdapterField, MergedField
from danceopd.recipe.recipe import Recipe
from danceopd.run.checkpoints import Checkpoints
from danceopd.run.directory import RunDirectory


@pytest.fixture(scope="module")
def data() -> TinyData:
    return tiny_data()


def test_student_learns_its_teachers_on_its_own_states(data, files):
    trainer = make_trainer(data, files, steps=45, optimizer={"lr": 0.03, "warmup": 1}, query={"law": "uniform"})
    metrics = train(trainer)
    early = sum(m.loss for m in metrics[:5]) / 5
    late = sum(m.loss for m in metrics[-5:]) / 5
    assert late < 0.6 * early
    assert set(metrics[0].loss_by_teacher) == {"generation", "editing"}
    assert all(m.grad_norm > 0 and not m.skipped for m in metrics)
    assert [m.step for m in metrics] == list(range(1, 46))


def test_the_log_is_computed_from_the_rows(data, files):
    """The histogram of the queries, errors by noise level and losses by teacher, from the row losses themselves."""
    rows = []
    trainer = make_trainer(
        data, files, batch=12, query={"law": "uniform", "jitter": True, "count": 2, "weight": "dt2"}
    )
    objective = trainer.objective

    def watched(batch, velocities):
        for query in objective(batch, velocities):
            names = [("generation", "editing")[m] for m in batch.teacher_index]
            rows.extend(zip(names, query.sigma.tolist(), query.loss.tolist(), query.error.tolist()))
            yield query

    trainer.objective = watched
    logged = trainer.train_step().scalars()
    assert len(rows) == 24 and len({int(sigma * 10) for _, sigma, _, _ in rows}) > 4
    for i in range(10):
        share = sum(i <= sigma * 10 < i + 1 for _, sigma, _, _ in rows) / 24
        assert logged[f"query/sigma {i / 10:g}-{(i + 1) / 10:g}"] == pytest.approx(share)
    for i in range(4):
        errors = [error for _, sigma, _, error in rows if i <= sigma * 4 < i + 1]
        wanted = pytest.approx(sum(errors) / len(errors), rel=1e-5) if errors else None
        assert logged.get(f"error/sigma {i / 4:g}-{(i + 1) / 4:g}") == wanted
    for name in ("generation", "editing"):
        losses = [loss for whose, _, loss, _ in rows if whose == name]
        assert logged[f"loss/{name}"] == pytest.approx(sum(losses) / (len(losses) / 2), rel=1e-5)
    assert logged["query_sigma"] == pytest.approx(sum(sigma for _, sigma, _, _ in rows) / 24, rel=1e-5)
    assert {"grad_norm", "lr", "loss"} <= set(logged) and "loss_scale" not in logged


def test_teachers_are_queried_where_the_student_stopped(data, files, monkeypatch):
    """Each row is queried once, at the sigma of its query, on the state that the student itself rolled out to."""
    seen, rollouts = [], []

    def spy(x, sigma, condition):
        seen.append((x.clone(), sigma.clone(), condition))
        return torch.zeros_like(x)

    def watched(field, noise, sigmas, stop, condition, *callback, **how):
        rollouts.append((noise.clone(), sigmas, stop[:, 0].clone(), condition))
        return rollout(field, noise, sigmas, stop, condition, *callback, **how)

    monkeypatch.setattr("danceopd.engine.rollout.rollout", watched)
    trainer = make_trainer(data, files, teachers={"generation": spy, "editing": spy}, batch=6, seed=3)
    trainer.train_step()
    assert {c.context is None for _, _, c in seen} == {True, False}
    assert sum(len(x) for x, _, _ in seen) == 6 == sum(len(noise) for noise, *_ in rollouts)
    # A student of B = 0 is the base, so its rollout is the base's own from the same noise.
    base = Backbone(tiny_klein().transformer, KLEIN)
    for (x, sigma, _), (noise, sigmas, stop, condition) in zip(seen, rollouts):
        assert torch.equal(sigma, sigmas[stop])
        torch.testing.assert_close(x, rollout(AdapterField(base, None), noise, sigmas, stop, condition))


def test_gradient_is_that_of_the_velocity_error(data, files):
    """One update's gradient equals autograd of the written-out loss at the recorded states."""
    queries = []
    trainer = make_trainer(data, files, optimizer={"clip": 1e9})

    def recorded(field):
        def velocity(x, sigma, condition):
            queries.append((x, sigma, condition, field(x, sigma, condition)))
            return queries[-1][3]

        return velocity

    query_teachers(trainer, recorded)
    trainer.optimizer.adamw.step = lambda: None
    trainer.optimizer.adamw.zero_grad = lambda set_to_none=True: None
    trainer.train_step()
    got = [p.grad.clone() for p in trainer.optimizer.parameters]
    for p in trainer.optimizer.parameters:
        p.grad = None
    total = 0.0
    with trainer.backbone.acting_as(STUDENT):
        for x, sigma, condition, teacher in queries:
            v = trainer.backbone.velocity(x, sigma, condition)
            total = total + (v - teacher).square().flatten(1).mean(1).sum()
    (total / trainer.rows).backward()
    for a, b in zip(got, [p.grad for p in trainer.optimizer.parameters]):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_restored_run_is_the_same_run(data, files):
    whole = make_trainer(data, files, ema=0.9)
    train(whole)
    first = make_trainer(data, files, ema=0.9)
    train(first, 3)
    state = {k: v.clone() for k, v in first.state_dict().items()}
    second = make_trainer(data, files, ema=0.9)
    second.load_state_dict(3, state)
    train(second)
    assert second.step == 6
    ours, theirs = second.optimizer, whole.optimizer
    for a, b in zip(theirs.ema + theirs.parameters, ours.ema + ours.parameters):
        assert torch.equal(a, b)


def test_nan_is_skipped_then_refused(data, files):
    def broken(x, sigma, condition):
        return torch.full_like(x, float("nan"))

    record = Recorder()
    trainer = make_trainer(data, files, teachers={"editing": broken}, callbacks=[record], steps=20)
    kept = [p.detach().clone() for p in trainer.optimizer.parameters]
    with pytest.raises(UserError, match="NaN or infinite 5 updates in a row"):
        trainer.train()
    assert [m.skipped for m in record.metrics] == [True] * 4
    assert all(torch.equal(a, b) for a, b in zip(kept, trainer.optimizer.parameters))


def test_zero_gradient_is_refused(data, files):
    """Teachers equal to the student teach nothing: that is said, not trained."""
    adapter = random_adapter(tiny_klein().transformer, seed=0, size=0.1)
    trainer = make_trainer(data, files, init=adapter, steps=20)
    query_teachers(trainer, lambda field: trainer.velocities.rollout.field)
    with pytest.raises(UserError, match="gradient is exactly zero"):
        for _ in range(10):
            trainer.train_step()


def test_a_first_update_that_asks_no_teacher_who_differs_is_passed_over(data, files):
    """As of a teacher that is the base, or that adapts one of two transformers."""
    record, adapter = Recorder(), random_adapter(tiny_klein().transformer, seed=0, size=0.1)
    trainer = make_trainer(data, files, init=adapter, callbacks=[record], steps=3)
    teachers = iter(query_teachers(trainer, lambda field: trainer.velocities.rollout.field))
    train(trainer, 1)
    query_teachers(trainer, lambda field: next(teachers))
    train(trainer, 1)
    assert [m.skipped for m in record.metrics] == [True, False] and not trainer.optimizer.idle


def test_the_learning_rate_warms_up_and_falls(data, files):
    lr = make_trainer(data, files, steps=100, optimizer={"lr": 1.0, "warmup": 10, "schedule": "cosine"}).optimizer.lr
    assert lr(0) == pytest.approx(0.1, rel=1e-2)
    assert lr(9) > lr(50) > lr(99)
    assert lr(99) < 1e-3
    lr = make_trainer(data, files, steps=100, optimizer={"lr": 1.0, "warmup": 10, "schedule": "linear"}).optimizer.lr
    assert [lr(step) for step in (0, 50, 99)] == pytest.approx([0.1, 0.5, 0.01], abs=1e-6)


class TargetDataset(ConditionDataset):
    """A dataset in memory with the clean latents of its finished pictures."""

    def __init__(self, bucket, clean):
        super().__init__([bucket])
        self.clean = clean

    def targets(self, index):
        return self.clean[index]


def with_targets(data):
    """The same datasets, with a clean picture for each row."""
    clean = torch.Generator().manual_seed(7)
    return {
        name: TargetDataset((c, data.sigmas), torch.randn(len(c), *c.shape, generator=clean))
        for name, c in data.conditions.items()
    }


@pytest.mark.parametrize(
    "objective, fields",
    [
        ("danceopd", {"query": {"count": 2, "jitter": True, "law": "low-noise"}, "rollout": {"solver": "ab2"}}),
        ("danceopd", {"rollout": {"merged": False, "noise": 0.5}}),
        ("danceopd", {"routing": {"per": "turn", "groups": 2}, "query": {"weight": "dt2", "law": "uniform"}}),
        ("diffusionopd", {}),
        ("diffusionopd", {"rollout": {"noise": 0.7}}),
        ("flowopd", {"rollout": {"noise": 0.7}, "flowopd": {"group": 4}}),
        ("offpolicy", {}),
        ("offpolicy", {"offpolicy": {"clean": "teacher"}}),
        ("supervised", {}),
    ],
)
def test_every_objective_brings_the_student_nearer(data, files, objective, fields):
    """The same update again and again, with all its draws: the loss falls."""
    datasets = with_targets(data) if objective in ("offpolicy", "supervised") else None
    optimizer = {"lr": 0.01, "warmup": 1}
    trainer = make_trainer(
        data, files, datasets=datasets, batch=4, objective=objective, optimizer=optimizer, **fields
    )
    metrics = [trainer.train_step() for _ in range(4)]
    assert metrics[-1].loss < 0.97 * metrics[0].loss, [m.loss for m in metrics]
    assert all(m.grad_norm > 0 and not m.skipped and sum(m.queries) == pytest.approx(1, abs=1e-5) for m in metrics)
    assert metrics[0].errors and set(metrics[0].errors) <= {0, 1, 2, 3}


@pytest.mark.parametrize("objective", ["offpolicy", "supervised"])
def test_objectives_without_their_data_are_refused(data, files, objective):
    with pytest.raises(UserError, match=f"objective {objective} learns from finished pictures.*'generation'"):
        make_trainer(data, files, objective=objective)


def test_unmerged_rollouts_are_the_merged_ones(data, files):
    trainers = [make_trainer(data, files, rollout={"merged": merged}) for merged in (True, False)]
    for trainer in trainers:
        trainer.train_step()
    assert [type(t.velocities.rollout.field) for t in trainers] == [MergedField, AdapterField]
    for a, b in zip(*(t.optimizer.parameters for t in trainers)):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("objective", ["danceopd", "flowopd"])
def test_processes_share_an_update(data, files, objective):
    """Two processes' gradients, each of its own rows, add up to that of one process; so do their rows."""
    fields = {"rollout": {"noise": 0.7}, "flowopd": {"group": 2}} if objective == "flowopd" else {}
    grads, rows = [], []
    for rank, world in ((0, 1), (0, 2), (1, 2)):
        trainer = make_trainer(data, files, batch=10, objective=objective, rank=rank, world=world, **fields)
        batches = batches_of(trainer)
        for batch in batches:
            backward(trainer, batch)
        grads.append([p.grad.clone() for p in trainer.optimizer.parameters])
        rows.append(sum(len(batch.rows) for batch in batches))
    assert rows[0] == 10 == rows[1] + rows[2] and min(rows) > 0
    for whole, a, b in zip(*grads):
        torch.testing.assert_close(a + b, whole, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("objective", ["danceopd", "flowopd"])
def test_micro_batches_are_the_batch(data, files, objective):
    """Eight micro-batches or one: the same draws, the same gradient to fp32 noise, the same metrics."""
    fields = {"batch": 16, "objective": objective, "query": {"jitter": True}}
    if objective == "flowopd":
        fields = {"batch": 16, "objective": objective, "rollout": {"noise": 0.7}, "flowopd": {"group": 2}}
    seen = []
    for micro in (None, 2):
        trainer = make_trainer(data, files, micro_batch=micro, **fields)
        batches = batches_of(trainer)
        assert micro is None or (len(batches) >= 8 and max(len(batch.rows) for batch in batches) == micro)
        for batch in batches:
            backward(trainer, batch)
        seen.append([p.grad.clone() for p in trainer.optimizer.parameters])
        trainer.optimizer.adamw.zero_grad()
        seen.append(trainer.train_step())
    (whole, metrics), (parts, again) = seen[:2], seen[2:]
    for a, b in zip(whole, parts):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)
    assert again.scalars() == pytest.approx(metrics.scalars(), rel=1e-3, abs=1e-6)


def test_a_process_without_rows_takes_part(data, files):
    """It adds zeros, and learns what the others have learnt: the same bits, the same metrics."""
    sent = []
    alone = make_trainer(data, files, batch=1)
    first = make_trainer(data, files, batch=1, rank=0, world=2)
    second = make_trainer(data, files, batch=1, rank=1, world=2)
    first.all_reduce, second.all_reduce = lambda t: sent.append(t.clone()), lambda t: t.add_(sent.pop(0))
    for _ in range(3):
        metrics = [trainer.train_step() for trainer in (first, second, alone)]
        for trainer in (first, second, alone):
            trainer.step += 1
        assert not sent and metrics[0].scalars() == metrics[1].scalars() == metrics[2].scalars()
    assert not batches_of(second)
    for a, b, c in zip(first.optimizer.ema, second.optimizer.ema, alone.optimizer.ema):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_fp16_skips_a_loss_scale_that_is_too_large_and_lowers_it(data, files):
    """An infinite gradient is the scale's fault until the scale is 1; then it counts, and the scale is resumed."""
    trainer = make_trainer(data, files, dtype="fp16", steps=9)
    exact = make_trainer(data, files, steps=9)
    metrics = trainer.train_step()
    assert not metrics.skipped and metrics.loss_scale == 2.0**16
    assert metrics.grad_norm == pytest.approx(exact.train_step().grad_norm, 1e-4)
    optimizer = trainer.optimizer
    optimizer.parameters[0].register_hook(lambda gradient: gradient / 0)
    assert trainer.train_step().skipped and optimizer.skipped == 0 and optimizer.scaler.get_scale() == 2.0**15
    optimizer.scaler.update(1.0)
    assert trainer.train_step().skipped and optimizer.skipped == 1
    again = make_trainer(data, files, dtype="fp16", steps=9)
    again.load_state_dict(1, trainer.state_dict())
    assert again.optimizer.scaler.state_dict() == optimizer.scaler.state_dict() and again.optimizer.skipped == 1


def test_rows_of_other_sizes_and_schedules_share_no_batch(data, files):
    """Rows of one layout meet across teachers; another schedule or another layout makes another batch."""
    other = torch.cat([torch.linspace(1, 0.1, 4), torch.zeros(1)])
    drawn, edited = data.conditions["generation"], data.conditions["editing"]
    datasets = {
        "generation": ConditionDataset([(drawn.rows(slice(0, 2)), data.sigmas), (drawn.rows(slice(2, 4)), other)]),
        "editing": ConditionDataset([(drawn, data.sigmas), (edited, other)]),
    }
    trainer = make_trainer(data, files, datasets=datasets, batch=32)
    batches = batches_of(trainer)
    assert sum(len(batch.rows) for batch in batches) == 32 and len(batches) == 3
    seen = {(batch.condition.context is None, len(batch.sigmas)): set(batch.teacher_index) for batch in batches}
    assert seen == {(True, 7): {0, 1}, (True, 5): {0}, (False, 5): {1}}
    trainer.train_step()
    mixed = datasets["generation"]
    assert len(mixed) == 4 and torch.equal(mixed.sigmas(3), other) and of_one_layout(mixed, 4) == [0, 1, 2, 3]
    assert of_one_layout(datasets["editing"], 9) == [0, 1, 2, 3]
    for key in KLEIN.prompt_kwargs:
        assert torch.equal(mixed.rows([3, 0, 2]).kwargs[key], drawn.kwargs[key][[3, 0, 2]])
    with pytest.raises(IndexError):
        mixed.layout(4)


# Callbacks


class Logged(Callback):
    """Notes what it is called with, in a list that several may share."""

    def __init__(self, name: str = "", log: list | None = None) -> None:
        self.name, self.log = name, [] if log is None else log

    def on_train_start(self, trainer: Trainer) -> None:
        self.log.append((self.name, "train start", trainer.step))

    def on_step_start(self, trainer: Trainer) -> None:
        self.log.append((self.name, "step start", trainer.step))

    def on_step_end(self, trainer: Trainer, metrics) -> None:
        self.log.append((self.name, "step end", trainer.step))


def test_callbacks_are_called_in_their_order_and_one_may_stop_the_run(data, files):
    class Stop(Logged):
        def on_step_end(self, trainer, metrics):
            super().on_step_end(trainer, metrics)
            metrics.extra["stopped"] = 1.0
            trainer.should_stop = trainer.step == 2

    log, record = [], Recorder()
    trainer = make_trainer(data, files, callbacks=[Stop("a", log), Logged("b", log), record])
    trainer.train()
    both = [("a", what, step) for what, step in (("step start", 1), ("step end", 2))]
    assert log[:2] == [("a", "train start", 0), ("b", "train start", 0)]
    assert [entry for entry in log if entry[0] == "a"][-2:] == both and log[-1] == ("b", "step end", 2)
    assert log[2:6] == [(n, w, s) for w, s in (("step start", 0), ("step end", 1)) for n in "ab"]
    assert trainer.step == 2 == len(record.metrics) and record.metrics[0].scalars()["stopped"] == 1.0
    trainer = make_trainer(data, files, callbacks=[record])
    trainer.should_stop = True  # before the first update: none is taken
    trainer.train()
    assert trainer.step == 0 and len(record.metrics) == 2


def test_a_callback_that_restores_an_earlier_step_ends_the_steps_callbacks(data, files):
    """Those before it have seen the step, those after it have not; the step is taken again, as it was."""
    log = []

    class Restore(Callback):
        def on_train_start(self, trainer):
            self.state = {k: v.clone() for k, v in trainer.state_dict().items()}

        def on_step_end(self, trainer, metrics):
            if trainer.step == 2 and self.state:
                trainer.load_state_dict(0, self.state)
                self.state = None

    trainer = make_trainer(data, files, steps=3, callbacks=[Logged("a", log), Restore(), Logged("b", log)])
    trainer.train()
    ends = {name: [step for who, what, step in log if (who, what) == (name, "step end")] for name in "ab"}
    assert ends == {"a": [1, 2, 1, 2, 3], "b": [1, 1, 2, 3]}
    plain = make_trainer(data, files, steps=3)
    train(plain)
    for a, b in zip(plain.optimizer.ema, trainer.optimizer.ema):
        assert torch.equal(a, b)


class Counting(Callback):
    """Counts updates, as a plain value and as a tensor."""

    def __init__(self) -> None:
        self.count, self.total, self.seen = 0, torch.zeros(2), {}

    def on_step_end(self, trainer, metrics):
        self.count, self.total = self.count + 1, self.total + trainer.step

    def state_dict(self):
        return {"count": self.count, "total": self.total}

    def load_state_dict(self, trainer, state):
        self.count, self.total, self.seen = state["count"], state["total"], dict(state)


def test_callbacks_states_are_part_of_a_checkpoint(data, files):
    """Plain values and tensors of every part come back with the trainer's own; facts stand beside them."""
    recipe = Recipe(**files, output="out", steps=6)
    processes = Processes("cpu")
    counting = Counting()
    with RunDirectory("out", recipe) as run:
        checkpoints = Checkpoints(run, processes, 2, [counting], {"weights": "these"})
        first = make_trainer(data, files, callbacks=[counting, checkpoints])
        assert checkpoints.restore(first) is None
        train(first, 3)  # saved after 2, and at the end
        assert sorted(p.name for p in run.checkpoints.folder.iterdir()) == ["step-000002", "step-000003"]
    again = Counting()
    with RunDirectory("out", recipe) as run:
        checkpoints = Checkpoints(run, processes, 2, [again], {"weights": "these"})
        second = make_trainer(data, files, callbacks=[again, checkpoints])
        facts = checkpoints.restore(second)
        assert facts["count"] == 3 == again.count and facts["weights"] == "these" and second.step == 3
        assert torch.equal(again.total, torch.tensor([6.0, 6.0])) and "weight.0" in again.seen
        train(second)
        assert run.checkpoints.load().step == 6
    whole = make_trainer(data, files)
    train(whole)
    assert again.count == 6 and torch.equal(again.total, torch.tensor([21.0, 21.0]))
    for a, b in zip(whole.optimizer.ema, second.optimizer.ema):
        assert torch.equal(a, b)
