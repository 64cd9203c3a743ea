"""Objective nft: its loss, what draws and ranks the samples, any slice of the rows, interruptions, and its refusals."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from tinies import TINYS
from tiny_merge import WEIGHTS, family_recipe, json_lines, run, tiny_recipe
from tiny_trainer import backward, batches_of, make_trainer, tiny_data, train

from danceopd.engine.objectives import contrasted_error
from danceopd.engine.rollout import rollout
from danceopd.errors import UserError
from danceopd.labelfree.nft.skills import Parting, parting
from danceopd.merge import merge
from danceopd.pipelines.registry import FAMILIES
from danceopd.plan import plan
from danceopd.recipe.recipe import Recipe

NFT = {"objective": "nft", "nft": {"group": 3, "round": 4, "reuse": 2}, "batch": 6}


@pytest.fixture(scope="module")
def data():
    return tiny_data()


def nft_trainer(data, files, **fields):
    """A trainer at the start of its first round."""
    options = {**NFT["nft"], **fields.pop("nft", {})}
    trainer = make_trainer(data, files, **{**NFT, "rollout": {"steps": 3}, **fields, "nft": options})
    for callback in trainer.callbacks:
        callback.on_step_start(trainer)
    return trainer


# -- the loss ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.5, 1.0])
@pytest.mark.parametrize("r", [0.0, 0.25, 0.5, 1.0])
def test_the_loss_and_its_minimum(r, beta):
    """With the old velocity v0 and what was noised u, v ends at v0 + (2 r - 1) / β (u - v0)."""
    old, target, optimality = torch.randn(1, 5), torch.randn(1, 5), torch.tensor([r])
    v = torch.randn(1, 5)
    plus, minus = (1 - beta) * old + beta * v, (1 + beta) * old - beta * v
    by_hand = r * (plus - target).square().mean() + (1 - r) * (minus - target).square().mean()
    torch.testing.assert_close(contrasted_error(v, old, target, optimality, beta), by_hand[None])
    best = (old + (2 * r - 1) / beta * (target - old)).requires_grad_()
    contrasted_error(best, old, target, optimality, beta).sum().backward()
    torch.testing.assert_close(best.grad, torch.zeros(1, 5), atol=1e-6, rtol=0)


def losses(trainer, share, anchor, ranked):
    batch = batches_of(trainer)[0]
    batch.ranked = ranked and replace(batch.ranked, **ranked)
    trainer.objective.keywords.update(share=share, anchor=anchor)
    return batch, [one.loss for one in trainer.objective(batch, trainer.velocities)]


def test_share_and_anchor_say_how_the_losses_add_up(data, files):
    trainer = nft_trainer(data, files)
    _, (distilled,) = losses(trainer, 1.0, 0.0, None)  # as after a roll-back: plain distillation
    given = {"weights": lambda sigma: 2 * torch.ones_like(sigma)}
    batch, (alone,) = losses(trainer, 1.0, 0.0, given)
    rest, part = losses(trainer, 0.25, 0.0, given)[1]
    torch.testing.assert_close(rest, 0.75 * distilled)
    torch.testing.assert_close(part, 0.25 * alone)
    _, (anchored,) = losses(trainer, 1.0, 3.0, given)
    noise, sigma = batch.noise("forward 0"), batch.query_sigma[:, 0]
    x = torch.lerp(batch.ranked.clean, noise, sigma[:, None, None])
    gap = trainer.velocities.student(batch, x, sigma) - trainer.velocities.teacher(batch, x, sigma)
    torch.testing.assert_close(anchored - alone, 2 * 3 * gap.square().flatten(1).mean(1), atol=1e-5, rtol=1e-4)
    old, v = batch.ranked.old(x, sigma, batch.condition), trainer.velocities.student(batch, x, sigma)
    by_hand = 2 * contrasted_error(v, old, noise - batch.ranked.clean, batch.ranked.optimality, 1.0)
    torch.testing.assert_close(alone, by_hand)


# -- samples and ranks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("merged", [False, True])
def test_samples_are_the_averages_own_from_different_noises(data, files, merged):
    trainer = nft_trainer(data, files, rollout={"steps": 3, "merged": merged})
    with torch.no_grad():
        for p in trainer.optimizer.parameters:
            p += 0.1  # the student moves on, and its average of the round's start stays
    for batch in batches_of(trainer):
        field = trainer.ema_field(merged=False)
        ends = torch.full((len(batch),), len(batch.sigmas) - 1)
        clean = rollout(field, batch.noise(), batch.sigmas, ends, batch.condition)
        torch.testing.assert_close(batch.ranked.clean, clean, atol=1e-4, rtol=1e-4)
        prompts = batch.condition.kwargs["encoder_hidden_states"].unflatten(0, (-1, 3))
        assert bool((prompts == prompts[:, :1]).all()) and not torch.equal(clean[0], clean[1])
        assert len(set(batch.query_sigma[:3, 0].tolist())) == 1


def test_optimality_is_the_clipped_standard_score_of_the_group(data, files, tmp_path):
    text = "import torch\ndef by_place(groups):\n    return torch.tensor([[1.0, 4.0, 1.0]]).expand(len(groups), 3)\n"
    (tmp_path / "place_reward.py").write_text(text)
    trainer = nft_trainer(data, files, nft={"rewards": {"place_reward:by_place": 1}, "clip": 2.0})
    wanted = (0.5 + torch.tensor([-(0.5**0.5), 2**0.5, -(0.5**0.5)]) / 4).repeat(2)
    (one, two) = batches_of(trainer)
    torch.testing.assert_close(torch.cat([one.ranked.optimality, two.ranked.optimality]), wanted)
    (metrics,) = train(trainer, 1)
    figures = [metrics.extra[f"nft/{what} place_reward:by_place"] for what in ("reward", "std", "alike")]
    assert figures == pytest.approx([2, 2**0.5, 0])


def test_a_round_draws_once_and_learns_again_at_other_levels(data, files):
    trainer = nft_trainer(data, files)
    seen = []
    for step in range(5):
        trainer.step = step
        for callback in trainer.callbacks:
            callback.on_step_start(trainer)
        parts = batches_of(trainer)
        seen.append((torch.cat([b.ranked.clean for b in parts]), torch.cat([b.query_sigma for b in parts])))
        with torch.no_grad():
            for ema in trainer.optimizer.ema:
                ema += 0.05
    (a, la), (b, lb), (c, lc), (d, ld), (e, le) = seen  # round 4, reuse 2: a, b, a, b; then a new one
    assert torch.equal(a, c) and torch.equal(b, d) and not torch.equal(a, b) and not torch.equal(a, e)
    assert not torch.equal(la, lc) and not torch.equal(lb, ld)


@pytest.mark.parametrize("how", [{"micro_batch": 3}, {"world": 2}])
def test_any_slice_of_the_rows_draws_and_learns_the_same(data, files, how):
    whole = nft_trainer(data, files, batch=12)
    for batch in batches_of(whole):
        backward(whole, batch)
    wanted = [p.grad for p in whole.optimizer.parameters]
    found = [torch.zeros_like(g) for g in wanted]
    for rank in range(how.get("world", 1)):
        part = nft_trainer(data, files, batch=12, rank=rank, **how)
        for batch in batches_of(part):
            assert len(batch) % 3 == 0
            backward(part, batch)
        for total, p in zip(found, part.optimizer.parameters):
            total += torch.zeros_like(p) if p.grad is None else p.grad
    for a, b in zip(wanted, found):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-3)


def test_a_reward_of_the_picture_rises(data, files, tmp_path):
    """Brighter latents are better: after some rounds the student draws brighter ones, and no teacher was asked."""
    text = "import torch\ndef mean(groups):\n    return torch.stack([g.clean.flatten(1).mean(1) for g in groups])\n"
    (tmp_path / "bright_reward.py").write_text(text)
    trainer = nft_trainer(
        data, files, steps=24, batch=12, ema=0.5, optimizer={"lr": 0.01, "warmup": 1}, query={"law": "uniform"},
        nft={"rewards": {"bright_reward:mean": 1}},
    )  # fmt: skip

    def refuse(x, sigma, condition):
        raise AssertionError("a teacher was asked")

    trainer.velocities = replace(trainer.velocities, teachers=[refuse, refuse])
    metrics = train(trainer)
    first, last = (metrics[i].extra["nft/reward bright_reward:mean"] for i in (0, -1))
    assert last > first + 0.5 * metrics[0].extra["nft/std bright_reward:mean"]
    assert 0 < metrics[-1].extra["nft/moved"] < 1


# -- hindsight ------------------------------------------------------------------------------------------------


def test_the_steps_at_which_winners_and_losers_part():
    good, bad = torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 0.0])
    apart = [0.0, 0.5, 1.0, 1.0]  # nothing by the noise, a quarter, three quarters, nothing
    estimates = [torch.stack([a * good, a * good, a * bad, torch.ones(2)]) for a in apart]
    optimality = torch.tensor([0.8, 0.9, 0.1, 0.5])  # who is neither says nothing
    torch.testing.assert_close(parting(estimates, optimality), torch.tensor([0, 0.25, 0.75, 0]))
    assert parting(estimates, torch.full((4,), 0.5)).isnan().all()


def test_levels_count_by_the_share_of_what_was_seen():
    seen = Parting(["a", "b"], strength=0.5)
    sigmas = torch.tensor([1.0, 0.75, 0.25])
    for _ in range(16):
        seen.note(0, sigmas, torch.tensor([0.0, 0.9, 0.1]))
        seen.note(1, sigmas[:1], torch.tensor([float("nan")]))  # a group of equals
    at = torch.tensor([0.78, 0.21, 0.5, 0.78])
    assert seen.weights([0, 0, 0, 1], at).tolist() == [1, 1, 1, 1]  # not before the update ends
    seen.fold(lambda tensor: tensor.mul_(1), torch.device("cpu"))
    # shares 0.9 and 0.1 are 1.8 and 0.2 of their mean; half of that counts
    torch.testing.assert_close(seen.weights([0, 0, 0, 1], at), torch.tensor([1.4, 0.6, 1.0, 1.0]))
    (sentence,) = seen.sentences()["a"]
    assert "samples of a part most at noise levels 0.7 to 0.8, which is 90%" in sentence and "16 questions" in sentence
    again = Parting(["a", "b"], strength=0.5)
    again.load_state_dict(seen.state_dict())
    assert again.facts() == seen.facts() and again.facts()["a"]["groups"] == 16
    seen.note(0, sigmas, torch.tensor([0.0, 0.0, 1.0]))
    seen.fold(lambda tensor: tensor.mul_(2), torch.device("cpu"))  # two processes saw one such each
    assert seen.facts()["a"] == {"groups": 18, "parting": {"0.2-0.3": 0.2, "0.7-0.8": 0.8}}


# -- whole runs -----------------------------------------------------------------------------------------------


def nft_recipe(models, output, **fields):
    return tiny_recipe(models, output, **{
        **NFT, "steps": 6, "save_every": 1, "monitor": {"every": 0}, "validation": {"every": 0}, **fields
    })  # fmt: skip


INTERRUPTED = {"batch": 4, "nft": {"group": 2, "round": 4, "reuse": 2, "hindsight": 1.0}}


@pytest.fixture(scope="module")
def whole(models, tmp_path_factory):
    """A run that nobody stopped."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(nft_recipe(models, folder, **INTERRUPTED))
    return folder


