"""Every formula of the gates against one written out by hand, in float64 and with loops where the code has none."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from danceopd.errors import UserError
from danceopd.labelfree.gates import consensus, evidence
from danceopd.labelfree.gates.weights import HIGHEST, METRICS, MIN_ROWS, WINDOW, RunningMeans, combine, summary
from danceopd.recipe.recipe import Recipe


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()


# Evidence


def mask_by_hand(difference: np.ndarray) -> np.ndarray:
    """One row (h, w, C): energy, the mean of the neighbours that exist, the upper fence, over the largest."""
    energy = (difference**2).sum(-1)
    h, w = energy.shape
    blurred = np.zeros_like(energy)
    for y, x in itertools.product(range(h), range(w)):
        near = [
            energy[y + j, x + i]
            for j, i in itertools.product((-1, 0, 1), repeat=2)
            if 0 <= y + j < h and 0 <= x + i < w
        ]
        blurred[y, x] = sum(near) / len(near)
    low, high = np.percentile(blurred, [25, 75])
    cut = np.minimum(blurred, high + 1.5 * (high - low))
    return cut / cut.max()


def test_mask_is_the_blurred_energy_to_its_fence_in_every_layout():
    d = numbers(2, 8, 9, 3).double()
    d[0, 1, 2] *= 20  # an outlier, so that the fence is met
    wanted = np.stack([mask_by_hand(row.numpy()) for row in d])
    tokens = evidence.edit_mask(d.flatten(1, 2).float(), (8, 9))
    picture = evidence.edit_mask(d.permute(0, 3, 1, 2).float())
    assert tokens.shape == (2, 72, 1) and picture.shape == (2, 1, 8, 9)
    np.testing.assert_allclose(tokens.reshape(2, 8, 9), wanted, rtol=1e-5)
    np.testing.assert_allclose(picture[:, 0], wanted, rtol=1e-5)
    assert float((wanted[0] == 1).sum()) > 1  # several at the fence
    plain = evidence.edit_mask(d.flatten(1, 2).float())[0, :, 0]  # places unknown: no blur
    energy = (d[0].flatten(0, 1) ** 2).sum(-1)
    assert float(plain.argmax()) == float(energy.argmax())
    assert not torch.allclose(plain, tokens[0, :, 0])


def test_mask_of_an_even_change_is_even_and_of_none_is_nothing():
    """A change of style: noise about one level must not become a map of edits."""
    even = torch.sign(numbers(1, 8, 8, 4)) * (1 + 0.02 * numbers(1, 8, 8, 4, seed=1))
    assert float(evidence.edit_mask(even.flatten(1, 2), (8, 8)).min()) > 0.95
    nothing = evidence.edit_mask(torch.zeros(2, 6, 3), (2, 3))
    assert float(nothing.abs().max()) == 0
    assert torch.equal(evidence.token_weights(nothing, 0.7), torch.ones(2, 6, 1))


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_token_weights_by_hand(strength):
    mask = numbers(3, 10, 1).abs()
    mask[0, 0] = 50.0
    wanted = []
    for row in mask[:, :, 0].double().numpy():
        weights = np.clip(1 + strength * (row / row.mean() - 1), 0.25, 4.0)
        wanted.append(weights / weights.mean())
    found = evidence.token_weights(mask, strength)
    np.testing.assert_allclose(found[:, :, 0], wanted, rtol=1e-5)
    assert torch.allclose(found.mean((1, 2)), torch.ones(3), atol=1e-6)
    if strength == 0:
        assert torch.equal(found, torch.ones_like(found))  # exactly, for a gate of no strength is no gate


def test_progress_is_none_at_the_contrast_all_at_the_answer_and_more_beyond():
    away, answer = numbers(4, 6, 3), numbers(4, 6, 3, seed=1)
    for share in (-0.5, 0.0, 0.3, 1.0, 1.7):
        found = evidence.progress(away + share * (answer - away), away, answer - away)
        assert torch.allclose(found, torch.full((4,), share), atol=1e-5)
    across = numbers(4, 6, 3, seed=2)
    d = (answer - away).double().flatten(1)
    wanted = ((across - away).double().flatten(1) * d).sum(1) / (d**2).sum(1)
    assert torch.allclose(evidence.progress(across, away, answer - away).double(), wanted, atol=1e-5)
    assert torch.equal(evidence.progress(across, away, torch.zeros_like(away)), torch.zeros(4))


def test_progress_is_the_likelihood_of_the_students_own_step():
    """log p+(z') - log p-(z') of its Gaussian step is h²/2s² (2ρ - 1) |d|²: torch's own normals are the reference."""
    x, v, away, answer = (numbers(1, 50, seed=i).double() for i in range(4))
    h, s = 0.07, 0.3
    normals = [torch.distributions.Normal(x - h * u, s) for u in (answer, away)]
    gained = normals[0].log_prob(x - h * v).sum() - normals[1].log_prob(x - h * v).sum()
    rho = evidence.progress(v, away, answer - away).double()
    wanted = h**2 / (2 * s**2) * (2 * rho - 1) * (answer - away).square().sum()
    assert float(gained) == pytest.approx(float(wanted), rel=1e-4)


