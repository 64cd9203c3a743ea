"""Gates in the trainer, on a real tiny FLUX.2: which conditions are queried, splits that change nothing, exact
continuation, and merges whose gates have no strength, which end at the same file as without."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest
import torch
from tiny_merge import WEIGHTS, tiny_recipe
from tiny_trainer import NAMES, TinyData, backward, batches_of, make_trainer, tiny_data, train

from danceopd.data.dataset import open_datasets
from danceopd.engine.batches import Draw
from danceopd.engine.rollout import rollout
from danceopd.engine.trainer import Trainer
from danceopd.errors import UserError
from danceopd.labelfree.gates.context import ELSEWHERE, NULL, PRIVILEGED, WRONG, StepContext
from danceopd.labelfree.gates.variants import other_prompts
from danceopd.merge import merge
from danceopd.pipelines.registry import with_prompt_of
from danceopd.plan import plan
from danceopd.recipe.recipe import Recipe

PROMPT = "encoder_hidden_states"


@pytest.fixture(scope="module")
def data() -> TinyData:
    """Four conditions of each teacher, and the same rows under other conditions."""
    return tiny_data(variants=True)


def gated(data, files, **fields) -> Trainer:
    if (fields.get("gates") or {}).get("skills"):
        fields["gates"] = {**fields["gates"], "skills": {"degrade": ["blur"], **fields["gates"]["skills"]}}
    return make_trainer(data, files, **{"batch": 8, **fields})


ALL = {"evidence": {"alpha": 1.0}, "consensus": True, "skills": {"eta": 1.0}}
KINDS = {
    "evidence": {"evidence": {"contrast": "prompt"}},
    "groups": {**ALL, "group": 2},
    "all": ALL,
}


def test_rows_are_queried_as_the_gates_say(data, files):
    """The null prompt, another row's prompt, a paraphrase, the clean source of what the student sees degraded."""
    gates = {**ALL, "evidence": {"contrast": "null"}}
    trainer = gated(data, files, batch=16, seed=3, gates=gates, guidance={"unconditional": 0.2})
    count, kinds = 0, set()
    for batch in batches_of(trainer):
        context, name = batch.hook.context, NAMES[batch.teacher_index[0]]
        assert not set(context.others) & {ELSEWHERE}
        own, variants = data.conditions[name], data.variants[name]
        for row, unconditional in enumerate(batch.unconditional):
            at = {what: one.rows.index(row) for what, one in context.others.items() if row in one.rows}
            assert bool(context.conditional[row]) != unconditional and bool(at) != unconditional
            if unconditional:
                continue
            mine = batch.condition.rows([row])
            (which,) = [i for i in range(4) if torch.equal(own.kwargs[PROMPT][i], mine.kwargs[PROMPT][0])]
            prompts = {w: o.condition.kwargs[PROMPT][at[w]] for w, o in context.others.items() if w in at}
            assert torch.equal(prompts[NULL], data.null.kwargs[PROMPT][0])
            assert torch.equal(prompts["paraphrase 1"], variants["paraphrase 1"].kwargs[PROMPT][which])
            wrong = [i for i in range(4) if torch.equal(own.kwargs[PROMPT][i], prompts[WRONG])]
            assert wrong and wrong != [which]
            critical = bool(context.critical[row])
            kind = "guided" if critical and name == "generation" else "source" if critical else "caption"
            kinds.add((name, kind))
            assert (row in context.guided) == (kind == "guided")
            if kind == "caption":
                assert torch.equal(prompts[PRIVILEGED], variants["expanded"].kwargs[PROMPT][which])
            if name == "editing":
                source = (variants["degraded blur"] if kind == "source" else own).context[which]
                assert torch.equal(mine.context[0], source)  # what the student sees
                assert torch.equal(context.others[NULL].condition.context[at[NULL]], source)
                clean = context.others[PRIVILEGED].condition.context[at[PRIVILEGED]]
                assert torch.equal(clean, own.context[which]) or kind == "caption"
                assert context.grid == (4, 4)
            count += 1
    assert count > 8 and len(kinds) == 4, kinds