@pytest.mark.parametrize("kill", [3, 5])
def test_an_interrupted_round_goes_on_to_the_same_bytes(models, tmp_path, whole, kill):
    again = nft_recipe(models, tmp_path, **INTERRUPTED)
    run(again, kill=kill)  # where the samples of before are learnt from again, and at the start of a round
    assert run(again)[0] == kill + 1
    for name in (WEIGHTS, "skills.json"):
        assert (whole / name).read_bytes() == (tmp_path / name).read_bytes()


def test_what_was_seen_in_hindsight_is_kept_by_teacher(whole):
    skills = json.loads((whole / "skills.json").read_text())
    assert set(skills) == {"generation", "editing"}
    for one in skills.values():
        assert one["groups"] >= 2 and sum(one["parting"].values()) == pytest.approx(1, abs=1e-3)
    assert sum(one["groups"] for one in skills.values()) == 8  # four updates of six drew two questions each


def test_it_is_monitored_and_an_alarm_brings_it_back_to_plain_distillation(models, tmp_path, capfd):
    monitor = {"every": 2, "prompts": 8, "seeds": 2, "diversity": 9.0, "rollback": "plain"}
    recipe = nft_recipe(models, tmp_path / "x", steps=4, monitor=monitor, data={"rows": 40})
    assert run(recipe) == [1, 1, 2, 3, 4]  # the alarm of step 2 undid it
    first, *after = [line for line in json_lines(tmp_path / "x" / "metrics.jsonl") if "loss" in line]
    assert not any(key.startswith("nft/") for line in (first, *after) for key in line)
    checks = json_lines(tmp_path / "x" / "monitor.jsonl")
    assert "the reward likelihood" in checks[0]["confidences"] and checks[2]["rolled_back_to"] == 0


