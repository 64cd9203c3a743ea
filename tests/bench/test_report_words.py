"""What the report says and which pictures it takes, without a browser."""

from __future__ import annotations

import base64
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from PIL import Image
from report_folders import judged, scenes, write

from danceopd.bench.metrics.names import METRICS
from danceopd.bench.report.card import add_to_card
from danceopd.bench.report.items import PAGE, highlights, image_order, items_of
from danceopd.bench.report.report import page, report
from danceopd.bench.report.thumbnails import Thumbnails
from danceopd.bench.report.training import monitor_summary, recipe_summary, skills_summary, validation_error
from danceopd.bench.report.verdict import verdict
from danceopd.bench.results import load
from danceopd.run.card import write_card


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scenes(tmp_path_factory.mktemp("scenes"))


def test_pictures_go_to_the_worst_first_then_to_every_category(folder: Path) -> None:
    items = items_of(*load(folder))
    losses = [item["teacher"]["share"] for item in items]
    assert losses == sorted(losses) and losses[0] < 0 < losses[-1]
    order = list(image_order(items))
    assert order[:PAGE] == items[:PAGE]
    assert sorted(map(id, order)) == sorted(map(id, items))
    rest = [(i["capability"], i["category"]) for i in order[PAGE:]]
    assert len(set(rest[: len(set(rest))])) == len(set(rest))  # one of each before the second of any


def test_600_items_of_a_megapixel_stay_below_25_megabytes(tmp_path: Path) -> None:
    """Of size only: every path is read as one of four thumbnails that were made of real megapixel pictures."""
    big = judged(tmp_path, items=640, files=4)
    real = Thumbnails(big)
    photos = [f"photos/{n}.jpg" for n in range(4)]

    class Stand(Thumbnails):
        def fetch(self, paths, side: int) -> int:
            paths = list(paths)
            if side not in self.made:
                real._found.clear()
                real.fetch(photos, side)
                self.made[side] = [real(photo) for photo in photos]
            self._found.update({path: self.made[side][len(path) % 4] for path in paths})
            return sum(len(self._found[path].uri) for path in paths)

    stand = Stand(big)
    stand.made = {}
    html = page(*load(big), stand)
    assert 12_000_000 < len(html.encode()) < 25_000_000
    assert html.count('<article class="item') == 640
    assert {max(t.width, t.height) for found in stand.made.values() for t in found} == {512, 256}


def test_what_ranked_samples_showed_stands_in_the_report(folder: Path, tmp_path: Path) -> None:
    skills = {"draws": {"groups": 20, "summary": ["Half of it <is> decided early."]}, "edits": {"groups": 2}}
    (tmp_path / "skills.json").write_text(json.dumps(skills))
    scores, rows = load(folder)
    assert skills_summary(tmp_path / "none") is None and 'id="skills"' not in page(scores, rows, Thumbnails(folder), 0)
    html = page({**scores, "skills": skills_summary(tmp_path)}, rows, Thumbnails(folder), 0)
    assert "Half of it &lt;is&gt; decided early." in html[html.index('id="skills"') :]


def test_alarms_of_the_monitor_stand_on_the_first_screen(folder: Path) -> None:
    scores, rows = load(folder)
    assert 'id="monitor"' not in page(scores, rows, Thumbnails(folder), 0)
    alarms = [{"step": 30 * n, "sentence": f"editing: <b>alarm</b> {n}"} for n in range(1, 7)]
    watch = {"judge": "the exact scorer", "alarms": alarms, "rolled_back": [{"step": 180}], "checks": 9}
    html = page({**scores, "monitor": watch}, rows, Thumbnails(folder), 0)
    card = html[html.index('id="monitor"') : html.index("scored by the exact scorer")]
    assert "6<small> alarms, 9 checks" in card and "step 120: editing: &lt;b&gt;alarm&lt;/b&gt; 4" in card
    assert "step 150" not in card and "and 2 more" in card and "rolled back" in card
    quiet = page({**scores, "monitor": {**watch, "alarms": [], "rolled_back": []}}, rows, Thumbnails(folder), 0)
    assert "no<small> alarms, 9 checks" in quiet


