"""What the report says and which pictures it takes, without a browser."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from report_folders import judged, scenes

from danceopd.bench.report import facts
from danceopd.bench.report.items import PAGE, image_order, items_of
from danceopd.bench.report.report import page
from danceopd.bench.report.thumbnails import Thumbnails
from danceopd.bench.report.training import monitor_summary, validation_error
from danceopd.bench.results import load


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


def test_words_of_a_summary_follow_the_intervals(folder: Path) -> None:
    scores, _ = load(folder)
    for found in scores["comparison"].values():
        for delta in found["deltas"].values():
            for figure in delta["categories"].values():
                figure |= {"mean": -0.005, "low": -0.02, "high": 0.01}
        for figure in found["against_best"].values():
            figure |= {"mean": -0.005, "low": -0.02, "high": 0.01}
    assert facts.verdict(scores)["kind"] == "kept"
    scores["comparison"]["editing"]["deltas"]["base"]["categories"]["style_change"] |= {
        "mean": -2,
        "low": -3,
        "high": -1,
    }
    told = facts.verdict(scores)
    assert told["kind"] == "lost"
    assert told["sentence"] == (
        "The student is significantly worse in 1 of 12 categories (95 % intervals): "
        "style_change (editing) −2.00 [−3.00 to −1.00] against the base."
    )
    slight = {"mean": -0.05, "low": -0.06, "high": -0.04}
    scores["comparison"]["editing"]["deltas"]["base"]["categories"]["style_change"] |= slight
    told = facts.verdict(scores)
    assert told["kind"] == "kept"
    assert "by less than the margin of 1 % of the scale: style_change (editing)" in told["sentence"]
    assert facts.verdict(scores | {"comparison": {}})["kind"] == "unknown"


def test_alarms_of_the_watch_stand_on_the_first_screen(folder: Path) -> None:
    scores, rows = load(folder)
    assert 'id="monitor"' not in page(scores, rows, Thumbnails(folder), 0)
    alarms = [{"step": 30 * n, "sentence": f"editing: <b>alarm</b> {n}"} for n in range(1, 7)]
    watch = {"judge": "the exact scorer", "alarms": alarms, "rolled_back": [{"step": 180}], "checks": 9}
    html = page({**scores, "watch": watch}, rows, Thumbnails(folder), 0)
    card = html[html.index('id="monitor"') : html.index("judged by the exact scorer")]
    assert "6<small> alarms, 9 checks" in card and "step 120: editing: &lt;b&gt;alarm&lt;/b&gt; 4" in card
    assert "step 150" not in card and "and 2 more" in card and "rolled back" in card
    quiet = page({**scores, "watch": {**watch, "alarms": [], "rolled_back": []}}, rows, Thumbnails(folder), 0)
    assert "no<small> alarms, 9 checks" in quiet


def test_the_field_gap_of_the_run_stands_on_the_first_screen(folder: Path, tmp_path: Path) -> None:
    scores, rows = load(folder)
    assert 'id="validation"' not in page(scores, rows, Thumbnails(folder), 0)
    gaps = ((0, 1.0, 0.8), (50, 0.4, 0.2), (100, None, 0.3))
    checks = [{"step": s, "gap": g, "teachers": {"draws": {"gap": d, "mean_square": [1.0]}}} for s, g, d in gaps]
    (tmp_path / "gap.json").write_text(json.dumps({"checks": checks, "rows": {"draws": 16}}))
    assert validation_error(tmp_path) is None  # the run goes on
    (tmp_path / "finished.json").write_text('{"step": 100, "exported": 50}')
    found = validation_error(tmp_path)
    html = page({**scores, "field_gap": found}, rows, Thumbnails(folder), 0)
    card = html[html.index('id="validation"') : html.index("It looks at no image and is not a score")]
    assert "0.40<small> at step 50, 1.00 at step 0" in card
    assert "<b>0.20</b> draws <small>(0.80 at step 0)" in card
    assert 'points="3.0,3.0 97.0,27.0 "' in card and 'cx="97.0" cy="27.0"' in card
    (tmp_path / "finished.json").write_text('{"step": 70}')
    assert validation_error(tmp_path) is None  # stopped between two checks: nobody measured that student
    assert validation_error(None) is None and validation_error(tmp_path / "none") is None


def test_a_runs_files_are_read_by_their_current_names_first(tmp_path: Path) -> None:
    """What is not finite is written by name, and is a missing value here."""
    checks = [{"step": n, "gap": gap, "teachers": {"draws": {"gap": gap}}} for n, gap in ((0, 1.0), (9, "nan"))]
    (tmp_path / "finished.json").write_text('{"step": 9}')
    (tmp_path / "gap.json").write_text(json.dumps({"checks": checks[1:], "rows": {"draws": 1}}))
    (tmp_path / "validation.json").write_text(json.dumps({"checks": checks, "rows": {"draws": 1}}))
    found = validation_error(tmp_path)
    assert [check["gap"] for check in found["checks"]] == [1.0, None]
    assert found["checks"][1]["teachers"] == {"draws": None}
    monitor = {"judge": "j", "alarms": [], "rolled_back": [], "checks": [{}]}
    (tmp_path / "watch.json").write_text(json.dumps(monitor))
    assert monitor_summary(tmp_path)["checks"] == 1
    (tmp_path / "monitor.json").write_text(json.dumps(monitor | {"checks": [{}, {}]}))
    assert monitor_summary(tmp_path)["checks"] == 2 and monitor_summary(None) is None
