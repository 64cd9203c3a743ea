"""Cached source keys and values: equal to the stock KV pipeline, and refused where that would be wrong."""

from __future__ import annotations

from contextlib import nullcontext
from importlib import import_module

import pytest
import torch
from tinies import TINYS
from tiny import random_adapter, random_image, tiny_klein
from tiny_klein_kv import TINY, tiny_klein_kv
from tiny_merge import family_recipe
from tiny_parts import recorded_steps

import danceopd
from danceopd.adapters.read import read_adapter
from danceopd.engine.rollout import rollout
from danceopd.errors import UserError
from danceopd.kernels import attention, installed, processors, using
from danceopd.kernels.processors import FusedFlux2ParallelKV, FusedFluxKV
from danceopd.models.backbone import Backbone
from danceopd.models.fields import AdapterField, BaseField, MergedField
from danceopd.models.source_cache import check_source_cache, with_cached_source
from danceopd.pipelines import EditingPipeline, GenerationPipeline
from danceopd.pipelines.registry import FAMILIES

FAMILY = FAMILIES[TINY.family]
WORDS = ["make it red", "remove the star", "add a ring"]


@pytest.fixture(scope="module")
def kv():
    pipe = tiny_klein_kv()
    backbone = Backbone(pipe.transformer, FAMILY)
    backbone.add_adapter("student", random_adapter(pipe.transformer, size=0.1))
    edit = EditingPipeline(pipe, FAMILY, TINY.call)
    return pipe, backbone, edit, edit.conditions(WORDS, [random_image(i, 64, 96) for i in range(3)])


def count(transformer):
    """Image tokens (source and picture) of every call."""
    seen = []
    hook = transformer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["hidden_states"].shape[1]), with_kwargs=True
    )
    return seen, hook


@pytest.mark.parametrize("fused", [False, True])
def test_a_rollout_with_a_cached_source_is_the_stock_pipelines(kv, fused):
    """Every state of the stock run, which fills its own cache at the first step; the source is computed once."""
    pipe, backbone, edit, _ = kv
    call = {**FAMILY.guidance_off, **TINY.call, "prompt": WORDS[0], "image": random_image(0, 64, 96)}
    call["num_inference_steps"] = call.pop("steps")
    steps = recorded_steps(pipe, **call, output_type="latent", generator=torch.Generator().manual_seed(3))[1]
    field, condition = BaseField(backbone), edit.conditions(WORDS[:1], [random_image(0, 64, 96)])
    seen, hook = count(pipe.transformer)
    with installed(pipe.transformer) if fused else nullcontext():
        states = list(edit.denoise(with_cached_source(field, condition), edit.noise([3]), field))
    hook.remove()
    assert seen == [24 + 1, 16, 16, 16, 16]  # source and one image token; then the image alone
    assert len(steps) == len(states) - 1 == 4
    for state, (velocity, x, _) in zip(states, steps):
        assert (state.velocity - velocity).abs().max() < 1e-5 * velocity.abs().max()
        assert (state.x - x).abs().max() < 1e-5


@pytest.mark.parametrize("kind", [AdapterField, MergedField])
def test_rows_leave_and_keep_their_own_source(kv, kind):
    """A ragged rollout of three sources with an adapter: the same states, and each source matters."""
    _, backbone, edit, condition = kv
    field, noise, sigmas = kind(backbone, "student"), edit.noise([1, 2, 3]), edit.sigmas()
    stop = torch.tensor([1, 4, 3])
    plain = rollout(field, noise, sigmas, stop, condition)
    kept = with_cached_source(field, condition)
    assert kept.context is None and len(kept) == 3 and condition.context is not None
    assert (rollout(field, noise, sigmas, stop, kept) - plain).abs().max() < 1e-5
    others = with_cached_source(field, edit.conditions(WORDS, [random_image(i + 5, 64, 96) for i in range(3)]))
    assert (rollout(field, noise, sigmas, stop, others) - plain).flatten(1).abs().amax(1).min() > 1e-3
    base = with_cached_source(BaseField(backbone), condition)
    assert (rollout(field, noise, sigmas, stop, base) - plain).abs().max() > 1e-3  # the weights that computed it matter


def test_the_kernels_attend_to_a_cached_source(kv, monkeypatch):
    """Through the fused processors, which give the cached keys and values to `attend` apart."""
    pipe, backbone, edit, condition = kv
    field, x = BaseField(backbone), edit.noise([1, 2, 3])
    kept, sigma = with_cached_source(field, condition), torch.tensor([0.9, 0.5, 0.2])
    plain = field(x, sigma, kept)
    seen = []

    def spy(q, k, v, mask=None, source=None):
        seen.append(source.k.shape[1])
        return attention.attend(q, k, v, mask, source)

    monkeypatch.setattr(processors, "attend", spy)
    with installed(pipe.transformer), using("op"):
        found = {type(m.processor) for m in pipe.transformer.modules() if hasattr(m, "processor")}
        assert found == {FusedFluxKV, FusedFlux2ParallelKV}
        assert torch.equal(field(x, sigma, kept), plain)
        assert seen == [24] * 4
        assert torch.equal(field(x, sigma, condition), BaseField(backbone)(x, sigma, condition))
    assert torch.equal(field(x, sigma, kept), plain)


def test_a_prompt_alone_has_no_source_to_cache(kv):
    pipe, backbone, *_ = kv
    condition = GenerationPipeline(pipe, FAMILY, TINY.call).conditions(["a red circle"])
    assert with_cached_source(BaseField(backbone), condition) is condition


@pytest.mark.parametrize("tiny", TINYS, ids=lambda tiny: tiny.family)
def test_refused_in_one_sentence_where_sources_see_the_image(tiny):
    family = FAMILIES[tiny.family]
    if family.cache_source is not None:
        return check_source_cache(family)
    with pytest.raises(UserError, match=r"rollout\.cache_source.*leave it out") as refused:
        check_source_cache(family)
    assert tiny.family in str(refused.value) and "\n" not in str(refused.value)


def test_a_merge_refuses_before_weights_load(tmp_path, monkeypatch):
    recipe = family_recipe(TINYS[0], tiny_klein(), tmp_path)
    recipe = danceopd.Recipe(**{**recipe.resolved(), "rollout": {"steps": 2, "cache_source": True}})
    monkeypatch.setattr(import_module("danceopd.assembly"), "load_base", lambda *a: pytest.fail("loaded"))
    with pytest.raises(UserError, match="cache_source.*flux2-klein see the noisy ones"):
        danceopd.merge(recipe, report=lambda done, steps: None)


def test_processors_without_a_cache_are_refused(kv):
    _, _, edit, condition = kv
    plain = tiny_klein()
    field = BaseField(Backbone(plain.transformer, FAMILY))
    with pytest.raises(UserError, match="load the base as a Flux2KleinKVPipeline"):
        field(edit.noise([1, 2, 3]), torch.tensor([0.9, 0.5, 0.2]), condition)


def test_a_merge_with_cached_sources_gives_the_same_student(tmp_path):
    """From end to end."""
    students = []
    for cached in (False, True):
        folder = tmp_path / str(cached)
        folder.mkdir()
        recipe = family_recipe(TINY, tiny_klein_kv(), folder).resolved()
        recipe["rollout"] |= {"steps": 3, "cache_source": cached}
        danceopd.merge(danceopd.Recipe(**recipe), report=lambda done, steps: None)
        students.append(read_adapter(folder / "student"))
    for path, pair in students[0].tensors.items():
        for a, b in zip(pair, students[1].tensors[path]):
            assert (a - b).norm() <= 1e-3 * a.norm()
