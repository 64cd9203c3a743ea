"""The report is opened as a reader opens it: the real file in a real browser, with the network forbidden."""

from __future__ import annotations

import json
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from danceopd.bench import compare
from danceopd.bench.report import _chosen, _items, load, report
from danceopd.errors import UserError
from danceopd.scenes.edits import TASKS, edits
from danceopd.scenes.prompts import TAGS, prompts
from danceopd.scenes.render import render

SKILL = {  # chance of a right generation, of a right edit
    "base": (0.6, 0.02),
    "generation": (0.95, 0.02),
    "editing": (0.45, 0.9),
    "blend": (0.75, 0.45),
    "student": (0.9, 0.85),
}
ROLES = {"base": "base", "generation": "teacher", "editing": "teacher", "blend": "blend", "student": "student"}


def synthetic(folder: Path, each: int = 3, noise: float = 6.0, seed: int = 0, models: dict | None = None) -> Path:
    """A finished bench of invented models: right pictures with chance `SKILL`, other scenes otherwise."""
    rng, generator = random.Random(seed), np.random.default_rng(seed)
    drawn, edited = prompts("test", each * len(TAGS), 0), edits("test", each * len(TASKS), 0)
    wrong = [p.scene for p in prompts("val", 50, 1)]
    rows = []

    def save(path: str, scene) -> str:
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        pixels = render(scene) + generator.normal(0, noise if "/source/" not in path else 0, (64, 64, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file)
        return path

    for model, skill in (models or SKILL).items():
        for n, prompt in enumerate(drawn):
            right, key = rng.random() < skill[0], f"{prompt.tag}-{n:03d}"
            rows.append(
                {
                    "model": model,
                    "capability": "generation",
                    "category": prompt.tag,
                    "key": key,
                    "prompt": prompt.prompt,
                    "seed": n,
                    "probe": None,
                    "score": float(right),
                    "correct": right,
                    "reason": "" if right else "1 star expected, no star found",
                    "image": save(
                        f"images/{model}/{prompt.tag}/{key}.png", prompt.scene if right else rng.choice(wrong)
                    ),
                }
            )
        for n, edit in enumerate(edited):
            right, key = rng.random() < skill[1], f"{edit.task_type}-{n:03d}"
            score = 10 - rng.random() * 2 if right else rng.random() * 4
            scene = (
                edit.target if right else rng.choice([edit.source, replace(edit.target, things=edit.target.things[:1])])
            )
            rows.append(
                {
                    "model": model,
                    "capability": "editing",
                    "category": edit.task_type,
                    "key": key,
                    "prompt": edit.instruction,
                    "seed": n,
                    "probe": None,
                    "score": score,
                    "correct": right,
                    "reason": "" if right else "the picture did not change",
                    "image": save(f"images/{model}/{edit.task_type}/{key}.png", scene),
                    "source": save(f"images/source/{edit.task_type}/{key}_SRCIMG.png", edit.source),
                    "target": save(f"images/target/{edit.task_type}/{key}.png", edit.target),
                }
            )
    write(folder, rows, list(models or SKILL))
    return folder


def write(folder: Path, rows: list[dict], models: list[str]) -> None:
    means = {m: {c: compare.summary(rows, m, c) for c in ("generation", "editing")} for m in models}
    teachers, others = [m for m in models if ROLES[m] == "teacher"], [m for m in models if m != "student"]
    scores = {
        "format": "danceopd-bench/1",
        "suite": {"name": "scenes", "version": "1", "protocol": "ab" * 32},
        "created": "2026-06-22T10:00:00+00:00",
        "command": "danceopd bench student",
        "seed": 0,
        "limit": None,
        "call": {"height": 64, "width": 64, "steps": 10},
        "base": {"path": "base", "sha256": "cd" * 32},
        "student": "student",
        "models": [
            {"name": m, "label": m, "role": ROLES[m], "path": m, "sha256": f"{n}e" * 32} | means[m]
            for n, m in enumerate(models)
        ],
        "comparison": {
            c: compare.comparison(rows, "student", "base", teachers, others, c) for c in ("generation", "editing")
        },
        "blend_grid": [],
        "probes": {},
        "versions": {"torch": "2.13.0"},
        "machine": "Linux x86_64, 2 CPU threads",
        "seconds": {"total": 42.0, "models": {}},
        "ceiling": {
            "generation": {"overall": 0.98, "categories": dict.fromkeys(TAGS, 0.98)},
            "editing": {"overall": 9.6, "categories": dict.fromkeys(TASKS, 9.6)},
        },
    }
    (folder / "scores.json").write_text(json.dumps(scores))
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = synthetic(tmp_path_factory.mktemp("report"))
    report(made)
    return made


BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture(scope="module")
def opened(folder: Path):
    """The report in a browser: the page, every request it made, and every complaint in its console."""
    if BROWSER is None:
        pytest.skip("no chromium on this machine (Debian: apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=BROWSER, args=FLAGS)
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        page.set_default_timeout(120_000)
        requests: list[str] = []
        complaints: list[str] = []
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto((folder / "report.html").as_uri())
        yield page, requests, complaints
        browser.close()


def visible(page, capability: str) -> list[dict]:
    return page.eval_on_selector_all(
        f"#gallery-{capability} .item:not([hidden])", "items => items.map(i => ({...i.dataset}))"
    )


def control(page, capability: str, name: str):
    return page.locator(f'#gallery-{capability} [data-control="{name}"]')


def test_it_opens_offline_without_a_request_or_a_complaint(folder: Path, opened) -> None:
    page, requests, complaints = opened
    assert [url for url in requests if not url.startswith("data:")] == [(folder / "report.html").as_uri()]
    assert complaints == []
    assert "student" in page.title()
    html = (folder / "report.html").read_text(encoding="utf-8")
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)[^"']*""", html)
    assert "default-src 'none'" in html


def test_every_picture_decodes_and_says_what_it_shows(opened) -> None:
    page, _, _ = opened
    sizes = page.evaluate(
        """async () => { const all = [...document.querySelectorAll('.items img')];
        await Promise.all(all.map(i => { i.loading = 'eager'; return i.decode(); }));
        return all.map(i => [i.naturalWidth, i.naturalHeight, i.alt.length]); }"""
    )
    assert len(sizes) == 18 * 5 + 18 * 7
    assert all(size[:2] == [64, 64] and size[2] > 8 for size in sizes)


def test_filters_and_order_do_what_they_say(folder: Path, opened) -> None:
    page, _, _ = opened
    everything = visible(page, "generation")
    assert len(everything) == 18
    assert [i["failed"] for i in everything] == sorted((i["failed"] for i in everything), reverse=True)

    control(page, "generation", "category").select_option("counting")
    assert {i["category"] for i in visible(page, "generation")} == {"counting"}
    assert len(visible(page, "editing")) == 18  # the other gallery has its own filter
    control(page, "generation", "category").select_option("")

    worse = {r["key"] for r in _items(*load(folder), "editing") if r["worse"]}
    control(page, "editing", "worse").check()
    assert len(visible(page, "editing")) == len(worse) > 0
    assert {i["worse"] for i in visible(page, "editing")} == {"1"}
    assert f"{len(worse)} of 18" in page.locator("#gallery-editing .count").inner_text()
    control(page, "editing", "order").select_option("loss")
    gains = [float(i["gain"]) for i in visible(page, "editing")]
    assert gains == sorted(gains) and gains[0] < gains[-1]
    control(page, "editing", "worse").uncheck()
    assert len(visible(page, "editing")) == 18


def test_a_row_is_enlarged_from_the_keyboard(opened) -> None:
    page, _, complaints = opened
    page.locator("#gallery-editing .zoom").first.focus()
    page.keyboard.press("Enter")
    assert page.locator("#lightbox").get_attribute("open") is not None
    assert page.locator("#lightbox .shot").count() == 7
    page.keyboard.press("Escape")
    assert page.locator("#lightbox").get_attribute("open") is None
    assert complaints == []


def test_the_table_of_everything_sorts(opened) -> None:
    page, _, _ = opened
    grid = page.locator("table.sortable").nth(1)
    grid.locator("th button", has_text="student").click()
    assert grid.locator('th[aria-sort="descending"]').count() == 1
    column = "rows => rows.map(r => Number(r.cells[r.cells.length - 2].dataset.value))"
    values = grid.locator("tbody tr").evaluate_all(column)
    assert values == sorted(values, reverse=True) and len(values) == 18


def test_it_fits_on_a_phone(opened) -> None:
    page, _, _ = opened
    page.set_viewport_size({"width": 390, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.set_viewport_size({"width": 1200, "height": 900})


def test_failures_come_first_and_the_file_keeps_its_budget(folder: Path, tmp_path: Path) -> None:
    items = _items(*load(folder), "generation")
    failed = [i for i in items if i["failed"]]
    assert 0 < len(failed) < len(items)
    assert {i["key"] for i in _chosen(items, 12)[: len(failed)]} == {i["key"] for i in failed}
    small = shutil.copytree(folder, tmp_path / "small")
    size = report(small, budget=700_000).stat().st_size
    assert size < 700_000 + 250_000 < (folder / "report.html").stat().st_size
    text = (small / "report.html").read_text(encoding="utf-8")
    assert re.search(r"\d+ of 18 items have their pictures in this file", text)
    assert text.count("<tr><td><code>") == 36  # the table still has every item


def test_words_of_the_user_are_escaped(folder: Path, tmp_path: Path) -> None:
    evil = shutil.copytree(folder, tmp_path / "evil")
    scores, rows = load(evil)
    for row in rows:
        row["prompt"] = row["reason"] = '<script>alert(1)</script>" onload="x'
    (evil / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = report(evil, per_category=1).read_text(encoding="utf-8")
    assert "<script>alert" not in text and '" onload="x' not in text


def test_a_lost_picture_is_said_and_a_lost_bench_refused(folder: Path, tmp_path: Path) -> None:
    lost = shutil.copytree(folder, tmp_path / "lost")
    shutil.rmtree(lost / "images" / "base")
    assert "no picture" in report(lost, per_category=1).read_text(encoding="utf-8")
    with pytest.raises(UserError, match="no finished bench"):
        report(tmp_path / "nowhere")
    (lost / "scores.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        report(lost)