@pytest.mark.parametrize("alpha", [0.5, -0.5, 0.0, 2.0])
def test_row_weights_by_hand_within_groups(alpha):
    rho = numbers(12).abs() + torch.linspace(0, 1, 12)
    score = evidence.scores(rho)
    mean, deviation = evidence.of_groups(score, 4)
    bounds, sound = (0.25, 2.0), torch.ones(12, dtype=torch.bool)
    found = evidence.row_weights(score, mean, deviation, alpha, bounds, sound)
    wanted = []
    for g in range(3):
        siblings = np.clip(rho[4 * g : 4 * g + 4].double().numpy(), -1, 1)
        for s in siblings:
            one = np.clip(1 + alpha * (s - siblings.mean()) / (siblings.std() + 1e-6), *bounds)
            wanted.append(one if siblings.std() >= 0.02 and siblings.mean() >= 0 else 1.0)
    np.testing.assert_allclose(found, wanted, rtol=1e-4)
    if alpha == 0:
        assert torch.equal(found, torch.ones(12))
    else:
        best = int(score[:4].argmax())
        assert (found[best] > 1) == (alpha > 0)  # whom the sign raises


def test_guard_leaves_alone_what_cannot_be_compared():
    """Each of its three reasons, alone; without any, the same rows do differ."""
    base = torch.tensor([0.1, 0.3, 0.5, 0.9])
    sound = torch.ones(4, dtype=torch.bool)

    def weights(score, sound=sound):
        return evidence.row_weights(score, *evidence.of_groups(score, 4), 0.5, (0.25, 2.0), sound)

    assert len(set(weights(base).tolist())) == 4
    assert torch.equal(weights(base - 1.0), torch.ones(4))  # all on the wrong way: no best among them
    assert torch.equal(weights(0.5 + 0.02 * (base - 0.5)), torch.ones(4))  # all alike
    odd = sound.clone()
    odd[3] = False
    assert weights(base, odd)[3] == 1 and weights(base, odd)[2] != 1
    answer = numbers(3, 8, 2)
    assert evidence.informative(answer * torch.tensor([0.0, 0.03, 0.04])[:, None, None], answer).tolist() == [
        False, False, True,
    ]  # fmt: skip


def test_leak_is_the_error_outside_the_edit():
    velocity, answer = numbers(2, 6, 3), numbers(2, 6, 3, seed=1)
    mask = torch.tensor([1.0, 1, 0, 0.5, 0, 0])[None, :, None].expand(2, 6, 1)
    outside = (1 - mask[0, :, 0]).double()
    wanted = [(outside[:, None] * (velocity[b] - answer[b]).double() ** 2).mean() for b in range(2)]
    assert torch.allclose(evidence.leak(velocity, answer, mask).double(), torch.stack(wanted), rtol=1e-5)


# Consensus


