"""Criticality, critical queries, the trust region, degraded sources and paraphrases, each against its definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flows import Gaussian, Rows, shifted
from tiny import random_image

from danceopd.data.dataset import TeacherData
from danceopd.data.degrade import degrade
from danceopd.data.sources import edits_from, prompts_from
from danceopd.engine.rollout import rollout
from danceopd.engine.solvers import AdamsBashforth
from danceopd.errors import UserError
from danceopd.labelfree.gates.skills import Criticality, candidates, chosen, draw_critical, shift, shift_share
from danceopd.labelfree.gates.variants import KEEP_PROMPT, other_prompts, unchanged, with_variants
from danceopd.recipe.labelfree import DEGRADATIONS, Skills
from danceopd.recipe.recipe import Recipe
from danceopd.worlds.scenes.edits import edits
from danceopd.worlds.scenes.paraphrase import expanded, paraphrases
from danceopd.worlds.scenes.prompts import prompts

SIGMAS = shifted(8, 3.0)


def rolled_out(field, rows: int, sigmas=SIGMAS, stop=None, solver=None):
    """Noise, the states of each trajectory at every grid point, and what was observed of it."""
    noise = torch.randn(rows, 5, generator=torch.Generator().manual_seed(3))
    observer = Criticality(sigmas, rows, torch.device("cpu"))
    stop = torch.full((rows,), len(sigmas) - 1) if stop is None else stop
    stops = torch.stack([torch.minimum(torch.tensor(k), stop) for k in range(len(sigmas))], dim=1)
    states = rollout(observer.around(field), noise, sigmas, stops, Rows(rows), callback=observer.before, solver=solver)
    return noise, states, observer


def test_criticality_is_how_far_the_clean_estimate_moves():
    """kappa_k = |x0hat_{k+1} - x0hat_k|² / h_k, with x0hat = x - t v, in float64 from the states alone."""
    field = Gaussian(0.8, 0.4)
    _, states, observer = rolled_out(field, 6)
    for k in range(len(SIGMAS) - 2):
        clean = [
            (states[:, j].double() - SIGMAS[j] * field(states[:, j].double(), SIGMAS[j].double().expand(6)))
            for j in (k, k + 1)
        ]
        wanted = (clean[1] - clean[0]).square().mean(1) / (SIGMAS[k] - SIGMAS[k + 1])
        torch.testing.assert_close(observer.kappa[:, k].double(), wanted, rtol=2e-3, atol=1e-7)


def test_criticality_is_of_the_velocities_whatever_the_solver_and_the_depths():
    """Rows leave the rollout in another order than they came; a solver's step is not the velocity."""
    field, stop = Gaussian(-0.5, 0.9), torch.tensor([8, 2, 5, 8, 1, 3])
    _, states, observer = rolled_out(field, 6, stop=stop, solver=AdamsBashforth())
    for row, last in enumerate(stop.tolist()):
        speeds = [field(states[row : row + 1, k], SIGMAS[k : k + 1])[0] for k in range(last)]
        for k in range(len(SIGMAS) - 2):
            wanted = 0.0
            if k + 1 < last:
                moved = (speeds[k] - speeds[k + 1]).square().mean()
                wanted = float(SIGMAS[k + 1] ** 2 * moved / (SIGMAS[k] - SIGMAS[k + 1]))
            assert float(observer.kappa[row, k]) == pytest.approx(wanted, rel=1e-3, abs=1e-8)


def test_a_rollout_that_turns_at_one_step_is_critical_there():
    def turns(x, sigma, condition):
        return torch.where(sigma[:, None] > SIGMAS[4], torch.ones_like(x), -torch.ones_like(x))

    _, _, observer = rolled_out(turns, 4)
    assert observer.kappa.argmax(1).tolist() == [3] * 4  # between the last state before, and the first after
    picked, sound = chosen(observer.kappa, torch.rand(4, 8), 1, top=0.1)
    assert picked[:, 0].tolist() == [3] * 4 and bool(sound.all())


def test_chosen_steps_are_of_the_top_share_each_as_often():
    kappa = torch.tensor([0.1, 5.0, 0.2, 4.0, 3.0, 0.0, 9.0]).expand(3000, 7)
    keys = torch.rand(3000, 8, generator=torch.Generator().manual_seed(0))
    picked, sound = chosen(kappa, keys, 1, top=0.5)
    counts = torch.bincount(picked[:, 0], minlength=7).tolist()
    assert bool(sound.all()) and {k for k, n in enumerate(counts) if n} == {1, 3, 4, 6}  # the best 4 of 7
    assert min(n for n in counts if n) > 650
    two, _ = chosen(kappa, keys, 2, top=0.5)
    assert bool((two[:, 0] != two[:, 1]).all())
    assert torch.equal(two[:, :1], picked)