def test_a_wrong_prompt_is_the_next_of_the_update_else_one_of_the_datas_first(data, files):
    """Of the same teacher, with a prompt, and another sample: whatever slice is queried."""
    hook = gated(data, files, gates={"consensus": True}).hook
    dropped = [False, False, False, True, False, False]
    draw = Draw([0, 1, 0, 0, 0, 1], [3, 1, 3, 2, 0, 1], dropped, torch.zeros(6, 1))
    step = StepContext(hook.gates, hook.teachers, hook.capabilities, hook.device, 0, 0, 6, draw)
    generation, editing = [0, 2, 3, 4], [1, 5]
    assert [step._partner(g, generation) for g in generation] == [0, 0, 0, 3]
    assert [step._partner(g, editing) for g in editing] == [0, 0]  # both have sample 1: the data's first other
    assert step._partner(4, [4, 0, 2]) == 3 == step._partner(4, [0, 2, 4])


def test_siblings_share_a_sample_and_a_noise_level_from_noises_of_their_own(data, files):
    trainer = gated(data, files, batch=16, query={"law": "uniform", "jitter": True}, gates={**ALL, "group": 4})
    levels = set()
    for batch in batches_of(trainer):
        states = batch.hook.rollout(batch, trainer.velocities)
        sigma, noise = batch.query_sigma.unflatten(0, (-1, 4)), batch.noise().unflatten(0, (-1, 4))
        prompts = batch.condition.kwargs[PROMPT].unflatten(0, (-1, 4))
        assert bool((sigma == sigma[:, :1]).all()) and bool((prompts == prompts[:, :1]).all())
        assert not bool((noise[:, 0] == noise[:, 1]).all()) and states.shape[:2] == (len(batch), 1)
        levels |= set(sigma[:, 0, 0].tolist())
    assert len(levels) == 4


def test_another_rows_source_is_a_contrast(data, files):
    trainer = gated(data, files, gates={"evidence": {"contrast": "source"}})
    for batch in batches_of(trainer):
        editing, others = batch.teacher_index[0] == 1, batch.hook.context.others
        assert set(others) == {ELSEWHERE if editing else WRONG}
        if editing:
            other = others[ELSEWHERE]
            mine = batch.condition.rows(other.rows)
            assert torch.equal(other.condition.kwargs[PROMPT], mine.kwargs[PROMPT])
            for a, b in zip(other.condition.context, mine.context):
                assert not torch.equal(a, b)
                assert any(torch.equal(a, c) for c in data.conditions["editing"].context)


def test_only_critical_rows_roll_on_and_their_state_is_their_trajectorys(data, files):
    """Each row's state is that of its own plain rollout to its query; who is not critical stops at the law's."""
    trainer = gated(data, files, batch=12, gates={"skills": {"critical": 0.5, "top": 0.4}})
    plain = make_trainer(data, files, batch=12)
    moved = 0
    for batch, same in zip(batches_of(trainer), batches_of(plain)):
        depths, field = [], trainer.velocities.rollout.field

        def counted(x, s, c, d=depths, f=field):
            d.append(len(x))
            return f(x, s, c)

        student = dataclasses.replace(trainer.velocities.rollout, field=counted)
        own = batch.query_step.clone()
        states = batch.hook.rollout(batch, dataclasses.replace(trainer.velocities, rollout=student))
        critical = batch.hook.context.critical
        depth = torch.where(critical[:, None], torch.full_like(own, 6), own)
        assert sum(depths) == int(depth.sum())
        assert torch.equal(batch.query_step[~critical], own[~critical]) and torch.equal(own, same.query_step)
        alone = rollout(field, batch.noise(), batch.sigmas, batch.query_step, batch.condition)
        torch.testing.assert_close(states, alone, atol=1e-5, rtol=1e-4)
        assert torch.equal(batch.query_sigma, batch.sigmas[batch.query_step])
        assert int(batch.query_step.max()) < 6
        moved += int((batch.query_step != own).sum())
    assert moved > 0


