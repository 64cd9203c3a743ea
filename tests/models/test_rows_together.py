"""Teachers asked together are the teachers asked alone, on every family; and a few-step student's mean velocities."""

from __future__ import annotations

import pytest
import torch
from tinies import TINYS
from tiny import CALL, random_adapter, random_image, tiny_klein
from tiny_merge import FAMILY_EDITS, FAMILY_PROMPTS

from danceopd.models.backbone import Backbone
from danceopd.models.fields import AdapterField, Ask, BaseField, GuidedField, MergedField, ask_together, mean_velocity
from danceopd.models.lora import LoraLinear, RowsNotTold
from danceopd.pipelines import EditingPipeline, GenerationPipeline
from danceopd.pipelines.registry import FAMILIES


def backbone_of(tiny, pipe):
    """Two adapters on a tiny pipeline's transformer; the second on some of the layers only, at another strength."""
    family = FAMILIES[tiny.family]
    backbone = Backbone(pipe.transformer, family)
    backbone.add_adapter("t0", random_adapter(pipe.transformer, targets=family.lora_targets, seed=0, size=0.1))
    some = random_adapter(pipe.transformer, targets=family.lora_targets, seed=1, size=0.1)
    some.tensors = dict(list(some.tensors.items())[::2])
    backbone.add_adapter("t1", some, 1.5)
    return backbone


def asks_of(backbone, condition):
    """One row of an adapter, one of the base, one of the other adapter."""
    x = torch.randn(3, *condition.shape, generator=torch.Generator().manual_seed(0))
    fields = AdapterField(backbone, "t1"), BaseField(backbone), MergedField(backbone, "t0")
    sigma = torch.tensor([0.9, 0.6, 0.3])
    return [Ask(f, x[i : i + 1], sigma[i : i + 1], condition.rows([i])) for i, f in enumerate(fields)]


def count_forwards(transformer):
    calls = []
    return calls, transformer.register_forward_hook(lambda *_: calls.append(1))


@pytest.mark.parametrize("tiny", TINYS, ids=lambda tiny: f"{tiny.family}-{tiny.build.__module__}")
def test_adapters_of_one_layout_share_a_forward_on_every_family(tiny):
    pipe, family = tiny.build(), FAMILIES[tiny.family]
    backbone = backbone_of(tiny, pipe)
    for task in tiny.tasks:
        if task == "generation":
            condition = GenerationPipeline(pipe, family, {**tiny.call}).conditions(FAMILY_PROMPTS)
        else:
            images = [random_image(i) for i in range(3)]
            condition = EditingPipeline(tiny.editing(pipe), family, {**tiny.call}).conditions(FAMILY_EDITS, images)
        asks = asks_of(backbone, condition)
        alone = torch.cat([one.field(*one[1:]) for one in asks])
        calls, hook = count_forwards(pipe.transformer)
        first, tried = torch.cat(ask_together(asks)), len(calls)
        again, after = torch.cat(ask_together(asks)), len(calls) - tried
        hook.remove()
        assert after == 1 and tried == 5  # together, then each alone, and the base, to compare
        base = BaseField(backbone)(*(torch.cat([one[i] for one in asks]) for i in (1, 2)), condition)
        change = float((alone - base).abs().max())
        assert float((first - alone).abs().max()) < 1e-4 * change and torch.equal(first, again)
        assert float((alone - base)[1].abs().max()) < 1e-4 * change < change
    assert all(backbone.rows_apart.values())


@pytest.fixture(scope="module")
def klein():
    pipe = tiny_klein()
    family = FAMILIES["flux2-klein"]
    backbone = Backbone(pipe.transformer, family)
    for i in range(2):
        backbone.add_adapter(f"t{i}", random_adapter(pipe.transformer, seed=i, size=0.1))
    how = {key: value for key, value in CALL.items() if key != "steps"} | {"num_inference_steps": 4}
    return backbone, GenerationPipeline(pipe, family, how).conditions([*FAMILY_PROMPTS, "a star"])