def test_siblings_share_one_step_and_a_rollout_without_a_critical_one_falls_back():
    kappa = torch.zeros(6, 5)
    kappa[0, 1], kappa[1, 4], kappa[2, 3] = 1.0, 3.0, 1.0
    keys = torch.rand(2, 6).repeat_interleave(3, dim=0)
    picked, sound = chosen(kappa, keys, 1, top=0.2, group=3)
    assert picked[:3, 0].tolist() == [4] * 3  # of their mean
    assert sound.tolist() == [True] * 3 + [False] * 3
    kappa[0, 0] = float("nan")
    assert not bool(chosen(kappa, keys, 1, 0.2, group=3)[1].any())


def test_candidates_end_where_the_rollout_does():
    assert candidates(16, 1.0) == 15 and candidates(16, 0.5) == 7 and candidates(2, 1.0) == 1
    assert candidates(16, 0.01) == 1 and candidates(1, 1.0) == 0


def test_draws_are_a_function_of_the_step_and_as_likely_as_said():
    options = Skills(critical=0.3)
    one, again, other = (draw_critical(0, step, 4000, 8, options) for step in (5, 5, 6))
    assert np.array_equal(one.critical, again.critical) and np.array_equal(one.keys, again.keys)
    assert not np.array_equal(one.critical, other.critical)
    assert one.critical.mean() == pytest.approx(0.3, abs=0.03)
    assert np.bincount(one.kind).tolist() == pytest.approx([1000] * 4, abs=150)
    assert not draw_critical(0, 5, 100, 8, Skills(critical=0.0)).critical.any()


@pytest.mark.parametrize(("far", "length"), [(0.01, 0.01), (5.0, 0.1)])
def test_shift_is_eta_times_what_fits_the_trust_region(far, length):
    plain = torch.randn(4, 6, 3, dtype=torch.float64)
    direction = torch.randn(4, 6, 3, dtype=torch.float64)
    direction = direction / direction.flatten(1).norm(dim=1)[:, None, None]
    privileged = plain + far * plain.flatten(1).norm(dim=1)[:, None, None] * direction
    found = shift(plain, privileged, 0.5, 0.1)
    wanted = 0.5 * length * plain.flatten(1).norm(dim=1)[:, None, None] * direction
    torch.testing.assert_close(found, wanted)
    assert torch.equal(shift(plain, plain, 0.5, 0.1), torch.zeros_like(plain))
    assert torch.equal(plain + shift(plain, privileged, 0.0, 0.1), plain)


def test_shift_share_by_hand():
    shifted_, velocity, plain = (torch.randn(3, 7, dtype=torch.float64) for _ in range(3))
    moved, error = shifted_.norm(dim=1), (velocity - plain).norm(dim=1)
    found = shift_share(shifted_, velocity, plain).double()
    torch.testing.assert_close(found, moved / (moved + error), rtol=1e-5, atol=0)
    assert torch.equal(shift_share(0 * plain, plain, plain), torch.zeros(3))


@pytest.mark.parametrize("kind", DEGRADATIONS)
def test_degraded_sources_keep_their_size_and_are_made_again_alike(kind):
    image = random_image(1, 96, 64)
    one, again, other = (degrade(image, kind, seed) for seed in (7, 7, 8))
    assert one.size == image.size and one.mode == "RGB" and one.tobytes() == again.tobytes()
    assert one.tobytes() != other.tobytes()
    difference = np.abs(np.asarray(one, float) - np.asarray(image, float)).mean()
    assert 1 < difference < 70, difference
    assert degrade(image.convert("L"), kind, 7).mode == "RGB"


def test_every_template_of_the_exact_world_has_its_other_forms():
    """Rules both ways: the paraphrase of a paraphrase of an instruction is the instruction, where there are two."""
    for edit in edits("train", 300):
        (other,) = paraphrases(edit.instruction)
        assert other != edit.instruction
        if not edit.instruction.startswith("add"):
            assert paraphrases(other) == [edit.instruction]
        longer = expanded(edit.instruction)
        assert (longer is None) == edit.instruction.startswith("add")
        assert longer is None or longer.startswith(edit.instruction + " and ")
    said = {p.prompt: paraphrases(p.prompt) for p in prompts("train", 600)}
    assert sum(bool(others) for others in said.values()) / len(said) > 0.85
    for prompt, others in said.items():
        assert prompt not in others and len(set(others)) == len(others)
        for other in others:
            assert sorted(other.replace(" in flat style", "").split()) == sorted(
                prompt.replace(" in flat style", "").split()
            ) or any(word in prompt for word in ("left of", "right of", "above", "below"))
    assert paraphrases("a photo of a cross left of a star on a sand background")[0] == (
        "a photo of a star right of a cross on a sand background"
    )
    assert paraphrases("a watercolour of a fox") == [] and expanded("a watercolour of a fox") is None