def test_agreement_by_hand_with_framings_that_some_rows_lack():
    framed, wrong = numbers(4, 5, 6, 2), numbers(5, 6, 2, seed=1)
    framed = framed[:1] + 0.3 * framed
    there = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 1, 0]]).bool()
    wanted = []
    for b in range(5):
        mine = framed[there[:, b], b].double()
        centre = mine.mean(0)
        within = np.mean([float((v - centre).square().mean()) for v in mine])
        between = float((centre - wrong[b]).square().mean())
        wanted.append(min(1.0, max(0.0, 1 - within / between)) if len(mine) > 1 else 0.0)
    found = consensus.agreement(framed, there, wrong)
    np.testing.assert_allclose(found, wanted, rtol=1e-4)
    assert found[4] == 0 and float(found[:4].min()) > 0 and float(found.max()) < 1


def test_agreement_needs_to_depend_on_the_prompt():
    """Who answers everything alike agrees with itself perfectly, and with a wrong prompt: that earns nothing."""
    one = numbers(1, 2, 8).expand(3, 2, 8)
    there = torch.ones(3, 2, dtype=torch.bool)
    assert torch.equal(consensus.agreement(one, there, one[0]), torch.zeros(2))
    assert torch.equal(consensus.agreement(one, there, -one[0]), torch.ones(2))
    scattered = numbers(3, 2, 8, seed=3)
    assert torch.equal(consensus.agreement(scattered, there, scattered.mean(0) + 0.1), torch.zeros(2))


# Together


def test_weights_multiply_over_the_usual_and_have_a_ceiling():
    parts = [torch.tensor([1.0, 0.5, 2.0, 2.0]), torch.tensor([1.0, 1.2, 1.5, 1.5])]
    product, weights = combine(parts, torch.tensor([1.0, 1.2, 0.5, 0.5]), torch.tensor([True, True, True, False]))
    assert torch.allclose(product, torch.tensor([1.0, 0.6, 3.0, 3.0]))
    assert weights.tolist() == pytest.approx([1.0, 0.5, HIGHEST, 1.0])


def running() -> RunningMeans:
    return RunningMeans(2, torch.device("cpu"))


def test_running_means_are_those_of_the_rows_by_teacher_and_noise():
    kept, seen = running(), {}
    generator = torch.Generator().manual_seed(0)
    for _ in range(6):
        routes = torch.randint(2, (24,), generator=generator)
        sigma, score = torch.rand(24, generator=generator), torch.rand(24, generator=generator)
        sound = torch.rand(24, generator=generator) > 0.2
        for r, s, value, ok in zip(routes, sigma, score, sound):
            if ok:
                seen.setdefault((int(r), min(3, int(s * 4))), []).append(float(value))
        kept.note_scores(routes, sigma, score, sound)
        kept.fold(lambda total: None)
    for (r, quarter), values in seen.items():
        mean, deviation = kept.spread(torch.tensor([r]), torch.tensor([quarter / 4 + 0.1]))
        if len(values) < MIN_ROWS:
            assert float(deviation) == 0
            continue
        assert float(mean) == pytest.approx(np.mean(values), rel=1e-5)
        assert float(deviation) == pytest.approx(np.std(values), rel=1e-4)
    assert max(map(len, seen.values())) >= MIN_ROWS