@pytest.mark.parametrize("kind", KINDS)
def test_an_update_does_not_depend_on_how_it_is_split(data, files, kind):
    """Two processes, or slices of one batch: the same gradient, metrics and running means."""
    whole = gated(data, files, gates=KINDS[kind])
    parts = [gated(data, files, rank=rank, world=2, gates=KINDS[kind]) for rank in range(2)]
    slices = gated(data, files, micro_batch=2, gates=KINDS[kind])
    for _ in range(2):  # the second update has running means to go by
        grads = {}
        for name, trainers in {"whole": [whole], "parts": parts, "slices": [slices]}.items():
            noted = []
            for trainer in trainers:
                for batch in batches_of(trainer):
                    backward(trainer, batch)
                noted.append(torch.cat([n.flatten() for n in trainer.hook.running._noted]))
            for trainer in trainers:
                trainer.hook.end_step(lambda total, noted=noted: total.copy_(sum(noted)))
                trainer.step += 1
            zero = [torch.zeros_like(p) for p in whole.optimizer.parameters]
            mine = [
                [z if p.grad is None else p.grad for p, z in zip(trainer.optimizer.parameters, zero)]
                for trainer in trainers
            ]
            grads[name] = [sum(g) for g in zip(*mine)]
            for trainer in trainers:
                trainer.optimizer.adamw.zero_grad()
        for name in ("parts", "slices"):
            for a, b in zip(grads["whole"], grads[name]):
                torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-6)
    for other in (parts[0], slices):
        torch.testing.assert_close(other.hook.running.weights, whole.hook.running.weights, rtol=1e-4, atol=1e-6)
    assert float(whole.hook.running.weights[:, 0].sum()) == 16


def test_a_run_continues_exactly(data, files):
    whole, first, second, without = (gated(data, files, steps=4, batch=16, ema=0.9, gates=ALL) for _ in range(4))
    train(whole)
    train(first, 3)
    state = {k: v.clone() for k, v in first.state_dict().items()}
    assert {"gates.scores", "gates.weights"} <= set(state) and float(state["gates.weights"][:, 0].sum()) == 48
    second.load_state_dict(3, state)
    train(second)
    for a, b in zip(whole.optimizer.ema, second.optimizer.ema):
        assert torch.equal(a, b)
    without.load_state_dict(3, {**state, "gates.weights": 0 * state["gates.weights"] + 3})
    train(without)
    assert not all(torch.equal(a, b) for a, b in zip(whole.optimizer.ema, without.optimizer.ema))


def test_metrics_are_there_when_a_gate_is(data, files):
    metrics = gated(data, files, gates={**ALL, "group": 2}).train_step().scalars()
    assert {name for name in metrics if name.startswith("gate/")} == {
        "gate/weight", "gate/weight std", "gate/weight zero", "gate/ess", "gate/rho", "gate/delta positive",
        "gate/leak", "gate/consensus", "gate/critical", "gate/guarded", "gate/shift share",
    }  # fmt: skip
    mean, std = metrics["gate/weight"], metrics["gate/weight std"]
    assert std > 0 and metrics["gate/ess"] == pytest.approx(mean**2 / (mean**2 + std**2), rel=1e-4)
    assert 0 <= metrics["gate/consensus"] <= 1 and metrics["gate/leak"] > 0
    plain = gated(data, files)
    assert plain.hook is None and "gates.scores" not in plain.state_dict()
    assert not [name for name in plain.train_step().scalars() if name.startswith("gate")]


def test_a_missing_null_prompt_is_named(data, files):
    without = dataclasses.replace(data, null=None)
    with pytest.raises(UserError, match="gates query the null prompt, and teacher 'generation' has none"):
        gated(without, files, gates={"evidence": True})
    gated(without, files, gates={"evidence": {"contrast": "prompt"}}).train_step()


# From end to end


