"""nft.contexts: losers are finished by the teacher with and without a context, counted, and what wins is fed back."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_merge import WEIGHTS, run, tiny_recipe
from tiny_trainer import batches_of, make_trainer, tiny_data

from danceopd.engine.rollout import rollout
from danceopd.errors import UserError
from danceopd.labelfree.nft.contexts import Loser
from danceopd.labelfree.nft.cost import nft_forwards
from danceopd.models.fields import GuidedField
from danceopd.plan import plan
from danceopd.recipe.recipe import Recipe

NFT = {"group": 2, "round": 2, "reuse": 1, "share": 0.5, "context_scale": 4.0}


@pytest.fixture(scope="module")
def data():
    return tiny_data(variants=True)


def trainer_with(data, files, *contexts):
    trainer = make_trainer(
        data, files, objective="nft", batch=8, rollout={"steps": 3}, nft=NFT | {"contexts": contexts}
    )
    for callback in trainer.callbacks:
        callback.on_step_start(trainer)
    return trainer


def sampled(trainer):
    """The next update's batches, each with its rows' numbers in their teachers' data."""
    seen, contexts = [], trainer.hook.contexts
    of_batch = contexts.of_batch

    def record(batch, samples):
        seen.append(samples)
        return of_batch(batch, samples)

    contexts.of_batch = record
    found = list(zip(batches_of(trainer), seen, strict=True))
    contexts.of_batch = of_batch
    return found


def fold(contexts):
    contexts.fold(lambda tensor: None, torch.device("cpu"))


@pytest.mark.parametrize("name", ["guided", "caption"])
def test_a_loser_is_finished_twice_from_where_the_samples_parted(data, files, name):
    trainer = trainer_with(data, files, name)
    contexts, teachers = trainer.hook.contexts, trainer.batches.teachers
    batch, samples = sampled(trainer)[0]
    contexts._noted.zero_()  # of the batch's own losers
    groups, seen = trainer.hook._groups(batch, batch.ranked.clean), []

    def scores(groups, teachers):
        seen.extend(groups)
        return torch.tensor([[0.0, 1.0, 0.4, 0.6]]).expand(len(groups), 4)  # the original samples' mean is 0.5

    contexts.scores = scores
    row = 2
    loser = Loser(row, 1, torch.randn(batch.condition.shape), groups[1])
    contexts.try_on(batch, [loser], samples)
    m, sigmas, stop = batch.teacher_index[row], batch.sigmas[1:], torch.tensor([len(batch.sigmas) - 2])
    mine = batch.condition.rows([row])
    with_it, longer = teachers[m].field, mine
    if name == "guided":
        with_it = GuidedField(with_it, data.null, 4.0)
    else:
        longer = teachers[m].variants["expanded"].rows([samples[row]])
    alone = rollout(teachers[m].field, loser.state[None], sigmas, stop, mine)
    given = rollout(with_it, loser.state[None], sigmas, stop, longer)
    assert not torch.allclose(alone, given)
    torch.testing.assert_close(seen[0].clean, torch.cat([groups[1].clean, alone, given]))
    fold(contexts)
    assert contexts.sums[m, 0].tolist() == [1, 0, 1, 1]  # tried, won alone, won with it, differ
    assert contexts.facts() == {
        teachers[m].name: {
            name: {"tried": 1, "winners": 1.0, "winners of the teacher alone": 0.0, "given": False}
        }
    }


@pytest.mark.parametrize(("alone", "given", "differ", "earned"), [
    (4, 12, 8, True),  # 8 of 16 more, and never less
    (8, 9, 7, False),  # one more of sixteen
    (12, 4, 8, False),
])  # fmt: skip
def test_a_context_is_given_that_makes_more_winners_by_more_than_chance(data, files, alone, given, differ, earned):
    trainer = trainer_with(data, files, "caption", "guided")
    contexts = trainer.hook.contexts
    editing = 1
    contexts._noted[editing, 1] = torch.tensor([15.0, alone, given, differ])
    fold(contexts)
    assert contexts.given(editing) is None  # fifteen are too few
    contexts._noted[editing, 1] = torch.tensor([1.0, 0, 0, 0])
    fold(contexts)
    assert contexts.given(0) is None and contexts.given(editing) == ("guided" if earned else None)
    (sentence,) = contexts.sentences()["editing"]
    assert trainer.hook.facts()["editing"]["summary"] == [sentence]
    assert "With guidance editing made" in sentence and ("is given" in sentence) == earned
    contexts._noted[editing, 1] = torch.tensor([496.0, 0, 0, 0])  # 512 tried: half of them fade
    fold(contexts)
    assert contexts.sums[editing, 1, 0] == 256 and contexts.sums[editing, 1, 2] == given / 2