def test_the_validation_error_of_the_run_stands_on_the_first_screen(folder: Path, tmp_path: Path) -> None:
    scores, rows = load(folder)
    assert 'id="validation"' not in page(scores, rows, Thumbnails(folder), 0)
    gaps = ((0, 1.0, 0.8), (50, 0.4, 0.2), (100, None, 0.3))
    checks = [{"step": s, "gap": g, "teachers": {"draws": {"gap": d, "mean_square": [1.0]}}} for s, g, d in gaps]
    (tmp_path / "gap.json").write_text(json.dumps({"checks": checks, "rows": {"draws": 16}}))
    assert validation_error(tmp_path) is None  # the run goes on
    (tmp_path / "finished.json").write_text('{"step": 100, "exported": 50}')
    found = validation_error(tmp_path)
    html = page({**scores, "validation": found}, rows, Thumbnails(folder), 0)
    card = html[html.index('id="validation"') : html.index("It looks at no image and is not a score")]
    assert "0.40<small> at step 50, 1.00 at step 0" in card
    assert "<b>0.20</b> draws <small>(0.80 at step 0)" in card
    assert 'points="3.0,3.0 97.0,27.0 "' in card and 'cx="97.0" cy="27.0"' in card
    (tmp_path / "finished.json").write_text('{"step": 70}')
    assert validation_error(tmp_path) is None  # stopped between two checks: nobody measured that student
    assert validation_error(None) is None and validation_error(tmp_path / "none") is None


def test_the_scores_of_an_older_bench_are_read(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, old := tmp_path / "old")
    scores = json.loads((old / "scores.json").read_text())
    check = {"step": 0, "gap": 1.0, "teachers": {"draws": 1.0}}
    monitor = {"judge": "j", "alarms": [], "rolled_back": [], "checks": 1}
    for key in ("monitor", "validation"):
        scores.pop(key, None)
    scores["call"] = {"height": 64, "steps": 4}
    scores |= {"watch": monitor, "field_gap": {"checks": [check], "exported": 0}}
    (old / "scores.json").write_text(json.dumps(scores))
    found, _ = load(old)
    assert found["call"] == {"height": 64, "num_inference_steps": 4}
    assert found["monitor"] == monitor and not {"watch", "field_gap"} & found.keys()
    assert found["validation"]["checks"] == [{"step": 0, "error": 1.0, "teachers": {"draws": 1.0}}]


def test_a_runs_files_are_read_by_their_current_names_first(tmp_path: Path) -> None:
    """What is not finite is written by name, and is a missing value here."""
    checks = [{"step": n, "error": gap, "teachers": {"draws": {"error": gap}}} for n, gap in ((0, 1.0), (9, "nan"))]
    (tmp_path / "finished.json").write_text('{"step": 9}')
    (tmp_path / "gap.json").write_text(json.dumps({"checks": checks[1:], "rows": {"draws": 1}}))
    (tmp_path / "validation.json").write_text(json.dumps({"checks": checks, "rows": {"draws": 1}}))
    found = validation_error(tmp_path)
    assert [check["error"] for check in found["checks"]] == [1.0, None]
    assert found["checks"][1]["teachers"] == {"draws": None}
    monitor = {"judge": "j", "alarms": [], "rolled_back": [], "checks": [{}]}
    (tmp_path / "watch.json").write_text(json.dumps(monitor))
    assert monitor_summary(tmp_path)["checks"] == 1
    (tmp_path / "monitor.json").write_text(json.dumps(monitor | {"checks": [{}, {}]}))
    assert monitor_summary(tmp_path)["checks"] == 2 and monitor_summary(None) is None


@pytest.fixture(scope="module")
def edits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return judged(tmp_path_factory.mktemp("edits"), items=24, size=(64, 48), files=2)


def test_the_first_tab_has_the_best_a_typical_and_the_worst_item(folder: Path) -> None:
    scores, rows = load(folder)
    items = items_of(scores, rows)
    for capability, found in highlights(scores, items).items():
        kept = [item for item in items if item["capability"] == capability]
        assert [word for word, _ in found] == ["best", "typical", "worst"]
        assert [item for _, item in found] == [kept[-1], kept[9], kept[0]]
    html = page(scores, rows, Thumbnails(folder))
    first = html[html.index('id="summary"') : html.index('id="images"')]
    assert first.count('class="pick"') == 6 and first.count("<img") == 3 * 5 + 3 * 7
    assert page(scores, rows, Thumbnails(folder), 0).count('<article class="pick"') == 6