def test_running_means_forget_after_the_window_and_pass_over_what_is_not_finite():
    kept = running()
    for value in (0.0, 8.0):
        for _ in range(WINDOW // 64 * 6):
            kept.note_weights(torch.zeros(64, dtype=torch.long), torch.full((64,), value), torch.ones(64) > 0)
            kept.fold(lambda total: None)
    assert 7.9 < float(kept.usual(torch.tensor([0]))) <= 8.0
    before = kept.weights.clone()
    kept.note_weights(torch.zeros(2, dtype=torch.long), torch.tensor([float("nan"), float("inf")]), torch.ones(2) > 0)
    kept.fold(lambda total: None)
    assert torch.equal(before, kept.weights)


def test_weights_of_one_keep_a_usual_of_exactly_one():
    kept, usual = running(), torch.tensor([0, 1])
    for _ in range(200):
        kept.note_weights(torch.zeros(7, dtype=torch.long), torch.ones(7), torch.ones(7) > 0)
        kept.fold(lambda total: None)
        assert torch.equal(kept.usual(usual), torch.ones(2))


def test_running_means_do_not_depend_on_the_split_and_are_resumed_exactly():
    routes, weights = torch.randint(2, (40,)), torch.rand(40)
    whole, halves = running(), [running(), running()]
    for part, rows in ((whole, slice(None)), (halves[0], slice(0, 40, 2)), (halves[1], slice(1, 40, 2))):
        part.note_weights(routes[rows], weights[rows], torch.ones(40)[rows] > 0)
        part.note_scores(routes[rows], weights[rows], weights[rows], torch.ones(40)[rows] > 0)
    noted = [torch.cat([n.flatten() for n in half._noted]) for half in halves]
    whole.fold(lambda total: None)
    for half in halves:
        half.fold(lambda total: total.copy_(noted[0] + noted[1]))
    for half in halves:
        assert torch.allclose(half.weights, whole.weights) and torch.allclose(half.scores, whole.scores)
    again = running()
    again.load_state_dict(whole.state_dict())
    assert torch.equal(again.scores, whole.scores) and torch.equal(again.weights, whole.weights)


def test_summary_names_what_is_logged():
    weights = torch.tensor([0.0, 1.0, 2.0, 3.0]).double()
    square = float(weights.square().mean())
    means = {"weight": 1.5, "weight square": square, "weight zero": 0.25, "rho": 0.5}
    assert set(means) <= set(METRICS)
    found = summary(means)
    assert found == pytest.approx(
        {"gate/weight": 1.5, "gate/rho": 0.5, "gate/weight std": weights.std(correction=0).item(),
         "gate/weight zero": 0.25, "gate/ess": 36 / (4 * 14)}
    )  # fmt: skip


# The recipe


def test_a_gate_is_one_key(files):
    assert not Recipe(**files).gates.on
    recipe = Recipe(**files, gates={"evidence": True, "consensus": False})
    assert recipe.gates.on and recipe.gates.evidence.alpha == 0.5 and recipe.gates.consensus is None
    again = Recipe.load(None, **recipe.resolved())
    assert again.gates == recipe.gates
    assert Recipe(**files, gates={"evidence": {"contrast": None}}).gates.evidence.contrast == "null"
    assert Recipe(**files, batch=8, gates={"evidence": True, "group": 4}).group_size == 4


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"gates": True}, "gates is the boolean true"),
        ({"gates": {"evidence": {"alfa": 1}}}, "unknown key 'gates.evidence.alfa'.*'alpha'"),
        ({"gates": {"evidence": {"contrast": "prompts"}}}, "gates.evidence.contrast is 'prompts'.*'prompt'"),
        ({"gates": {"evidence": True}, "objective": "diffusionopd"}, "gates weigh what objective danceopd learns"),
        ({"gates": {"evidence": True, "group": 3}}, "batch 8 is no multiple of gates.group, 3"),
        ({"gates": {"evidence": True, "group": 4}, "micro_batch": 2}, "splits the rollouts.*, gates.group 4"),
        ({"gates": {"skills": True, "group": 4}}, "group compares rollouts of one sample"),
        ({"gates": {"consensus": True, "group": 4}}, "which only evidence does"),
        ({"gates": {"consensus": {"bound": 0.9}}}, "gates.consensus.bound is 0.9"),
        ({"gates": {"skills": {"generation": {"step": "source"}}}}, "gates.skills.generation.step is 'source'"),
        ({"gates": {"skills": True}, "rollout": {"steps": 1}}, "rollout.steps is 1; give two or more"),
    ],
)
def test_misuse_is_refused_in_a_sentence(files, fields, sentence):
    with pytest.raises(UserError, match=sentence):
        Recipe(**{**files, **fields})
