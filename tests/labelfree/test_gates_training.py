"""Gates in the loop, on a real tiny FLUX.2: what is asked of whom, splits that change nothing, exact continuation,
and merges whose gates have no strength, which end at the same file as without."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from test_trainer import KLEIN, PROMPTS, make
from tiny import CALL, random_adapter, random_image, tiny_klein

from danceopd.adapters.write import write_adapter
from danceopd.data.dataset import ConditionDataset
from danceopd.engine.rollout import rollout
from danceopd.engine.trainer import STUDENT, Loop, Source
from danceopd.errors import UserError
from danceopd.labelfree.hook import ELSEWHERE, NULL, TOLD, WRONG
from danceopd.merge import merge
from danceopd.models.backbone import Backbone
from danceopd.models.fields import AdapterField
from danceopd.pipelines.editing import EditingPipeline
from danceopd.pipelines.generation import GenerationPipeline
from danceopd.pipelines.record import record
from danceopd.pipelines.registry import with_prompt_of
from danceopd.plan import plan
from danceopd.recipe.recipe import Recipe

OTHER = ["a circle red", "a square blue", "green stars two", "a ring white"]
LONGER = [f"{words} on a white background" for words in PROMPTS]
WEIGHTS = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def world():
    """Conditions of four questions of each teacher, and the same asked otherwise."""
    pipe = tiny_klein()
    draw, edit = GenerationPipeline(pipe, KLEIN, CALL), EditingPipeline(pipe, KLEIN, CALL)
    images = [random_image(i) for i in range(4)]
    worse = [random_image(10 + i) for i in range(4)]
    null = record(pipe, KLEIN, prompt="", **{"height": 64, "width": 64, "num_inference_steps": 6},
                  max_sequence_length=24)[0]  # fmt: skip
    conditions = {
        "generation": {"": draw.conditions(PROMPTS), "framing 1": draw.conditions(OTHER),
                       "expanded": draw.conditions(LONGER)},
        "editing": {"": edit.conditions(PROMPTS, images), "framing 1": edit.conditions(OTHER, images),
                    "expanded": edit.conditions(LONGER, images), "degraded blur": edit.conditions(PROMPTS, worse)},
    }  # fmt: skip
    return conditions, draw.sigmas(), null


def gated(world, files, rank=0, ranks=1, **fields) -> Loop:
    """A loop whose two teachers are random adapters, with all that a gate may ask."""
    conditions, sigmas, null = world
    backbone = Backbone(tiny_klein().transformer, KLEIN)
    sources = []
    for i, name in enumerate(("generation", "editing")):
        backbone.add_adapter(name, random_adapter(backbone.transformer, seed=i, size=0.1))
        work = {what: ConditionDataset([(c, sigmas)]) for what, c in conditions[name].items()}
        sources.append(Source(name, AdapterField(backbone, name), work.pop(""), null, work))
    given = {"steps": 6, "batch": 8, "student": {"rank": 8}}
    if (fields.get("gates") or {}).get("skills"):
        fields["gates"] = {**fields["gates"], "skills": {"degrade": ["blur"], **fields["gates"]["skills"]}}
    recipe = Recipe(**files, **{**given, **fields})
    backbone.new_student(STUDENT, recipe.student.rank, recipe.seed)
    return Loop(recipe, backbone, sources, torch.device("cpu"), rank, ranks)


ALL = {"evidence": {"alpha": 1.0}, "consensus": True, "skills": {"eta": 1.0}}
KINDS = {
    "evidence": {"evidence": {"contrast": "prompt"}},
    "groups": {**ALL, "group": 2},
    "all": ALL,
}


def test_rows_are_asked_as_the_gates_say(world, files):
    """The null prompt, another question's prompt, other words, the clean source of what the student sees degraded."""
    conditions, _, null = world
    loop = gated(world, files, batch=16, seed=3, gates={**ALL, "evidence": {"contrast": "null"}},
                 guidance={"unconditional": 0.2})  # fmt: skip
    seen, kinds = 0, set()
    for lesson in loop._lessons():
        gates, name = lesson.gates, ("generation", "editing")[lesson.routes[0]]
        assert not set(gates.asked) & {ELSEWHERE}
        mine = conditions[name]
        for row, blank in enumerate(lesson.blank):
            at = {what: one.rows.index(row) for what, one in gates.asked.items() if row in one.rows}
            assert bool(gates.gated[row]) != blank and bool(at) != blank
            if blank:
                continue
            question = lesson.condition.rows([row])
            first = question.kwargs["encoder_hidden_states"]
            which = [i for i in range(4) if torch.equal(mine[""].kwargs["encoder_hidden_states"][i], first[0])][0]
            words = {what: one.condition.kwargs["encoder_hidden_states"][at[what]] for what, one in
                     gates.asked.items() if what in at}  # fmt: skip
            assert torch.equal(words[NULL], null.kwargs["encoder_hidden_states"][0])
            assert torch.equal(words["framing 1"], mine["framing 1"].kwargs["encoder_hidden_states"][which])
            wrong = [i for i in range(4) if torch.equal(mine[""].kwargs["encoder_hidden_states"][i], words[WRONG])]
            assert wrong and wrong != [which]
            critical = bool(gates.critical[row])
            told = "guided" if critical and name == "generation" else "source" if critical else "caption"
            kinds.add((name, told))
            assert (row in gates.guided) == (told == "guided")
            if told == "caption":
                assert torch.equal(words[TOLD], mine["expanded"].kwargs["encoder_hidden_states"][which])
            if name == "editing":
                source = mine["degraded blur" if told == "source" else ""].context[which]
                assert torch.equal(question.context[0], source)  # what the student sees
                assert torch.equal(gates.asked[NULL].condition.context[at[NULL]], source)
                assert torch.equal(gates.asked[TOLD].condition.context[at[TOLD]], mine[""].context[which]) or (
                    told == "caption"
                )
                assert gates.grid == (4, 4)
            seen += 1
    assert seen > 8 and len(kinds) == 4, kinds