def test_no_picture_from_outside_the_bench_is_in_a_report(folder: Path, tmp_path: Path) -> None:
    made = shutil.copytree(folder, tmp_path / "foreign" / "bench")
    Image.new("RGB", (97, 101), (1, 2, 3)).save(tmp_path / "foreign" / "secret.png")
    secret = base64.b64encode((tmp_path / "foreign" / "secret.png").read_bytes()).decode()
    (made / "link.png").symlink_to("../secret.png")
    scores, rows = load(made)
    outside = ("../secret.png", str(tmp_path / "foreign" / "secret.png"), "link.png", "images/../../secret.png", "a\0")
    for n, row in enumerate(rows):
        row["image"] = outside[n % len(outside)]
        row["source"] = row["target"] = row.get("source") and outside[0]
    write(made, scores, rows)
    html = report(made).read_text(encoding="utf-8")
    assert "data:image" not in html and secret not in html and "no image</div>" in html


def test_only_shares_have_a_tick_and_a_cross(folder: Path, edits: Path) -> None:
    html = page(*load(edits), Thumbnails(edits))
    body = html[html.index("<body") :]
    assert "✗" not in body and 'class="shot scored mine" data-name="student" style="--at: ' in body
    exact = page(*load(folder), Thumbnails(folder))
    assert "✗" in exact and 'class="shot wrong' in exact and 'class="shot scored' in exact
    assert re.search(r'<b class="verdict">✓ 9\.\d\d</b>', exact)  # an edit has both
    wrong = [item["wrong"] for item in items_of(*load(edits)) if item["score"] is not None]
    scored = [item["score"] < 5 for item in items_of(*load(edits)) if item["score"] is not None]
    assert wrong == scored and True in wrong and False in wrong


def test_reasons_stand_once_and_behind_the_two_numbers(edits: Path) -> None:
    scores, rows = load(edits)
    for row in rows:
        row["parts"] = {"sc": 7.0, "pq": 6.5}
        row["reason"] = "SC: the judge's words; PQ: more of them"
        row["judge"] = {"SC": {"numbers": [7, 8], "reasoning": "the judge's words"}} if row["status"] == "ok" else {}
    html = page(scores, rows, Thumbnails(edits))
    caption = html[html.index('class="parts"', html.index('id="images"')) :].partition("</figcaption>")[0]
    assert caption.startswith('class="parts">SC 7 · PQ 6.5<') and caption.count("the judge&#39;s words") == 1


def test_the_same_noise_is_claimed_of_what_was_generated_here_only(edits: Path) -> None:
    scores, rows = load(edits)
    assert "Every model generated here, an item from the same noise." in page(scores, rows, Thumbnails(edits), 0)
    for row in rows:
        row["seed"] = row["seed"] if row["model"] in ("blend", "student") else None
    html = page(scores, rows, Thumbnails(edits), 0)
    assert "blend and student generated here, an item from the same noise" in html and "Every model" not in html
    elsewhere = page(scores, [row | {"seed": None} for row in rows], Thumbnails(edits), 0)
    assert "same noise" not in elsewhere


def test_the_name_that_was_given_stands_everywhere(edits: Path) -> None:
    scores, rows = load(edits)
    scores["models"][-1]["label"] = "mine"
    html = page(scores, rows, Thumbnails(edits), 0)
    assert "mine minus the best teacher" in html and "The student" not in html
    assert "<h1>mine</h1>" in html and 'aria-label="Editing' in html


def test_metrics_have_plain_names_and_a_direction(edits: Path) -> None:
    scores, rows = load(edits)
    given = {m: of["psnr"] for m, of in scores["metrics"]["editing"].items()}
    scores["metrics"] = {"editing": {m: {"psnr_outside": of, "new_one": of} for m, of in given.items()}}
    html = page(scores, rows, Thumbnails(edits), 0)
    assert f"editing: {METRICS['psnr_outside'].name} ↑ <small>likeness to the source" in html
    assert "psnr_outside" not in html and "new_one" in html and "all images: near-duplicates, share ↓" in html


