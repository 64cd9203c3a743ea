"""Guidance in training: unconditional rows, guided teachers, guided rollouts of the student."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny import random_adapter, tiny_klein
from tiny_trainer import KLEIN, TinyData, batches_of, make_trainer, null_prompt, query_teachers, tiny_data, train

from danceopd.engine.rollout import rollout
from danceopd.engine.trainer import STUDENT
from danceopd.errors import UserError
from danceopd.models.fields import AdapterField, GuidedField
from danceopd.pipelines.registry import with_prompt_of


@pytest.fixture(scope="module")
def data() -> TinyData:
    return tiny_data()


@pytest.fixture(scope="module")
def null():
    return null_prompt()


def guided_teachers(data, files, null, share, **fields):
    """A trainer whose teachers are guided at 3, and their plain fields."""
    trainer = make_trainer(replace(data, null=null), files, guidance={"unconditional": share}, **fields)
    return trainer, query_teachers(trainer, lambda field: GuidedField(field, null, 3.0))


def test_unconditional_rows_get_the_null_prompt_and_the_unguided_teacher(data, files, null):
    trainer, plain = guided_teachers(data, files, null, 0.4, batch=32)
    count = 0
    for batch in batches_of(trainer):
        x, sigma = batch.noise(), torch.full((len(batch.rows),), 0.7)
        velocity = trainer.velocities.teacher(batch, x, sigma)
        for i, (m, unconditional) in enumerate(zip(batch.teacher_index, batch.unconditional)):
            one = batch.condition.rows([i])
            empty = with_prompt_of(one, null)
            same = all(torch.equal(one.kwargs[key], empty.kwargs[key]) for key in KLEIN.prompt_kwargs)
            assert same == unconditional
            field = plain[m] if unconditional else trainer.velocities.teachers[m]
            torch.testing.assert_close(velocity[i], field(x[i : i + 1], sigma[:1], one)[0], atol=1e-4, rtol=1e-3)
            assert (one.context is None) == (m == 0)  # the source image stays
            count += unconditional
    assert 4 <= count <= 24


def test_absorbed_guidance_does_not_compound_when_the_null_prompt_is_taught_too(data, files, null):
    """A guided student should stand where the guided teacher would: with a null branch left to drift, it does not."""
    error = {}
    for share in (0.0, 0.3):
        trainer, plain = guided_teachers(
            data,
            files,
            null,
            share,
            steps=24,
            batch=8,
            optimizer={"lr": 0.02, "warmup": 1},
            query={"law": "high-noise", "beta": (30.0, 1.0)},  # rollouts of hardly a step
        )
        train(trainer)
        student = AdapterField(trainer.backbone, STUDENT)
        error[share] = {"unconditional": 0.0, "conditional": 0.0}
        for m, teacher in enumerate(trainer.teachers):
            condition = teacher.dataset.rows([0, 1, 2, 3])
            x = torch.randn(4, *condition.shape, generator=torch.Generator().manual_seed(5))
            sigma, empty = torch.full((4,), 1.0), with_prompt_of(condition, null)
            guided = trainer.velocities.teachers[m]
            for name, field, given in (("unconditional", plain[m], empty), ("conditional", guided, condition)):
                difference = student(x, sigma, given) - field(x, sigma, given)
                error[share][name] += float(difference.square().mean())
    assert error[0.3]["unconditional"] < 0.5 * error[0.0]["unconditional"], error
    assert error[0.3]["conditional"] < 2 * error[0.0]["conditional"], error


def test_guided_rollouts_are_the_stock_guidance_of_the_student(data, files, null):
    """`rollout.guidance` rolls the guided student out, and guides neither teacher nor the student's own velocity."""
    init = random_adapter(tiny_klein().transformer, seed=9)
    trainer = make_trainer(replace(data, null=null), files, rollout={"guidance": 2.5}, init=init)
    for batch in batches_of(trainer):
        states = trainer.velocities.rollout(batch, batch.query_step, batch.query_sigma)[:, 0]
        guided = GuidedField(AdapterField(trainer.backbone, STUDENT), null, 2.5)
        stop = batch.query_step[:, 0]
        wanted = rollout(guided, batch.noise(), batch.sigmas, stop.clone(), batch.condition)
        torch.testing.assert_close(states, wanted, atol=1e-3, rtol=1e-3)
        plain = rollout(guided.field, batch.noise(), batch.sigmas, stop, batch.condition)
        assert int(stop.max()) == 0 or (states - plain).abs().max() > 1e-2
        sigma = torch.full((len(states),), 0.5)
        velocity = trainer.velocities.teacher(batch, states, sigma)
        for i, m in enumerate(batch.teacher_index):
            alone = trainer.teachers[m].field(states[i : i + 1], sigma[:1], batch.condition.rows([i]))
            torch.testing.assert_close(velocity[i], alone[0], atol=1e-4, rtol=1e-3)


def test_a_missing_null_prompt_is_refused(data, files):
    for fields in ({"guidance": {"unconditional": 0.1}}, {"rollout": {"guidance": 2.0}}):
        with pytest.raises(UserError, match="needs the null prompt"):
            make_trainer(data, files, **fields)
