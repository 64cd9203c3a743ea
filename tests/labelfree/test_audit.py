"""The audit: ranks against truth by hand, and the whole command on tiny pipelines of every family."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from PIL import Image
from tinies import TINYS
from tiny_merge import family_recipe, tiny_models, tiny_recipe

from danceopd.audit import EXACT, Options, audit
from danceopd.errors import UserError
from danceopd.labelfree.audit.check import check_audit
from danceopd.labelfree.audit.figures import against_each_other, against_truth, concordance, figure, top, verdict
from danceopd.labelfree.audit.summary import audit_folder
from danceopd.recipe.nft import NFT

TRUTH = np.array([[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 0.0]])


def test_a_share_of_pairs_by_hand():
    signal = np.array([[4, 1, 3, 2], [1, 2, 3, 4], [5, 5, 0, 5.0]])
    # question 0: (4 > 1, 4 > 3, 2 > 1, 2 < 3); 1: all alike; 2: two level pairs, one lost
    assert concordance(signal, TRUTH) == pytest.approx([0.75, np.nan, 1 / 3], nan_ok=True)
    assert top(signal, TRUTH) == pytest.approx([1, 0, 2 / 3])
    signal[0, 1] = np.nan
    assert np.isnan(concordance(signal, TRUTH)[0]) and np.isnan(top(signal, TRUTH)[0])
    assert figure(np.array([np.nan])) is None and verdict(None).startswith("cannot be told (0 questions)")


def test_a_signal_that_sees_ranks_and_its_opposite_is_worse_than_chance():
    rng = np.random.default_rng(2)
    truth = (rng.random((80, 8)) < 0.4).astype(float)
    noise = rng.normal(size=truth.shape)
    found = against_truth({"sees": truth + noise, "opposite": -truth - noise, "blind": noise}, truth)
    words = {name: one["verdict"] for name, one in found["signals"].items()}
    assert words == {"sees": "ranks", "opposite": "is worse than chance", "blind": "is no better than chance"}
    sees, opposite = found["signals"]["sees"], found["signals"]["opposite"]
    assert sees["auc"]["mean"] + opposite["auc"]["mean"] == pytest.approx(1)
    assert sees["auc"]["mean"] == pytest.approx(0.76, abs=0.03)  # of a normal signal one deviation apart
    assert found["mean"]["mean"] < sees["best"]["mean"] < found["oracle"]["mean"]
    assert sees["gain"]["low"] > 0 and opposite["gain"]["high"] < 0
    assert found["headroom"]["mean"] == pytest.approx(found["oracle"]["mean"] - found["mean"]["mean"])
    few = against_truth({"sees": truth[:6]}, truth[:6])
    assert few["mixed"] < 6 and few["signals"]["sees"]["verdict"] == f"cannot be told ({few['mixed']} questions)"


def test_without_truth_signals_of_one_kind_do_not_confirm_each_other():
    rng = np.random.default_rng(1)
    shared, own = rng.normal(size=(60, 8)), rng.normal(size=(60, 8))
    signals = {"a": shared, "b": shared + 0.5 * rng.normal(size=shared.shape), "c": own, "d": own}
    found = against_each_other(signals, {"a": "one", "b": "two", "c": "three", "d": "three"})["signals"]
    assert found["a"]["verdict"] == found["b"]["verdict"] == "agrees with the others"
    assert found["c"]["verdict"] == "is no better than chance" and found["c"]["with"] == ["one", "two"]
    alone = against_each_other({"c": own, "d": own}, {"c": "three", "d": "three"})["signals"]
    assert alone["c"]["auc"] is None and "no signal of another kind" in alone["c"]["verdict"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return tiny_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def done(models, tmp_path_factory):
    """An audit of random teachers, whose pictures are never right, on the built-in scenes."""
    recipe = tiny_recipe(models, tmp_path_factory.mktemp("runs") / "student")
    return recipe, audit(recipe, Options(questions=3, samples=2, levels=(0.7,)))


def test_an_audit_has_tables_and_pictures(done):
    recipe, facts = done
    folder = audit_folder(recipe.output)
    assert folder.name == "student-audit" and not recipe.output.exists()
    assert json.loads((folder / "audit.json").read_text()) == facts
    editing = facts["teachers"]["editing"]
    assert editing["truth"] == EXACT and editing["mean"]["mean"] == 0 and editing["mixed"] == 0
    assert set(editing["signals"]) == {
        "reward likelihood", "likelihood at 0.7", "null contrast", "likelihood of the base", "consensus", "preserve",
    }  # fmt: skip
    assert "consensus" not in facts["teachers"]["generation"]["signals"]
    likelihood = editing["signals"]["reward likelihood"]
    assert likelihood["forwards"] == 6 and likelihood["seconds"] > 0 and likelihood["auc"] is None
    assert likelihood["sentence"].startswith("reward likelihood cannot be told (0 questions)")
    for name in ("generation", "editing"):
        with Image.open(folder / f"audit-{name}.png") as picture:
            assert min(picture.size) > 128
    text = (folder / "audit.md").read_text()
    assert "## editing (editing): 3 questions, 2 samples each by the student's start" in text
    assert "oracle 0.00 [0.00, 0.00]" in text


def test_an_interrupted_audit_goes_on_and_ends_alike(done, monkeypatch):
    recipe, facts = done
    folder = audit_folder(recipe.output)
    file = folder / "questions.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    (folder / "audit.json").unlink()
    file.write_text("".join(lines[:3]) + lines[3][:40])
    seen = []
    again = audit(recipe, Options(questions=3, samples=2, levels=(0.7,)), report=lambda d, total, note: seen.append(d))
    assert seen[0] == 2 and seen[-1] == 6
    for name, of in again["teachers"].items():
        for signal, figures in of["signals"].items():
            assert figures["verdict"] == facts["teachers"][name]["signals"][signal]["verdict"]
    told = [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines[1:]]
    kept = [json.loads(line) for line in file.read_text().splitlines() if line.startswith('{"teacher"')]
    assert [{k: v for k, v in line.items() if k != "seconds"} for line in kept] == told
    monkeypatch.setattr("danceopd.assembly.load_base", None)  # all is answered: no model is needed
    assert audit(recipe, Options(questions=3, samples=2, levels=(0.7,))) == again
    with pytest.raises(UserError, match="holds an audit with other samples"):
        audit(recipe, Options(questions=3, samples=3, levels=(0.7,)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"questions": 1}, "--questions is 1"),
        ({"samples": 1}, "--samples is 1"),
        ({"draws": "base"}, "--draws is 'base'; give student"),
        ({"levels": (1.5,)}, "--levels has 1.5"),
        ({"levels": (0.5, 0.5)}, "--levels names a noise level twice"),
    ],
)
def test_bad_input_is_refused_before_a_model_is_loaded(models, tmp_path, monkeypatch, options, words):
    monkeypatch.setattr("danceopd.assembly.load_base", None)
    with pytest.raises(UserError, match=words):
        audit(tiny_recipe(models, tmp_path / "student"), Options(**options))
    assert not list(tmp_path.iterdir())


def test_a_folder_of_something_else_is_refused(models, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other files \\(notes.txt\\)"):
        audit(tiny_recipe(models, tmp_path / "student"), Options(questions=2), output=tmp_path)


def audited(folder, recipe, facts, low, **changes):
    """The audit of `recipe` with an AUC of at least `low`, in `folder`; and what a merge asks it with."""
    told = json.loads(json.dumps(facts))
    for of in told["teachers"].values():
        auc = {"mean": low + 0.05, "low": low, "high": low + 0.1, "n": 30}
        of["signals"]["reward likelihood"] |= {"auc": auc, "verdict": verdict(auc)}
    folder.mkdir(exist_ok=True)
    (folder / "audit.json").write_text(json.dumps(told | changes))
    identity = facts["identity"]
    return recipe, NFT(), identity["base"], {name: of[0] for name, of in identity["teachers"].items()}


def test_a_reward_that_does_not_rank_is_refused_unless_told_otherwise(done, tmp_path):
    recipe = done[0].model_copy(update={"output": tmp_path / "student"})
    folder = audit_folder(recipe.output)
    asked = audited(folder, recipe, done[1], 0.55)
    by = done[1]["by"]
    assert check_audit(*asked) == f"every reward ranks better than chance by the audit in {folder}, of samples by {by}"
    audited(folder, recipe, done[1], 0.45)
    words = "likelihood is no better than chance for teacher 'generation': AUC 0.50 \\[0.45 to 0.55\\] over 30 "
    with pytest.raises(UserError, match=words):
        check_audit(*asked)
    recipe, part, *weights = asked
    assert "nft.audit is none" in check_audit(recipe, NFT(audit="none"), *weights)
    (folder / "audit.json").unlink()
    assert "no audit says" in check_audit(*asked)
    with pytest.raises(UserError, match="audit .*nowhere.* does not exist"):
        check_audit(recipe, NFT(audit=str(tmp_path / "nowhere")), *weights)
    for damaged in ("[]", '{"identity": {}, "teachers": {}}', '{"identity": [], "teachers": {}}', "{"):
        (folder / "audit.json").write_text(damaged)
        if damaged.startswith('{"identity": {'):
            assert "is of another base" in check_audit(*asked)
            continue
        with pytest.raises(UserError, match="is no result of `danceopd audit`"):
            check_audit(*asked)


def test_an_audit_of_something_else_is_not_believed(done, tmp_path):
    recipe = done[0].model_copy(update={"output": tmp_path / "student"})
    asked = audited(audit_folder(recipe.output), recipe, done[1], 0.45)
    _, part, base, teachers = asked
    assert "is of another base, and is not read" in check_audit(recipe, part, "0", teachers)
    assert "of another set of teachers" in check_audit(recipe, part, base, teachers | {"editing": "0"})
    levels = NFT(rewards={"likelihood": {"levels": [0.5]}})
    assert "of another reward likelihood" in check_audit(recipe, levels, base, teachers)
    named = NFT(audit=str(audit_folder(recipe.output)))
    with pytest.raises(UserError, match="is of another base"):
        check_audit(recipe, named, "0", teachers)
    with pytest.raises(UserError, match="no better than chance"):  # another weight ranks alike
        check_audit(recipe, NFT(rewards={"likelihood": 2.0}), base, teachers)


def test_an_audit_without_enough_answers_is_said(done):
    recipe, facts = done
    teachers = {name: of[0] for name, of in facts["identity"]["teachers"].items()}
    assert "cannot tell whether these rewards rank: likelihood for generation, likelihood for editing" in check_audit(
        recipe, NFT(), facts["identity"]["base"], teachers
    )


def test_the_command_refuses_in_one_sentence(danceopd):
    done = danceopd("audit", "--questions", 1)
    assert done.returncode == 2 and done.stderr.strip().endswith("--questions is 1; give 2 or more")
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize("tiny", TINYS, ids=lambda tiny: tiny.family)
def test_every_family_is_audited_by_agreement_where_nothing_is_known(tiny, tmp_path):
    recipe = family_recipe(tiny, tiny.build(), tmp_path)
    facts = audit(recipe, Options(questions=2, samples=2, draws="teacher", levels=(0.7,)))
    others = {"generation": ["the loss of the base"]}
    others["editing"] = [*others["generation"], "the samples alone"]
    for name, of in facts["teachers"].items():
        assert of["truth"] is None and "mean" not in of
        for signal, one in of["signals"].items():
            assert one["auc"] is None or math.isfinite(one["auc"]["mean"]), (name, signal)
        assert of["signals"]["reward likelihood"]["with"] == others[of["capability"]]
    assert "Nothing here knows what is right" in (audit_folder(recipe.output) / "audit.md").read_text()