def test_a_wrong_prompt_is_the_next_of_the_update_else_one_of_the_datas_first(world, files):
    """Of the same teacher, with a prompt, and another question: whatever slice asks."""
    loop = gated(world, files, gates={"consensus": True})
    blank = [False, False, False, True, False, False]
    update = loop.contexts.update(0, [0, 1, 0, 0, 0, 1], [3, 1, 3, 2, 0, 1], blank)
    generation, editing = [0, 2, 3, 4], [1, 5]
    assert [update._partner(u, generation) for u in generation] == [0, 0, 0, 3]
    assert [update._partner(u, editing) for u in editing] == [0, 0]  # both ask question 1: the data's first other
    assert update._partner(4, [4, 0, 2]) == 3 == update._partner(4, [0, 2, 4])


def test_siblings_ask_one_question_at_one_noise_level_from_noises_of_their_own(world, files):
    loop = gated(world, files, batch=16, query={"law": "uniform", "jitter": True}, gates={**ALL, "group": 4})
    seen = set()
    for lesson in loop._lessons():
        states = lesson.gates.walk(lesson)
        levels, starts = lesson.levels.unflatten(0, (-1, 4)), lesson.noise().unflatten(0, (-1, 4))
        words = lesson.condition.kwargs["encoder_hidden_states"].unflatten(0, (-1, 4))
        assert bool((levels == levels[:, :1]).all()) and bool((words == words[:, :1]).all())
        assert not bool((starts[:, 0] == starts[:, 1]).all()) and states.shape[:2] == (len(lesson.mine), 1)
        seen |= set(levels[:, 0, 0].tolist())
    assert len(seen) == 4


def test_another_rows_source_is_a_contrast(world, files):
    conditions, _, _ = world
    loop = gated(world, files, gates={"evidence": {"contrast": "source"}})
    for lesson in loop._lessons():
        editing = lesson.routes[0] == 1
        assert set(lesson.gates.asked) == {ELSEWHERE if editing else WRONG}
        if editing:
            one = lesson.gates.asked[ELSEWHERE]
            mine = lesson.condition.rows(one.rows)
            assert torch.equal(one.condition.kwargs["encoder_hidden_states"], mine.kwargs["encoder_hidden_states"])
            for a, b in zip(one.condition.context, mine.context):
                assert not torch.equal(a, b) and any(torch.equal(a, c) for c in conditions["editing"][""].context)