READS_SOURCE = ("qwen-image", "qwen-image-2.1", "longcat-image")
"""Families whose null prompt is read together with an edit's source."""


@pytest.mark.parametrize("tiny", TINYS, ids=lambda tiny: tiny.family)
def test_every_family(tiny, tmp_path):
    recipe = family_recipe(tiny, tiny.build(), tmp_path).resolved()
    rewards = {"likelihood": {"draws": 1}, "consensus": 0.5, "preserve": 0.5}
    guided = FAMILIES[tiny.family].guidance_on is not None and tiny.family not in READS_SOURCE
    contexts = ["guided"] if guided else []
    parts = {"group": 2, "round": 2, "reuse": 2, "share": 0.5, "anchor": 0.5, "rewards": rewards, "contexts": contexts}
    fields = {
        "objective": "nft", "batch": 4, "nft": parts,
        "steps": 2, "monitor": {"every": 0}, "validation": {"every": 0},
    }  # fmt: skip
    merge(Recipe(**{**recipe, **fields}), report=lambda metrics, steps: None)
    line = json_lines(tmp_path / "student" / "metrics.jsonl")[-1]
    seen = {key: value for key, value in line.items() if key.startswith("nft/")}
    assert all(isinstance(value, float) and math.isfinite(value) for value in seen.values()), seen
    assert seen["nft/reward likelihood"] < 0 and seen["nft/alike likelihood"] == 0
    assert (tiny.editing is not None) == ("nft/reward consensus" in seen)
    assert all(seen.get(f"nft/{what}", -1) < 0 for what in ("reward consensus", "reward preserve"))


