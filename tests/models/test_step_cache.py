"""What stays over a walk is computed once, and the walk is the same; whatever could make it stale is noticed."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager

import pytest
import tiny_zimage
import torch
from rollout_cases import CASES, NAMES, RolloutCase, afresh, rollout_case
from tinies import KLEIN
from tiny import random_adapter, random_image
from tiny_qwen import TINY as QWEN
from tiny_qwen import tiny_qwen
from tiny_zimage import tiny_z_image_omni

from danceopd.engine.rollout import rollout
from danceopd.models.backbone import Backbone
from danceopd.models.fields import AdapterField, BaseField, GuidedField, MergedField
from danceopd.pipelines import EditingPipeline, GenerationPipeline
from danceopd.pipelines.registry import FAMILIES

STOPS = torch.tensor([3, 1, 2])


@contextmanager
def counted(backbone: Backbone):
    """Calls of the steady and timed modules' own forwards, by module path."""
    calls: Counter[str] = Counter()
    steady = backbone._steady
    modules = {path: backbone.transformer.get_submodule(path) for path in (*steady.steady, *steady.timed)}

    def own(path, forward):
        def run(*args, **kwargs):
            calls[path] += 1
            return forward(*args, **kwargs)

        return run

    for path, module in modules.items():
        module.forward = own(path, module.forward)
    yield calls
    for module in modules.values():
        del module.forward


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal but for the rounding of a product of another number of rows."""
    return bool((a - b).abs().max() <= 1e-5 * b.abs().max().clamp(min=1))


@pytest.mark.parametrize(("tiny", "task"), CASES, ids=NAMES)
def test_walks_are_the_same_and_each_part_runs_once(tiny, task):
    one = rollout_case(tiny, task)
    backbone, sigmas, steady = one.backbone, one.ours.sigmas(), one.backbone._steady
    field = MergedField(backbone, "student")
    assert steady.steady, "every family has words to embed"
    with counted(backbone) as calls:
        field(one.noise(1, 2, 3), torch.full((3,), 0.5), one.conditions())
        once = dict(calls)
        for turn, condition in enumerate((one.conditions(), one.others(), one.conditions())):
            noise = one.noise(turn, turn + 1, turn + 2)
            calls.clear()
            found = rollout(field, noise, sigmas, STOPS, condition)
            seen = dict(calls)
            assert close(found, rollout(afresh(field), noise, sigmas, STOPS, condition))
            for path in steady.steady:  # where words are cut to the longest row, tables may be made again
                again = 3 if (backbone.family.name, path) == ("qwen-image", "pos_embed") else 1
                assert once.get(path, 0) <= seen.get(path, 0) <= again * once.get(path, 0), path
            for path in steady.timed:
                assert seen.get(path, 0) == (3 * once[path] if turn == 0 else 0), path
            one.update(turn)


def test_a_level_is_known_again_only_where_it_was_asked(monkeypatch):
    """Two levels of modulation are two answers, and a walk that starts elsewhere has no one level."""
    one = rollout_case(KLEIN, "generation")
    field, sigmas, condition = BaseField(one.backbone), one.ours.sigmas(), one.conditions()
    rollout(field, one.noise(1, 2, 3), sigmas, STOPS, condition)
    assert len(one.backbone._steady._levels) == 3
    how = {"start": torch.tensor([0, 1, 2])}
    late = rollout(field, one.noise(4, 5, 6), sigmas, torch.tensor([2, 3, 3]), condition, **how)
    assert close(late, rollout(afresh(field), one.noise(4, 5, 6), sigmas, torch.tensor([2, 3, 3]), condition, **how))
    assert len(one.backbone._steady._levels) == 3
    monkeypatch.setattr("danceopd.models.step_cache.LEVELS", 2)
    rollout(field, one.noise(1, 2, 3), sigmas, STOPS, condition)
    assert len(one.backbone._steady._levels) == 2


def test_what_is_known_of_a_level_does_not_depend_on_who_asked_first():
    """Else a resumed run, which knows nothing, would end at other bytes than the whole one."""
    found = []
    for first in (slice(0, 1), slice(0, 2), None):
        one = rollout_case(KLEIN, "generation")
        field, sigmas, condition = BaseField(one.backbone), one.ours.sigmas(), one.conditions()
        if first is not None:
            rollout(field, one.noise(1, 2, 3)[first], sigmas, STOPS[first], condition.rows(first))
        found.append(rollout(field, one.noise(1, 2, 3), sigmas, STOPS, condition))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_a_field_that_asks_elsewhere_gets_its_own_answer():
    one = rollout_case(KLEIN, "generation")
    inner, others = BaseField(one.backbone), one.others()

    def restless(x, sigma, condition):
        """Half of it asked at another level, and of another condition."""
        return inner(x, sigma, condition) + inner(x, sigma * 0.5, others.rows(slice(0, len(x))))

    noise, sigmas = one.noise(1, 2, 3), one.ours.sigmas()
    for _ in range(2):  # the second walk knows the levels
        found = rollout(restless, noise, sigmas, STOPS, one.conditions())
        assert close(found, rollout(afresh(restless), noise, sigmas, STOPS, one.conditions()))


def test_a_guided_walk_keeps_both_conditions():
    one = rollout_case(KLEIN, "generation")
    null = one.ours.conditions(["a"])
    field = GuidedField(BaseField(one.backbone), null, 3.0)
    noise, sigmas = one.noise(1, 2, 3), one.ours.sigmas()
    with counted(one.backbone) as calls:
        found = rollout(field, noise, sigmas, STOPS, one.conditions())
        assert calls["context_embedder"] <= 1 + 3
    assert close(found, rollout(afresh(field), noise, sigmas, STOPS, one.conditions()))


def test_what_was_written_over_is_computed_again():
    """A condition changed in place, within a walk; the base's weights, between walks."""
    one = rollout_case(KLEIN, "generation")
    field, noise, sigmas = BaseField(one.backbone), one.noise(1, 2, 3), one.ours.sigmas()
    stop = torch.full((3,), 3)

    def change(step, rows, x):
        if step == 1:
            condition.kwargs["encoder_hidden_states"].mul_(2)

    condition = one.conditions()
    found = rollout(field, noise, sigmas, stop, condition, change)
    condition = one.conditions()
    assert close(found, rollout(afresh(field), noise, sigmas, stop, condition, change))
    condition = one.conditions()
    before = rollout(field, noise, sigmas, stop, condition)
    assert not close(found, before)
    with torch.no_grad():
        one.backbone.transformer.single_stream_modulation.linear.weight.mul_(1.5)
    after = rollout(field, noise, sigmas, stop, condition)
    assert close(after, rollout(afresh(field), noise, sigmas, stop, condition)) and not close(after, before)


