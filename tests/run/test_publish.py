"""`danceopd push`: what is sent, in which words, and everything that is refused before a byte leaves."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import errors
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_merge import WEIGHTS, run, tiny_recipe

from danceopd.errors import UserError
from danceopd.run.publish.push import push

REPO, BASE = "you/both", "acme/tiny-klein"


@pytest.fixture(scope="module")
def finished(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("publish") / "student"
    run(tiny_recipe(models, folder, steps=1, samples={"every": 1, "count": 1}))
    (folder / "bench").mkdir()
    (folder / "bench" / "report.html").write_text("<html>")
    return folder


@pytest.fixture
def student(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "student"))


class Hub:
    """Stands in for `HfApi`: keeps what was sent, and fails as told."""

    def __init__(self, holds=(), fails=None) -> None:
        self.holds, self.fails, self.sent, self.made = list(holds), fails, {}, []

    def __call__(self) -> Hub:
        return self

    def whoami(self) -> dict:
        if self.fails is not None:
            raise self.fails
        return {"name": "you"}

    def create_repo(self, repo, private, exist_ok) -> None:
        self.made.append((repo, private))

    def get_paths_info(self, repo, paths, revision=None) -> list:
        return [SimpleNamespace(path=path, lfs=SimpleNamespace(sha256=sha)) for path, sha in self.holds]

    def create_commit(self, repo, operations, commit_message, revision) -> SimpleNamespace:
        self.sent = {one.path_in_repo: Path(one.path_or_fileobj).read_bytes() for one in operations}
        return SimpleNamespace(commit_url=f"hub/{repo}/commit/1")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub()
    monkeypatch.setattr(huggingface_hub, "HfApi", made)
    return made


def test_what_is_sent(student: Path, hub: Hub) -> None:
    assert push(student, REPO, private=True, base_model=BASE, comfyui=True) == "hub/you/both/commit/1"
    assert hub.made == [(REPO, True)]
    grid = max(path.name for path in (student / "samples").glob("*.png"))
    assert set(hub.sent) == {
        "README.md", "recipe.yaml", WEIGHTS, f"samples/{grid}", "bench/report.html", "comfyui/both.safetensors",
        *(["validation.png"] if (student / "validation.png").is_file() else []),
    }  # fmt: skip
    card = hub.sent["README.md"].decode()
    fields = yaml.safe_load(card.split("---\n")[1])
    assert fields["base_model"] == BASE and "# both\n" in card
    assert f'from_pretrained("{BASE}")' in card and f'load_lora_weights("{REPO}")' in card and "path/to" not in card
    for text in (card, hub.sent["recipe.yaml"].decode()):
        assert str(student.parent) not in text and str(student) not in text
    (sent := student.parent / "sent.safetensors").write_bytes(hub.sent[WEIGHTS])
    mine, theirs = load_file(student / WEIGHTS), load_file(sent)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)
    with safe_open(sent, "pt") as opened:
        record = json.loads(opened.metadata()["danceopd"])
    assert record["base"] == BASE and str(student.parent) not in str(record)
    assert record["teachers"] == "generation (generation); editing (editing)"
    assert record["sha256"] in card
    assert str(student.parent).encode() not in hub.sent["comfyui/both.safetensors"]
    assert (student / "README.md").read_text() != card  # the run's own is left as it is


def test_nothing_is_sent_or_asked_where_it_is_declined_or_dry(student: Path, hub: Hub) -> None:
    hub.fails = AssertionError("asked")
    seen = []

    def confirm(found):
        seen.append(found)
        return True

    assert push(student, REPO, base_model=BASE, dry_run=True, confirm=confirm) is None
    assert push(student, REPO, base_model=BASE, confirm=lambda found: False) is None
    assert seen[0].base == BASE and WEIGHTS in seen[0].files
    assert any("license" in note for note in seen[0].notes)


def test_the_same_model_again_and_another_one(student: Path, hub: Hub) -> None:
    assert push(student, REPO, base_model=BASE)
    hub.holds = [(WEIGHTS, hashlib.sha256(hub.sent[WEIGHTS]).hexdigest())]
    assert push(student, REPO, base_model=BASE)
    for holds in ([(WEIGHTS, "0" * 64)], [("model_index.json", None)]):
        hub.holds, hub.sent = holds, {}
        with pytest.raises(UserError, match=f"{REPO} already holds another model .* or --replace it"):
            push(student, REPO, base_model=BASE)
        assert not hub.sent
    assert push(student, REPO, base_model=BASE, replace=True) and hub.sent


def faulty(student: Path, what: str) -> str:
    """Breaks the run; the sentence that says so."""
    card = student / "README.md"
    match what:
        case "no folder":
            shutil.rmtree(student)
            return "there is no folder .*student; give the run folder"
        case "no weights":
            (student / WEIGHTS).unlink()
            return f"has no {WEIGHTS}; give the run folder of a finished merge"
        case "not finished":
            (student / "finished.json").unlink()
            return "is no finished run"
        case "no card":
            card.unlink()
            return "README.md is missing; run the merge again"
        case "another card":
            card.write_text("# mine\n")
            return "is not the card of a danceopd run"
        case "a path":
            card.write_text(card.read_text() + "\nTrained on /home/me/photos, mostly.\n")
            return "names /home/me/photos, a path of this machine"
        case "a windows path":
            card.write_text(card.read_text() + "\nTrained on C:\\Users\\me, mostly.\n")
            return r"names C:\\Users\\me, a path"
        case "no picture":
            shutil.rmtree(student / "samples")
            return "the card shows samples/.*, which is not in"
        case _:
            return "the card names the base as 'base', which nobody else can load; give its name on the hub"


@pytest.mark.parametrize("what", [
    "no folder", "no weights", "not finished", "no card", "another card", "a path", "a windows path", "no picture",
    "base",
])  # fmt: skip
def test_what_is_refused_before_the_network(student: Path, hub: Hub, what: str) -> None:
    hub.fails = AssertionError("asked")
    sentence = faulty(student, what)
    with pytest.raises(UserError, match=sentence):
        push(student, REPO, base_model=None if what == "base" else BASE)


@pytest.mark.parametrize("repo", ["both", "you/../both", "a/b/c", "you/bo th", ""])
def test_names_that_are_none(student: Path, hub: Hub, repo: str) -> None:
    with pytest.raises(UserError, match="is no repository's name .*; write owner/name"):
        push(student, repo, base_model=BASE)


def refused(status: int) -> errors.HfHubHTTPError:
    response = SimpleNamespace(status_code=status, headers={}, request=None)
    return errors.HfHubHTTPError("Forbidden for url: …", response=response)


@pytest.mark.parametrize(("fault", "sentence"), [
    (errors.LocalTokenNotFoundError("no token"), "there is no token that the hub takes; run `hf auth login`"),
    (refused(401), "there is no token that the hub takes"),
    (refused(403), "your token may not write to you/both"),
    (refused(500), r"could not be pushed \(.*\); run the same command again"),
    (ConnectionError("no route"), r"could not be pushed \(no route\)"),
])  # fmt: skip
def test_what_the_hub_refuses_is_one_sentence(student: Path, hub: Hub, fault: Exception, sentence: str) -> None:
    hub.fails = fault
    with pytest.raises(UserError, match=sentence):
        push(student, REPO, base_model=BASE)
