"""What tests of the bench share: models with a student, one bench of them, and an empty cache folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bench_cases import CALL, Suite
from browser import BROWSER, FLAGS
from tiny import random_adapter, tiny_klein

from danceopd.adapters.write import write_adapter
from danceopd.bench import run
from danceopd.bench.run import BenchResult, bench
from danceopd.recipe.recipe import Recipe


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two teachers, and a student's run folder."""
    root = tmp_path_factory.mktemp("models")
    pipe = tiny_klein(root / "base")
    (root / "base" / "danceopd.json").write_text(json.dumps(CALL))
    for seed, name in enumerate(("draws", "edits", "student")):
        write_adapter(random_adapter(pipe.transformer, seed=seed), root / name)
    recipe = Recipe(base=str(root / "base"), generation=str(root / "draws"), editing=str(root / "edits"))
    (root / "student" / "recipe.yaml").write_text(recipe.to_yaml())
    return root


@pytest.fixture(scope="session")
def result(models: Path, tmp_path_factory: pytest.TempPathFactory) -> BenchResult:
    """One bench of everything, with probes; no test may write into its folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "load_suite", lambda name, **options: Suite())
        return bench(models / "student", "dots", output=tmp_path_factory.mktemp("bench") / "out", probes=True, batch=3)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache is in the test's own folder."""
    monkeypatch.setenv("DANCEOPD_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def browser():
    if BROWSER is None:
        pytest.skip("no chromium on this machine (Debian: apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        started = play.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield started
        started.close()