def recipe(files, **gates) -> Recipe:
    return Recipe(**files, steps=4, batch=8, data={"rows": 16}, gates=gates)


def variants(made: Recipe, data, rows) -> list[dict]:
    """The variants of each teacher's rows."""
    sets = {t.name: TeacherData(d, list(r)) for t, d, r in zip(made.teachers, data, rows, strict=True)}
    found = with_variants(made.gates, made.sampling, made.rollout.steps, made.teachers, sets)
    return [dict(one.variants) for one in found.values()]


def test_variants_are_the_rows_that_will_be_sampled(files):
    made = recipe(files, consensus=True, skills=True)
    data = [prompts_from("scenes", 16), edits_from("scenes", 16)]
    found = variants(made, data, [range(16), range(16)])
    assert {"paraphrase 1", "expanded"} < set(found[0]) and not [n for n in found[0] if n.startswith("degraded")]
    kinds = {name.removeprefix("degraded "): variant for name, variant in found[1].items() if "degraded" in name}
    assert kinds and set(kinds) <= set(DEGRADATIONS)
    for kind, (worse, rows) in kinds.items():
        words, picture = worse[rows[0]]
        assert words == data[1][rows[0]][0] and picture.tobytes() == degrade(
            data[1][rows[0]][1], kind, made.seed + rows[0]
        ).tobytes()
    reworded, rows = found[1]["paraphrase 1"]
    assert reworded[rows[0]] == (paraphrases(data[1].prompt(rows[0]))[0], data[1][rows[0]][1])
    keep, _ = unchanged(data[1], [3])
    assert keep[3] == (KEEP_PROMPT, data[1][3][1])
    assert variants(recipe(files), data, [range(16), range(16)]) == [{}, {}]
    assert not any("degraded" in name for name in variants(recipe(files, skills={"eta": 0}), data, [[0], [0]])[1])


@pytest.mark.parametrize("framings", [2, 4])
def test_framings_counts_the_prompt_itself(files, tmp_path, framings):
    """Of five paraphrases so many are queried that the wordings, the row's own among them, are `framings`."""
    others = ", ".join(f'"fox {n}"' for n in range(5))
    (tmp_path / "p.jsonl").write_text(f'{{"prompt": "a fox", "paraphrases": [{others}]}}\n' * 2)
    made = recipe(files, consensus={"framings": framings})
    found = variants(made, [prompts_from(tmp_path / "p.jsonl"), edits_from("scenes", 2)], [range(2), range(2)])[0]
    assert {name: data[0] for name, (data, _) in found.items()} == {
        f"paraphrase {n}": f"fox {n - 1}" for n in range(1, framings)
    }


def test_columns_win_over_rules_and_prompts_without_either_are_refused(files, tmp_path):
    lines = ['{"prompt": "a fox", "paraphrases": ["one fox", "a fox"], "expanded": "a red fox in snow"}']
    (tmp_path / "p.jsonl").write_text("\n".join([*lines, '{"prompt": "a dog"}', '{"prompt": "a photo of a star"}']))
    (tmp_path / "p.csv").write_text("prompt,paraphrases,expanded\na fox,one fox | that fox,\na dog,,\n")
    (tmp_path / "p.txt").write_text("a fox\na dog\n")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a fox", "paraphrases": 3}\n')
    data = prompts_from(tmp_path / "p.jsonl")
    assert [other_prompts(data, row) for row in range(3)] == [["one fox"], [], ["a photo of a star in flat style"]]
    assert data.expanded(0) == "a red fox in snow" and data.expanded(1) is None
    assert prompts_from(tmp_path / "p.csv").paraphrases(0) == ["one fox", "that fox"]
    found = variants(recipe(files, consensus=True, skills=True), [data, edits_from("scenes", 4)], [range(3), range(4)])
    assert found[0]["paraphrase 1"][1] == [0, 2] and found[0]["expanded"][1] == [0, 2]
    bare = [prompts_from(tmp_path / "p.txt"), edits_from("scenes", 4)]
    with pytest.raises(UserError, match="teacher 'generation'.*column `paraphrases`"):
        variants(recipe(files, consensus=True), bare, [range(2), range(4)])
    with pytest.raises(UserError, match="gates.skills.generation.episode is caption.*column `expanded`"):
        variants(recipe(files, skills=True), bare, [range(2), range(4)])
    with pytest.raises(UserError, match="bad.jsonl, line 1: paraphrases is 3"):
        prompts_from(tmp_path / "bad.jsonl").paraphrases(0)