@pytest.mark.parametrize("merged", [True, False])
def test_adapters_of_the_steady_layers_act(merged):
    """An adapter on words and modulation: the words are kept for the walk, the modulation is not kept at all."""
    pipe = KLEIN.build()
    family = FAMILIES[KLEIN.family]
    backbone = Backbone(pipe.transformer, family)
    targets = r"context_embedder|single_stream_modulation\.linear|transformer_blocks\.0\.attn\.to_q"
    backbone.add_adapter("student", random_adapter(pipe.transformer, targets=targets, size=0.5), trainable=True)
    one = RolloutCase(backbone, GenerationPipeline(pipe, family, KLEIN.call), "generation", "cpu")
    field = MergedField(backbone, "student") if merged else AdapterField(backbone, "student")
    noise, sigmas, condition = one.noise(1, 2, 3), one.ours.sigmas(), one.conditions()
    rollout(BaseField(backbone), noise, sigmas, STOPS, condition)  # the base's modulation is known, and not asked
    walks = []
    for turn in range(2):
        walks.append(rollout(field, noise, sigmas, STOPS, condition))
        assert close(walks[-1], rollout(afresh(field), noise, sigmas, STOPS, condition))
        one.update(turn)
    assert not close(*walks)
    assert len(backbone._steady._levels) == 3


def test_times_of_two_kinds_in_one_batch_are_left_alone():
    """Qwen-Image-Edit 2511 modulates source tokens at time 0: rows of modulation are not all alike."""
    pipe = tiny_qwen(zero_cond_t=True)
    family = FAMILIES[QWEN.family]
    backbone = Backbone(pipe.transformer, family)
    edit = EditingPipeline(QWEN.editing(pipe), family, QWEN.call)
    condition = edit.conditions(["make it red", "remove the star"], [random_image(i) for i in range(2)])
    field, noise, stop = BaseField(backbone), edit.noise([1, 2]), torch.tensor([2, 3])
    for _ in range(2):
        found = rollout(field, noise, edit.sigmas(), stop, condition)
        assert close(found, rollout(afresh(field), noise, edit.sigmas(), stop, condition))


def test_siglip_features_of_a_source_are_refined_once():
    pipe, tiny = tiny_z_image_omni(), tiny_zimage.OMNI
    edit = EditingPipeline(pipe, FAMILIES["z-image"], tiny.call)
    backbone = Backbone(pipe.transformer, FAMILIES["z-image"])
    condition = edit.conditions(["make it red"] * 3, [random_image(i) for i in range(3)])
    field, noise = BaseField(backbone), edit.noise([1, 2, 3])
    assert any(path.startswith("siglip_refiner") for path in backbone._steady.steady)
    with counted(backbone) as calls:
        found = rollout(field, noise, edit.sigmas(), STOPS, condition)
        assert calls["siglip_embedder"] == calls["siglip_refiner.0"] == calls["context_refiner.0"] == 1
    assert close(found, rollout(afresh(field), noise, edit.sigmas(), STOPS, condition))


def test_who_writes_into_what_is_kept_is_told():
    one = rollout_case(KLEIN, "generation")
    hook = one.backbone.transformer.context_embedder.register_forward_hook(lambda _, args, out: out.mul_(1.0))
    with pytest.raises(RuntimeError, match="had kept"):
        rollout(BaseField(one.backbone), one.noise(1, 2, 3), one.ours.sigmas(), STOPS, one.conditions())
    hook.remove()
    assert not any("forward" in module.__dict__ for module in one.backbone.transformer.modules())


def test_nothing_is_kept_with_a_gradient_or_in_compiled_blocks():
    one = rollout_case(KLEIN, "generation")
    backbone, condition, noise = one.backbone, one.conditions(), one.noise(1, 2, 3)
    seen = []

    def asking(x, sigma, asked):
        with torch.enable_grad(), backbone.acting_as("student"):
            velocity = backbone.velocity(x, sigma, asked)
        seen.append(velocity.requires_grad)
        return velocity.detach()

    with counted(backbone) as calls:
        rollout(asking, noise, one.ours.sigmas(), STOPS, condition)
    assert seen == [True] * 3 and calls["context_embedder"] == 3
    backbone.transformer.context_embedder.compile(backend="eager")
    with counted(backbone) as calls:
        rollout(BaseField(backbone), noise, one.ours.sigmas(), STOPS, condition)
    assert calls["context_embedder"] == 3 and calls["pos_embed"] == 2  # words and picture