def recipe(models: Path, output: Path, **fields) -> Recipe:
    call = {"height": 64, "width": 64, "num_inference_steps": 2, "max_sequence_length": 40}
    return tiny_recipe(models, output, **{"steps": 3, "monitor": {"every": 0}, "device": "cpu", "call": call, **fields})


def sha(models: Path, output: Path, **fields) -> str:
    merge(recipe(models, output, **fields), lambda metrics, steps: None)
    return hashlib.sha256((output / WEIGHTS).read_bytes()).hexdigest()


NOTHING = {
    "evidence": {"alpha": 0, "tokens": 0},
    "consensus": {"bound": 0},
    "skills": {"eta": 0, "critical": 0},
}


def test_gates_of_no_strength_end_at_the_same_file(models, tmp_path):
    """weight 1 and eta 0 are DanceOPD, to the last bit of the exported adapter; gates of some strength are not."""
    plain = sha(models, tmp_path / "plain")
    assert sha(models, tmp_path / "nothing", gates=NOTHING) == plain
    logged = [json.loads(line) for line in (tmp_path / "nothing" / "metrics.jsonl").read_text().splitlines()][1:]
    assert all(line["gate/weight"] == 1 and line["gate/weight std"] == 0 for line in logged)
    assert "gate/" not in (tmp_path / "plain" / "metrics.jsonl").read_text()
    found = {sha(models, tmp_path / name, gates={name: True}) for name in ("evidence", "consensus", "skills")}
    assert len(found | {plain}) == 4


def test_a_stopped_gated_run_continues_to_the_same_file(models, tmp_path):
    gates = {"consensus": True, "evidence": {"alpha": -0.5}, "group": 2}
    whole = sha(models, tmp_path / "whole", gates=gates)
    sha(models, tmp_path / "part", gates=gates, steps=2)
    assert sha(models, tmp_path / "part", gates=gates) == whole
    lines = [json.loads(line) for line in (tmp_path / "part" / "metrics.jsonl").read_text().splitlines()]
    consensus = [line["gate/consensus"] for line in lines if line["step"]]
    assert len(consensus) == 3 and 0 < max(consensus) < 0.9999  # paraphrases are answered, and unlike
    with pytest.raises(UserError, match="holds another run .gates.evidence"):
        merge(recipe(models, tmp_path / "part", steps=4), lambda metrics, steps: None)


def test_plan_counts_what_gates_query(models, tmp_path):
    def passes(**gates) -> dict[str, float]:
        return plan(recipe(models, tmp_path / "none", gates=gates, rollout={"steps": 3}), tflops=1.0)["passes"]

    assert not [name for name in passes() if "gates" in name]
    assert passes(evidence=True)["gates, frozen"] == 1
    data = open_datasets(recipe(models, tmp_path / "none")).values()
    worded = [sum(min(2, len(other_prompts(one.data, row))) for row in one.rows) / len(one.rows) for one in data]
    several = passes(consensus=True)["gates, frozen"]  # another prompt, and up to two wordings where the row has them
    assert several == pytest.approx(1 + sum(worded) / 2) and 0 < sum(worded) / 2 < 2
    assert passes(consensus=True, evidence={"contrast": "prompt"})["gates, frozen"] == several
    assert passes(consensus=True, evidence=True)["gates, frozen"] == several + 1
    both = passes(skills={"generation": {"episode": "none"}, "editing": {"episode": "none"}})
    assert both["gates, frozen"] == pytest.approx(0.5)  # critical rows alone
    assert both["gates, rollout"] == pytest.approx(0.5 * (3 - both["rollout"]))
    assert passes(evidence=True, group=2)["gates, rollout"] == 0


def test_other_prompts_stay_in_their_layout(data):
    """What a contrast is made by: the prompts of one condition on everything else of another."""
    mine, longer = data.conditions["editing"], data.variants["editing"]["expanded"]
    assert with_prompt_of(mine, data.null).layout == mine.layout == with_prompt_of(mine, longer).layout