def test_a_category_says_how_many_items_it_has(edits: Path) -> None:
    html = page(*load(edits), Thumbnails(edits), 0)
    assert re.search(r"style_change <small>n = 6</small>", html) and "overall <small>n = 21</small>" in html


def test_the_recipe_stands_in_the_report(edits: Path, tmp_path: Path) -> None:
    teachers = [{"name": "draws", "adapter": "/home/me/draws", "capability": "generation", "weight": 2.0, "scale": 0.8}]
    recipe = {"base": "/home/me/klein", "teachers": teachers, "student": {"rank": 32}, "steps": 180}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    scores, rows = load(edits)
    html = page(scores | {"recipe": recipe_summary(tmp_path)}, rows, Thumbnails(edits), 0)
    card = html[html.index('id="recipe"') :].partition("</article>")[0]
    assert "<b>draws</b>: draws, for generation, weight 2, strength 0.8" in card
    assert "on klein; rank 32, 180 steps" in card and "/home" not in card
    (tmp_path / "recipe.yaml").write_text("steps: [")
    assert recipe_summary(tmp_path) is None and recipe_summary(None) is None


def test_the_share_of_exact_edits_stands_beside_their_score(folder: Path, edits: Path, tmp_path: Path) -> None:
    words, (scores, rows) = "share with all facts right", load(folder)
    html = page(scores, rows, Thumbnails(folder), 0)
    cards, rest = html[html.index('class="cards"') :].split("<h2>Losses and gains", 1)
    assert cards.index("score from 0 to 10") < cards.index(f"<small> {words}</small>")
    charts = rest[: rest.index('id="images"')]
    assert charts.count(f"<figcaption>Editing, {words}</figcaption>") == 2  # differences, radar
    assert f"<h3>Editing, {words}</h3>" in charts
    assert words not in page(*load(edits), Thumbnails(edits), 0)  # a judge's scores have no such share
    write_card(tmp_path, {"base": "base", "teachers": [], "steps": 3})
    add_to_card(tmp_path, scores)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    metrics = yaml.safe_load(card.split("---\n")[1])["model-index"][0]["results"][1]["metrics"]
    exact = scores["models"][-1]["editing"]["exact"]["overall"]["mean"]
    assert [m["name"] for m in metrics] == ["score from 0 to 10", words] and metrics[1]["value"] == round(exact, 4)
    assert f"editing, {words}" in card


def test_a_bench_goes_into_the_model_card_once(edits: Path, tmp_path: Path) -> None:
    scores, _ = load(edits)
    add_to_card(tmp_path, scores)
    assert not list(tmp_path.iterdir())  # no card, none made
    write_card(tmp_path, {"base": "base", "teachers": [{"name": "t", "capability": "editing"}], "steps": 3})
    before = (tmp_path / "README.md").read_text(encoding="utf-8")
    for _ in range(2):
        add_to_card(tmp_path, scores)
    add_to_card(tmp_path, scores | {"suite": scores["suite"] | {"name": "other"}})
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(card.split("---\n")[1])
    results = front["model-index"][0]["results"]
    assert [r["dataset"]["name"] for r in results] == ["gedit 1", "other 1"]
    assert results[0]["task"]["type"] == "image-to-image"
    mine = scores["models"][-1]["editing"]["overall"]
    assert results[0]["metrics"][0]["value"] == round(mine["mean"], 4)
    assert card.count("## Scores: gedit 1") == 1 and verdict(scores)["sentence"] in card
    assert card.index("## Scores: other 1") < card.index("## Merged from")
    rest = re.sub(r"^## Scores: .*?(?=^## Merged)", "", card.split("---\n", 2)[2], flags=re.S | re.M)
    assert rest == before.split("---\n", 2)[2]
    (tmp_path / "README.md").write_text("my own words")
    add_to_card(tmp_path, scores)
    assert (tmp_path / "README.md").read_text() == "my own words"