def test_only_critical_rows_walk_on_and_their_state_is_their_walks(world, files):
    """Each row's state is that of its own plain walk to where it is asked; who is not critical stops at the law's."""
    loop = gated(world, files, batch=12, gates={"skills": {"critical": 0.5, "top": 0.4}})
    plain = make(({k: v[""] for k, v in world[0].items()}, world[1]), files, batch=12)
    moved = 0
    for lesson, same in zip(loop._lessons(), plain._lessons()):
        depths = []
        field = lesson.fields.walk
        lesson.fields = lesson.fields.__class__(
            lambda x, s, c, d=depths, f=field: d.append(len(x)) or f(x, s, c), *list(vars(lesson.fields).values())[1:]
        )
        own = lesson.stops.clone()
        states = lesson.gates.walk(lesson)
        critical = lesson.gates.critical
        asked = torch.where(critical[:, None], torch.full_like(own, 6), own)
        assert sum(depths) == int(asked.sum())
        assert torch.equal(lesson.stops[~critical], own[~critical]) and torch.equal(own, same.stops)
        alone = rollout(field, lesson.noise(), lesson.sigmas, lesson.stops, lesson.condition)
        torch.testing.assert_close(states, alone, atol=1e-5, rtol=1e-4)
        assert torch.equal(lesson.levels, lesson.sigmas[lesson.stops])
        assert int(lesson.stops.max()) < 6
        moved += int((lesson.stops != own).sum())
    assert moved > 0


@pytest.mark.parametrize("kind", KINDS)
def test_an_update_does_not_depend_on_how_it_is_split(world, files, kind):
    """Two processes, or slices of one batch: the same gradient, figures and running means."""
    whole = gated(world, files, gates=KINDS[kind])
    parts = [gated(world, files, rank=rank, ranks=2, gates=KINDS[kind]) for rank in range(2)]
    slices = gated(world, files, micro_batch=2, gates=KINDS[kind])
    for _ in range(2):  # the second update has running means to go by
        grads = {}
        for name, loops in {"whole": [whole], "parts": parts, "slices": [slices]}.items():
            noted = []
            for loop in loops:
                for lesson in loop._lessons():
                    loop.objective(lesson)
                noted.append(torch.cat([n.flatten() for n in loop.contexts.running._noted]))
            for loop in loops:
                loop.contexts.running.fold(lambda total, noted=noted: total.copy_(sum(noted)))
                loop.step += 1
            zero = [torch.zeros_like(p) for p in whole.parameters]
            mine = [[p.grad if p.grad is not None else z for p, z in zip(loop.parameters, zero)] for loop in loops]
            grads[name] = [sum(g) for g in zip(*mine)]
            for loop in loops:
                loop.optimizer.zero_grad()
        for name in ("parts", "slices"):
            for a, b in zip(grads["whole"], grads[name]):
                torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-6)
    for other in (parts[0], slices):
        torch.testing.assert_close(other.contexts.running.weights, whole.contexts.running.weights, rtol=1e-4, atol=1e-6)
    assert float(whole.contexts.running.weights[:, 0].sum()) == 16


def test_a_run_goes_on_exactly(world, files):
    loops = [gated(world, files, steps=4, batch=16, ema=0.9, gates=ALL) for _ in range(4)]
    whole, first, second, without = loops
    whole.run(lambda done: None)
    for _ in range(3):
        first._update()
        first.step += 1
    state = {k: v.clone() for k, v in first.state().items()}
    assert {"gates.scores", "gates.weights"} <= set(state) and float(state["gates.weights"][:, 0].sum()) == 48
    second.restore(3, state)
    second.run(lambda done: None)
    for a, b in zip(whole.average, second.average):
        assert torch.equal(a, b)
    without.restore(3, {**state, "gates.weights": 0 * state["gates.weights"] + 3})
    without.run(lambda done: None)
    assert not all(torch.equal(a, b) for a, b in zip(whole.average, without.average))