def test_plan_counts_what_it_costs(models, tmp_path):
    def facts(**nft):
        options = {"objective": "nft", "batch": 4, "nft": {"group": 2, "round": 4, "reuse": 4, **nft}}
        return plan(tiny_recipe(models, tmp_path / "none", **options), tflops=1.0)

    passes = facts()["passes"]
    assert passes["own samples"] == 3 / 4 and passes["rewards"] == 6 / 4 and passes["the average that drew"] == 1
    assert passes["teachers"] == passes["rollout"] == 0 and passes["student, forward"] == 1
    anchored = facts(anchor=1.0)["passes"]
    assert anchored["teachers"] == 1 and anchored["student, forward"] == 1 and anchored["rollout"] == 0
    beside = facts(share=0.5)
    assert beside["passes"]["teachers"] == 1 and beside["passes"]["student, forward"] == 2
    assert beside["passes"]["rollout"] > 0 and beside["passes"]["monitor"] > 0
    assert "student, the average that draws" in [part["part"] for part in beside["memory"]]
    assert any("monitored every 100 steps" in note for note in beside["notes"])


@pytest.mark.parametrize(
    "fields, sentence",
    [
        ({"nft": {"group": 4}}, "nft is set, and the objective is danceopd; write objective: nft, or leave it out"),
        ({"objective": "nft", "batch": 8}, "batch 8 is no multiple of nft.group, 6; give one"),
        ({**NFT, "nft": {"group": 1}}, "nft.group is 1 in the recipe; it must be greater than or equal to 2"),
        ({**NFT, "nft": {"group": 3, "round": 3, "reuse": 2}}, "nft.round 3 is no multiple of nft.reuse, 2"),
        ({**NFT, "rollout": {"noise": 0.7}}, "leave out rollout.noise and rollout.guidance"),
        ({**NFT, "rollout": {"guidance": 2.0}}, "leave out rollout.noise and rollout.guidance"),
        ({**NFT, "guidance": {"unconditional": 0.1}}, "guidance.unconditional drops some of them; leave it out"),
        ({**NFT, "gates": {"evidence": True}}, "gates weigh what objective danceopd learns, and the objective is nft"),
        ({**NFT, "flowopd": {"group": 4}}, "flowopd is set, and the objective is nft; leave it out"),
        ({**NFT, "contrast": {"generation": {"weight": 1}}}, "nft.share 1 without an anchor asks for none"),
        ({**NFT, "validation": {"patience": 3}}, "validation.patience 3 goes by the distance to the teachers"),
        ({**NFT, "micro_batch": 2}, "micro_batch 2 splits the rollouts of one sample, nft.group 3; raise it"),
        ({**NFT, "nft": {"group": 3, "rewards": {"consensus": 1}}}, "say nothing of pictures without a source"),
        ({**NFT, "nft": {"group": 3, "rewards": {"likelihood": {"teacher": "editin"}}}}, "did you mean 'editing'?"),
        ({**NFT, "nft": {"group": 3, "rewards": {"likelyhood": 1}}}, "did you mean 'likelihood'?"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_sentence(files, fields, sentence):
    with pytest.raises(UserError) as error:
        Recipe(**files, **fields)
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_an_own_reward_that_is_not_there_is_refused_before_a_model_is_loaded(models, tmp_path):
    recipe = nft_recipe(models, tmp_path / "x", nft={**NFT["nft"], "rewards": {"no_such_module:score": 1}})
    with pytest.raises(UserError, match="reward no_such_module:score: module 'no_such_module' does not import"):
        plan(recipe)
