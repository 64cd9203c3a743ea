"""Rewards: each formula by hand, the region of an edit, the user's own, scores inside groups, and their recipe part."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from flows import Gaussian
from tiny_trainer import NAMES, make_trainer, tiny_data

from danceopd.errors import UserError
from danceopd.labelfree.rewards import (
    REWARDS,
    Group,
    combined,
    consensus,
    likelihood,
    own,
    preserve,
    rewards_of,
    standard_scores,
)  # fmt: skip
from danceopd.labelfree.rewards.agreement import edit_region
from danceopd.models.fields import AdapterField, BaseField, GuidedField
from danceopd.pipelines.condition import Condition
from danceopd.recipe.nft import NFT


@pytest.fixture(scope="module")
def data():
    return tiny_data()


def group_of(clean, context=None, family="flux2-klein", seed=3):
    """A group with or without a source, of tokens (n, C) or of pictures (C, h, w)."""
    kwargs = {"prompt": torch.zeros(1, 1)}
    if context is None:
        return Group(clean, Condition(family, tuple(clean.shape[1:]), kwargs), seed)
    return Group(clean, Condition(family, tuple(clean.shape[1:]), kwargs, context[None]), seed)


def pictures(*edits, side=6, rest=0.0):
    """Samples (G, 2, side, side) and a source of noise: each edit (row, column, size, value) is put on the source."""
    source = torch.rand(2, side, side, generator=torch.Generator().manual_seed(0))
    clean = source.repeat(len(edits), 1, 1, 1)
    for sample, (row, column, size, value) in zip(clean, edits):
        sample += rest
        sample[:, row : row + size, column : column + size] = value
    return group_of(clean, source.flatten(1).T, "z-image")


# -- likelihood -------------------------------------------------------------------------------------------


def test_likelihood_is_minus_the_loss_over_levels_and_draws_with_one_noise_for_the_group():
    asked = []

    def field(x, sigma, condition):
        asked.append((x, sigma))
        return 0.5 * x + sigma[:, None, None]

    groups = [group_of(torch.randn(3, 4, 2), seed=s) for s in (5, 6)]
    found = likelihood(field, levels=(0.8, 0.3), draws=2)(groups)
    assert found.shape == (2, 3) and len(asked) == 4  # both groups in one call
    for q, group in enumerate(groups):
        noises = torch.randn(4, 4, 2, generator=torch.Generator().manual_seed(group.seed))
        for g, clean in enumerate(group.clean):
            losses = []
            for level, noise in zip((0.8, 0.8, 0.3, 0.3), noises):
                v = 0.5 * ((1 - level) * clean + level * noise) + level
                losses.append(float((v - (noise - clean)).square().mean()))
            assert found[q, g] == pytest.approx(-sum(losses) / 4, rel=1e-5)


def test_likelihood_asks_few_rows_at_a_time_and_says_the_same():
    sizes = []

    def field(x, sigma, condition):
        sizes.append(len(x))
        assert len(condition) == len(x)
        return 0.1 * x

    groups = [group_of(torch.randn(3, 4, 2), seed=s) for s in range(4)]
    some = likelihood(field, rows=7, draws=1)(groups)
    assert set(sizes) == {6}
    torch.testing.assert_close(some, likelihood(field, draws=1)(groups))
    assert sizes[-1] == 12


def test_likelihood_prefers_what_the_field_would_draw():
    """For a normal distribution about 1 a sample at its middle is likelier than one two deviations off."""
    flow = Gaussian(1.0, 0.5)

    def field(x, sigma, condition):
        slope, offset = flow.line(sigma[:, None])
        return slope * x + offset

    (found,) = likelihood(field, draws=16)([group_of(torch.tensor([[1.0], [2.0], [0.4]]))])
    assert found.argsort().tolist() == [1, 2, 0]


# -- the region of an edit, consensus, preserve ---------------------------------------------------------------


def test_the_region_is_where_most_samples_change_the_source():
    region, source = edit_region(pictures((0, 0, 2, 5.0), (0, 0, 2, 5.0), (4, 4, 2, 5.0), (0, 0, 2, 4.0)))
    assert region.shape == (1, 1, 6, 6) and source.shape == (1, 2, 6, 6)
    assert region[0, 0, 0, 0] == 1 and region[0, 0, 4:, 4:].max() == 0


def test_consensus_is_the_medoid_inside_the_region():
    group = pictures((0, 0, 2, 5.0), (0, 0, 2, 5.2), (0, 0, 2, 5.1), (0, 0, 2, 9.0))
    (found,) = consensus([group])
    assert found.argsort(descending=True).tolist()[-1] == 3 and found.argmax() in (1, 2)
    mask = edit_region(group)[0].expand(1, 2, 6, 6)
    x, weight = group.clean, mask / mask.sum()
    by_hand = [-sum(math.sqrt(float((weight * (a - b) ** 2).sum())) for b in x) / 3 for a in x]
    torch.testing.assert_close(found, torch.tensor(by_hand), atol=1e-5, rtol=1e-4)
    elsewhere = group.clean.clone()
    elsewhere[3, :, 5, 5] += 50  # outside: nothing that consensus looks at
    torch.testing.assert_close(consensus([Group(elsewhere, group.condition, 0)])[0], found)


def test_preserve_is_what_changed_outside_the_region():
    group = pictures((0, 0, 2, 5.0), (0, 0, 2, 7.0), (0, 0, 2, 5.0))
    clean = group.clean.clone()
    clean[2, :, 5, 5] += 3.0
    (found,) = preserve([Group(clean, group.condition, 0)])
    assert found[0] == found[1] == 0
    outside = (edit_region(group)[0] < 0.25).sum()
    assert found[2] == pytest.approx(-9.0 / float(outside), rel=1e-5)


@pytest.mark.parametrize("reward", [consensus, preserve])
def test_without_a_source_or_a_change_they_say_nothing(reward):
    untouched = pictures((0, 0, 0, 0.0), (0, 0, 0, 0.0))
    for group in (group_of(torch.randn(3, 4, 2)), group_of(torch.randn(3, 4, 2), torch.zeros(5, 2)), untouched):
        assert reward([group]).isnan().all()


def test_preserve_says_nothing_of_a_change_of_everything():
    assert preserve([pictures((0, 0, 6, 5.0), (0, 0, 6, 4.0))]).isnan().all()


# -- scores in groups -----------------------------------------------------------------------------------------


def test_standard_scores_inside_each_group():
    found = standard_scores(torch.tensor([[1.0, 2.0, 3.0], [5.0, 5.0, 5.0], [1.0, math.nan, 3.0]]))
    torch.testing.assert_close(found[0], torch.tensor([-1.5, 0.0, 1.5]) * math.sqrt(2 / 3))
    assert found[1].tolist() == [0, 0, 0] and found[2].isnan().all()
    assert standard_scores(torch.tensor([[1.0, 1.0 + 1e-9]])).tolist() == [[0, 0]]


def test_rewards_add_up_by_weight_where_they_say_something():
    nan = float("nan")
    rewards = {
        "a": torch.tensor([[0.0, 2.0], [0.0, 2.0], [nan, nan]]),
        "b": torch.tensor([[9.0, 3.0], [nan, nan], [nan, nan]]),
    }
    found = combined(rewards, {"a": 3.0, "b": 1.0})
    torch.testing.assert_close(found, torch.tensor([[-0.5, 0.5], [-1.0, 1.0], [0.0, 0.0]]))


# -- of a recipe ----------------------------------------------------------------------------------------------


def test_rewards_of_a_recipe_ask_the_routed_teacher_without_guidance(data, files, tmp_path):
    text = "def first(groups, scale=1.0):\n    return scale * groups[0].clean[None, :, 0, 0]\n"
    (tmp_path / "my_rewards.py").write_text(text)
    trainer = make_trainer(data, files)
    guided = lambda t: GuidedField(t.field, data.conditions[t.name].rows([0]), 2.0)  # noqa: E731
    teachers = [replace(t, field=guided(t)) for t in trainer.teachers]
    part = NFT(rewards={
        "likelihood": 1, "preserve": 0.5, "my_rewards:first": {"options": {"scale": 2.0}},
    })  # fmt: skip
    base = BaseField(trainer.backbone)
    made = rewards_of(part, teachers, base)
    assert list(made) == list(NAMES) and list(made["editing"]) == list(part.rewards)
    condition = data.conditions["editing"].rows([1])
    group = Group(torch.randn(2, *condition.shape), condition, 0)
    for name in NAMES:
        found = made[name]["likelihood"]([group])
        torch.testing.assert_close(found, likelihood(AdapterField(trainer.backbone, name))([group]))
    torch.testing.assert_close(made["editing"]["my_rewards:first"]([group]), 2 * group.clean[None, :, 0, 0])
    by_base = rewards_of(NFT(rewards={"likelihood": {"teacher": "base", "levels": [0.8]}}), teachers, base)
    torch.testing.assert_close(by_base["editing"]["likelihood"]([group]), likelihood(base, [0.8])([group]))
    assert set(REWARDS) == {"likelihood", "consensus", "preserve"}


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("def score(groups):\n    return 1.0\n", "returned a float; let it return a tensor of shape (1, 3)"),
        ("def score(groups):\n    return groups[0].clean\n", "returned shape (3, 4, 2); let it return a tensor"),
        ("def other(groups):\n    return 1.0\n", "has no 'score'"),
        ("import nowhere_at_all\n", "does not import (ModuleNotFoundError"),
    ],
)
def test_a_wrong_own_reward_is_refused_in_one_sentence(tmp_path, monkeypatch, text, sentence):
    monkeypatch.chdir(tmp_path)
    module = f"own_{abs(hash(sentence))}"
    (tmp_path / f"{module}.py").write_text(text)
    with pytest.raises(UserError) as error:
        own(f"{module}:score")([group_of(torch.randn(3, 4, 2))])
    assert sentence in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "rewards, sentence",
    [
        ({"likelyhood": 1}, "there is no reward 'likelyhood'; did you mean 'likelihood'?"),
        ({"likelihood": {"levls": [0.5]}}, "unknown key 'levls' in reward likelihood; did you mean 'levels'?"),
        ({"likelihood": 0}, "weight is 0 in reward likelihood"),
        ({"likelihood": {"levels": [1.5]}}, "levels.0 is 1.5 in reward likelihood"),
        ({"consensus": {"draws": 2}}, "unknown key 'draws' in reward consensus"),
        ({}, "at least 1 item"),
    ],
)
def test_a_wrong_reward_in_a_recipe(rewards, sentence):
    with pytest.raises(ValueError) as error:
        NFT(rewards=rewards)
    assert sentence in str(error.value)


def test_the_part_survives_its_own_dump():
    part = NFT(rewards={"likelihood": {"levels": [0.8]}, "a.b:c": {"weight": 2, "options": {"x": 1}}})
    assert NFT(**part.model_dump(mode="json")) == part