def test_figures_are_there_when_a_gate_is(world, files):
    done = gated(world, files, gates={**ALL, "group": 2})._update().scalars()
    names = {name for name in done if name.startswith("gate/")}
    assert names == {
        "gate/weight", "gate/weight std", "gate/weight zero", "gate/ess", "gate/rho", "gate/delta positive",
        "gate/leak", "gate/consensus", "gate/critical", "gate/guarded", "gate/shift share",
    }  # fmt: skip
    assert 0 < done["gate/ess"] <= 1 and 0 <= done["gate/consensus"] <= 1 and done["gate/leak"] > 0
    plain = gated(world, files)
    assert plain.contexts is None and "gates.scores" not in plain.state()
    assert not [name for name in plain._update().scalars() if name.startswith("gate")]


def test_a_missing_null_prompt_is_asked_for(world, files):
    with pytest.raises(UserError, match="gates ask the null prompt, and teacher 'generation' has none"):
        gated((world[0], world[1], None), files, gates={"evidence": True})
    gated((world[0], world[1], None), files, gates={"evidence": {"contrast": "prompt"}})._update()


# From end to end


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    pipe = tiny_klein(folder / "base")
    for i, name in enumerate(("draws", "edits")):
        write_adapter(random_adapter(pipe.transformer, seed=i, size=0.1), folder / name)
    return folder


def recipe(models: Path, output: Path, **fields) -> Recipe:
    given = {
        "base": str(models / "base"), "generation": str(models / "draws"), "editing": str(models / "edits"),
        "output": output, "steps": 3, "batch": 4, "student": {"rank": 8}, "data": {"rows": 6}, "save_every": 2,
        "rollout": {"steps": 3}, "samples": {"every": 0, "count": 1}, "watch": {"every": 0}, "device": "cpu",
        "call": {"height": 64, "width": 64, "steps": 2, "max_sequence_length": 40},
    }  # fmt: skip
    return Recipe(**{**given, **fields})


def sha(models: Path, output: Path, **fields) -> str:
    merge(recipe(models, output, **fields), lambda done, steps: None)
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


def test_a_stopped_gated_run_goes_on_to_the_same_file(models, tmp_path):
    gates = {"consensus": True, "evidence": {"alpha": -0.5}, "group": 2}
    whole = sha(models, tmp_path / "whole", gates=gates)
    sha(models, tmp_path / "part", gates=gates, steps=2)
    assert sha(models, tmp_path / "part", gates=gates) == whole
    with pytest.raises(UserError, match="holds another run .gates.evidence"):
        merge(recipe(models, tmp_path / "part", steps=4), lambda done, steps: None)


def test_plan_counts_what_gates_ask(models, tmp_path):
    def passes(**gates) -> dict[str, float]:
        return plan(recipe(models, tmp_path / "none", gates=gates, rollout={"steps": 3}), tflops=1.0)["passes"]

    assert not [name for name in passes() if "gates" in name]
    assert passes(evidence=True)["gates, frozen"] == 1
    several = passes(consensus=True)["gates, frozen"]
    assert 1 < several <= 3
    assert passes(consensus=True, evidence={"contrast": "prompt"})["gates, frozen"] == several
    assert passes(consensus=True, evidence=True)["gates, frozen"] == several + 1
    both = passes(skills={"generation": {"episode": "none"}, "editing": {"episode": "none"}})
    assert both["gates, frozen"] == pytest.approx(0.5)  # critical rows alone
    assert both["gates, walk"] == pytest.approx(0.5 * (3 - both["walk"]))
    assert passes(evidence=True, group=2)["gates, walk"] == 0


def test_other_prompts_stay_in_their_layout(world):
    """What a contrast is made by: the prompts of one condition on everything else of another."""
    conditions, _, null = world
    mine = conditions["editing"][""]
    assert with_prompt_of(mine, null).layout == mine.layout == with_prompt_of(mine, conditions["editing"]["expanded"]).layout