def test_guided_teachers_are_asked_together_too(klein):
    backbone, condition = klein
    asks = asks_of(backbone, condition.rows([0, 1, 2]))
    null = condition.rows([3])
    asks = [one._replace(field=GuidedField(one.field, null, 2.0 + i)) for i, one in enumerate(asks[:2])] + asks[2:]
    alone = torch.cat([one.field(*one[1:]) for one in asks])
    ask_together(asks)
    calls, hook = count_forwards(backbone.transformer)
    torch.testing.assert_close(torch.cat(ask_together(asks)), alone, atol=1e-5, rtol=1e-4)
    hook.remove()
    assert len(calls) == 2  # the prompts, and the null prompts


@pytest.mark.parametrize("fault", ["not told", "wrong rows"])
def test_where_rows_cannot_be_told_each_teacher_is_asked_alone(klein, monkeypatch, fault):
    backbone, condition = klein
    asks = asks_of(backbone, condition.rows([0, 1, 2]))
    alone = torch.cat([one.field(*one[1:]) for one in asks])
    monkeypatch.setattr(backbone, "rows_apart", {})
    usual = LoraLinear._by_rows

    def other(layer, x):
        if fault == "not told":
            raise RowsNotTold
        layer.by_rows = [(rows, layer.loras["t0"]) for rows, _ in layer.by_rows]
        return usual(layer, x)

    monkeypatch.setattr(LoraLinear, "_by_rows", other)
    for _ in range(2):
        assert torch.equal(torch.cat(ask_together(asks)), alone)
    assert list(backbone.rows_apart.values()) == [False]
    assert torch.equal(BaseField(backbone)(*asks[1][1:]), alone[1:2])  # and the backbone is as it was


def test_many_rows_of_a_teacher_have_a_forward_of_their_own(klein):
    backbone, condition = klein
    x, sigma = torch.randn(18, *condition.shape), torch.full((18,), 0.5)
    many = condition.rows([0] * 18)
    asks = [Ask(AdapterField(backbone, f"t{i}"), x[i::2], sigma[i::2], many.rows(slice(9))) for i in range(2)]
    calls, hook = count_forwards(backbone.transformer)
    ask_together(asks)
    hook.remove()
    assert len(calls) == 2


def test_memory_grows_by_the_adapters_alone(klein):
    """However many are asked, and merged: weights W + BA have one buffer."""
    backbone, condition = klein
    held = sum(p.numel() for p in backbone.transformer.parameters())
    added = random_adapter(backbone.transformer, seed=3)
    backbone.add_adapter("t3", added)
    x, sigma = torch.randn(4, *condition.shape), torch.full((4,), 0.5)
    buffers = set()
    for name in ("t0", "t1", "t3"):
        MergedField(backbone, name)(x, sigma, condition)
        buffers.add(tuple(weight.data_ptr() for weight in backbone._merged.values()))
    ask_together(asks_of(backbone, condition.rows([0, 1, 2])))
    assert sum(p.numel() for p in backbone.transformer.parameters()) == held + added.parameters and len(buffers) == 1


def test_the_mean_velocity_lands_where_small_steps_land():
    """dx/dσ = x, whose small Euler steps are known; rows at grid points and between them, the last one to 0."""
    sigmas = torch.tensor([1.0, 0.6, 0.25, 0.0])
    sigma, x = torch.tensor([1.0, 0.6, 0.4, 0.25]), torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    to = torch.tensor([0.6, 0.25, 0.25, 0.0])
    seen = []

    def field(x, sigma):
        seen.append(sigma)
        return x

    mean = mean_velocity(field, x, sigma, sigmas, 3)
    landed = x * (1 + (to - sigma)[:, None] / 3) ** 3
    torch.testing.assert_close(x + (to - sigma)[:, None] * mean, landed)
    torch.testing.assert_close(seen[1], sigma + (to - sigma) / 3)
    assert torch.equal(mean_velocity(field, x, sigma, sigmas, 1), x)