@pytest.mark.parametrize("name", ["guided", "caption"])
def test_the_teacher_that_earned_it_answers_with_it_in_later_updates(data, files, name):
    trainer = trainer_with(data, files, name)
    contexts = trainer.hook.contexts
    contexts.sums[1, 0] = torch.tensor([32, 0, 32, 32])
    teachers = trainer.batches.teachers
    for batch, samples in sampled(trainer):
        x, sigma = batch.noise("state"), torch.full((len(batch),), 0.7)
        found = trainer.velocities.teacher(batch, x, sigma)
        for row, m in enumerate(batch.teacher_index):
            field, condition = teachers[m].field, batch.condition.rows([row])
            if m == 1 and name == "guided":
                field = GuidedField(field, data.null, 4.0)
            elif m == 1:
                condition = teachers[m].variants["expanded"].rows([samples[row]])
            torch.testing.assert_close(found[[row]], field(x[[row]], sigma[[row]], condition))
        assert (batch.context is None) == (1 not in batch.teacher_index)
    contexts.sums.zero_()
    assert all(batch.context is None for batch in batches_of(trainer))


def test_a_run_is_continued_to_the_same_bytes_and_keeps_what_it_tried(models, tmp_path):
    options = {
        "objective": "nft", "batch": 4, "steps": 4, "save_every": 1, "monitor": {"every": 0},
        "validation": {"every": 0}, "nft": {**NFT, "contexts": ["guided", "caption"], "round": 4, "reuse": 2},
    }  # fmt: skip
    whole, again = (tiny_recipe(models, tmp_path / name, **options) for name in ("whole", "again"))
    run(whole)
    run(again, kill=3)
    run(again)
    for name in (WEIGHTS, "skills.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    skills = json.loads((tmp_path / "whole" / "skills.json").read_text())
    tried = [one for skill in skills.values() for one in skill.get("contexts", {}).values()]
    assert sum(one["tried"] for one in tried) == 4  # two updates drew two questions each


def test_what_is_refused(models, tmp_path):
    with pytest.raises(UserError, match="nft.contexts are for the teachers' answers, and nft.share 1"):
        tiny_recipe(models, tmp_path, objective="nft", batch=6, nft={"contexts": ["guided"]})
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a house\na tree\n")
    data = {"generation": str(prompts)}
    wanted = {"objective": "nft", "batch": 4, "nft": {**NFT, "contexts": ["caption"]}}
    both = [{"name": name, "adapter": adapter, "capability": "generation"}
            for name, adapter in zip("ab", ["generation", "base"])]  # fmt: skip
    resolved = tiny_recipe(models, tmp_path / "run", **wanted).resolved()
    with pytest.raises(UserError, match="no row of the data has a longer caption; add a column `expanded`"):
        plan(Recipe(**{**resolved, "teachers": [
            {**one, "adapter": own["adapter"]} for one, own in zip(both, resolved["teachers"])
        ], "data": data}))  # fmt: skip


def test_the_cost_is_counted(models, tmp_path):
    plain = tiny_recipe(models, tmp_path, objective="nft", batch=4, rollout={"steps": 6}, nft=NFT)
    tried = tiny_recipe(
        models, tmp_path, objective="nft", batch=4, rollout={"steps": 6}, nft=NFT | {"contexts": ["guided"]}
    )
    more = nft_forwards(tried)["contexts"]
    assert "contexts" not in nft_forwards(plain)
    # three forwards a step of six, two pictures ranked by 3 levels x 2 draws, in groups of two; the guided query
    assert more == dict.fromkeys(more, (3 * 6 + 2 * 6) / 2 + 1)
