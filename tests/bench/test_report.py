"""The report is opened as a reader opens it: the real file in a real browser, with the network forbidden."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from pathlib import Path

import pytest
from browser import Page
from PIL import Image, ImageChops
from report_folders import HOSTILE, judged, scenes, write

from danceopd.bench.report import facts
from danceopd.bench.report.items import PAGE, items_of
from danceopd.bench.report.report import report
from danceopd.bench.report.verdict import verdict
from danceopd.bench.results import load
from danceopd.errors import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exact scenes, 36 items, as an older bench wrote them."""
    made = scenes(tmp_path_factory.mktemp("scenes"))
    report(made)
    return made


@pytest.fixture(scope="module")
def edits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Judged edits of larger pictures, with hostile words, failures and too small a budget for all pictures."""
    made = judged(tmp_path_factory.mktemp("judged"), items=44, size=(320, 240), files=3)
    report(made, budget=900_000)
    return made


class Opened(Page):
    """A report in the browser."""

    def tab(self, name: str):
        self.page.locator(f'nav a[href="#{name}"]').click()
        return self.page.locator(f"#{name}")

    def control(self, name: str):
        return self.page.locator(f'#filters [data-control="{name}"]')

    def shown(self) -> list[dict]:
        """The data of the cards that can be seen, in their order."""
        return self.page.eval_on_selector_all(
            "#images .item:not([hidden])", "all => all.map(i => ({...i.dataset, text: i.textContent}))"
        )

    def fitting(self) -> int:
        """How many items fit the filter, as the page says; those shown are at most a page of them."""
        found = int(re.search(r"of (\d+) shown", self.page.locator("#filters .count").inner_text())[1])
        assert len(self.shown()) == min(PAGE, found)
        return found


@pytest.fixture
def opened(browser, folder: Path):
    made = Opened(browser, folder / "report.html")
    yield made
    made.check()
    made.page.close()


@pytest.fixture
def opened_edits(browser, edits: Path):
    made = Opened(browser, edits / "report.html")
    yield made
    assert made.page.evaluate("window.evil") is None
    made.check()
    made.page.close()


def test_it_opens_offline_and_says_at_once_what_was_lost(folder: Path, opened: Opened) -> None:
    text = opened.page.locator(".lead").inner_text()
    assert verdict(load(folder)[0])["sentence"] in text
    assert "student" in opened.page.title()
    html = (folder / "report.html").read_text(encoding="utf-8")
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)[^"']*""", html)
    assert "default-src 'none'" in html
    names = ["summary", "images", "failures", "everything", "made"]
    for name in names:
        opened.tab(name)
        assert [n for n in names if opened.page.locator(f"#{n}").is_visible()] == [name]
    assert "nothing is missing" in opened.tab("failures").inner_text()


def test_a_script_that_is_not_the_reports_own_does_not_run(folder: Path, browser, tmp_path: Path) -> None:
    html = (folder / "report.html").read_text(encoding="utf-8")
    other = tmp_path / "report.html"
    other.write_text(html.replace("<main>", "<script>window.evil = 1</script><main>"), encoding="utf-8")
    page = Opened(browser, other)
    assert page.page.evaluate("window.evil") is None
    assert any("Content Security Policy" in text for text in page.complaints)
    page.page.close()


def test_small_pictures_are_exact_and_every_one_decodes(folder: Path, opened: Opened) -> None:
    opened.tab("images")
    found = opened.page.evaluate(
        """async () => { const all = [...document.querySelectorAll('.items img')];
        await Promise.all(all.map(i => { i.loading = 'eager'; return i.decode(); }));
        return all.map(i => [i.naturalWidth, i.naturalHeight, i.alt.length, getComputedStyle(i).imageRendering]); }"""
    )
    assert len(found) == 18 * 5 + 18 * 7
    assert {(w, h, rendering) for w, h, _, rendering in found} == {(64, 64, "pixelated")}
    assert all(alt > 8 for _, _, alt, _ in found)
    item = next(i for i in items_of(*load(folder)) if i["capability"] == "editing")
    card = opened.page.locator(".item", has=opened.page.get_by_text(item["key"], exact=True))
    uri = card.locator('[data-name="student"] img').get_attribute("src")
    there = Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).convert("RGB")
    here = Image.open(folder / item["cells"]["student"]["image"]).convert("RGB")
    assert ImageChops.difference(there, here).getbbox() is None


def test_the_worst_page_comes_first_and_the_order_can_be_turned(opened: Opened) -> None:
    opened.tab("images")
    first = opened.shown()
    assert len(first) == PAGE
    losses = [float(i["teacher"]) for i in first]
    assert losses == sorted(losses) and losses[0] < losses[-1]
    opened.page.locator("[data-more]").first.click()
    assert len(opened.shown()) == 36
    for key, way in (("teacher", -1), ("base", 1), ("base", -1), ("score", 1), ("number", 1)):
        opened.control("order").select_option(f"{key},{way}")
        values = [way * float(i[key]) for i in opened.shown()]
        assert values == sorted(values) and values[0] < values[-1], (key, way)


def test_filters_find_what_they_say(opened_edits: Opened, edits: Path) -> None:
    opened_edits.tab("images")
    every = items_of(*load(edits))

    def wanted(choose) -> int:
        return sum(bool(choose(item)) for item in every)

    for name, value, choose in (
        ("category", "text_change", lambda i: i["category"] == "text_change"),
        ("subset", "intersection", lambda i: "intersection" in i["subsets"]),
        ("heldout", "1", lambda i: i["heldout"]),
        ("heldout", "0", lambda i: not i["heldout"]),
    ):
        opened_edits.control(name).select_option(value)
        assert len(every) > opened_edits.fitting() == wanted(choose) > 0, (name, value)
        opened_edits.control(name).select_option("")
    for name, choose in (("wrong", lambda i: i["wrong"]), ("unscored", lambda i: i["unscored"])):
        opened_edits.control(name).check()
        assert len(every) > opened_edits.fitting() == wanted(choose) > 0, name
        opened_edits.control(name).uncheck()
    opened_edits.control("search").fill("THINGS 0007")
    assert [i["number"] for i in opened_edits.shown()] == ["7"]
    assert "1 of 1 shown, 44 in all" in opened_edits.page.locator("#filters .count").inner_text()
    opened_edits.control("search").fill("nothing like it")
    assert opened_edits.shown() == [] and opened_edits.page.locator("#images .empty").is_visible()
    opened_edits.control("search").fill("")
    assert opened_edits.fitting() == 44


def test_a_capability_is_shown_alone(opened: Opened) -> None:
    opened.tab("images")
    opened.control("capability").select_option("editing")
    assert {i["capability"] for i in opened.shown()} == {"editing"} and len(opened.shown()) == 18


def clip(page) -> str:
    return page.locator(".slider .right").evaluate("i => getComputedStyle(i).clipPath")


def test_the_slider_moves_by_keyboard_and_by_mouse(opened: Opened) -> None:
    opened.tab("images")
    opened.control("capability").select_option("editing")
    page, box = opened.page, opened.page.locator("#compare")
    page.locator(".item:not([hidden]) .zoom").first.focus()
    page.keyboard.press("Enter")
    assert box.is_visible()
    assert [box.locator(f'[data-side="{side}"]').input_value() for side in ("left", "right")] == ["source", "student"]
    assert clip(page) == "inset(0px 0px 0px 50%)"
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    assert clip(page) == "inset(0px 0px 0px 55%)"
    assert "source on the left" in page.locator(".slider input").get_attribute("aria-label")
    place = page.locator(".slider").bounding_box()
    page.mouse.move(place["x"] + place["width"] * 0.55, place["y"] + 40)
    page.mouse.down()
    page.mouse.move(place["x"] + place["width"] * 0.2, place["y"] + 60, steps=4)
    page.mouse.up()
    assert 15 <= float(re.search(r"([\d.]+)%", clip(page))[1]) <= 25
    box.locator('[data-side="left"]').select_option("editing")
    left, right = (page.locator(f".slider .{side}").get_attribute("src") for side in ("left", "right"))
    shot = page.locator(".item:not([hidden])").first.locator('[data-name="editing"] img')
    assert left == shot.get_attribute("src") != right
    title = box.locator(".what").inner_text()
    page.locator(".slider input").focus()
    page.keyboard.press("n")
    assert box.locator(".what").inner_text() != title
    page.keyboard.press("p")
    assert box.locator(".what").inner_text() == title
    page.keyboard.press("Escape")
    assert not box.is_visible()


def test_generation_compares_the_best_teacher_with_the_student(opened: Opened) -> None:
    opened.tab("images")
    opened.control("capability").select_option("generation")
    opened.page.locator(".item:not([hidden]) .shot.mine .zoom").first.click()
    sides = [opened.page.locator(f'[data-side="{side}"]').input_value() for side in ("left", "right")]
    assert sides == ["generation", "student"]


def test_failures_have_their_tab_with_the_raw_text(opened_edits: Opened, edits: Path) -> None:
    table = opened_edits.tab("failures").locator("table.failures tbody tr")
    lost = [row for row in load(edits)[1] if row["status"] != "ok"]
    assert table.count() == len(lost) == 3 * 4
    opened_edits.page.locator('#failures [data-control="status"]').select_option("refused")
    seen = table.locator("visible=true")
    assert seen.count() == sum(row["status"] == "refused" for row in lost) > 0
    assert "SC: I would rather not." in seen.first.inner_text()
    opened_edits.page.locator('#failures [data-control="model"]').select_option("student")
    assert seen.count() == sum(row["status"] == "refused" and row["model"] == "student" for row in lost)
    bounds = opened_edits.page.locator("#failures tr.mine td").last.inner_text()
    overall = facts.student_of(load(edits)[0])["editing"]["overall"]
    assert f"{overall['lower']:.2f}–{overall['upper']:.2f}" in bounds


def test_hostile_words_stay_words(opened_edits: Opened, edits: Path) -> None:
    """Names, instructions and answers are data; the fixture looks whether any of it ran."""
    from playwright.sync_api import expect

    opened_edits.tab("images")
    opened_edits.control("search").fill("window.evil=1")
    opened_edits.control("order").select_option("number,1")
    title = opened_edits.page.locator(".item:not([hidden]) h3").first
    expect(title).to_have_text(HOSTILE, use_inner_text=True)  # filtering takes the browser a moment
    assert opened_edits.page.locator("img[onerror]").count() == 0
    opened_edits.page.locator(".item:not([hidden]) .zoom").first.click()
    assert HOSTILE in opened_edits.page.locator("#compare").inner_text()
    html = (edits / "report.html").read_text(encoding="utf-8")
    assert "<script>window" not in html and html.count("<script") == 1


def test_the_table_of_everything_sorts(opened: Opened) -> None:
    grid = opened.tab("everything").locator("table.sortable").nth(1)
    grid.locator("th button", has_text="student").click()
    assert grid.locator('th[aria-sort="descending"]').count() == 1
    column = "rows => rows.map(r => Number(r.cells[r.cells.length - 3].dataset.value))"
    values = grid.locator("tbody tr").evaluate_all(column)
    assert values == sorted(values, reverse=True) and len(values) == 18


def test_the_first_tab_shows_pictures_that_can_be_compared(opened: Opened) -> None:
    picks = opened.page.locator("#summary .pick")
    assert picks.count() == 6 and picks.first.is_visible()
    picks.nth(2).locator(".shot.mine .zoom").click()
    box = opened.page.locator("#compare")
    assert box.is_visible() and box.locator(".what").inner_text() in picks.nth(2).locator("h3").inner_text()
    opened.page.keyboard.press("Escape")


CUT_LABELS = """() => [...document.querySelectorAll('svg text')].filter(t => {
    const a = t.getBoundingClientRect(), b = t.ownerSVGElement.getBoundingClientRect();
    return a.width && b.width && (a.left < b.left - 1 || a.right > b.right + 1) }).map(t => t.textContent)"""


@pytest.mark.parametrize("which", ["folder", "edits"])
def test_it_fits_on_a_phone(which: str, browser, request: pytest.FixtureRequest) -> None:
    made = Opened(browser, request.getfixturevalue(which) / "report.html", viewport={"width": 360, "height": 740})
    for name in ("summary", "images", "failures", "everything", "made"):
        made.tab(name)
        assert made.page.evaluate("document.documentElement.scrollWidth") <= 360, name
    made.tab("everything")
    assert "more columns" in made.page.eval_on_selector(".scroll.cut", "b => getComputedStyle(b, '::before').content")
    column = made.page.locator("#everything th.mine").first.bounding_box()
    assert column["x"] >= 0 and column["x"] + column["width"] <= 360  # the student's column stays in sight
    made.tab("summary")
    assert made.page.evaluate(CUT_LABELS) == []
    made.tab("images")
    made.page.locator(".item:not([hidden]) .zoom").first.click()
    place = made.page.locator(".slider").bounding_box()
    assert place["width"] > 250 and place["x"] >= 0 and place["x"] + place["width"] <= 360
    made.check()
    made.page.close()


def test_print_shows_every_section_on_white_and_no_controls(browser, folder: Path) -> None:
    made = Opened(browser, folder / "report.html", color_scheme="dark")
    assert made.page.locator("body").evaluate("b => getComputedStyle(b).backgroundColor") == "rgb(21, 20, 25)"
    made.page.emulate_media(media="print")
    assert made.page.locator("body").evaluate("b => getComputedStyle(b).backgroundColor") == "rgb(255, 255, 255)"
    assert all(made.page.locator(f"#{name}").is_visible() for name in ("summary", "images", "failures", "made"))
    assert not any(made.page.locator(name).is_visible() for name in ("nav.tabs", "#filters", "#everything"))
    made.page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert made.page.locator("#summary table").first.is_visible()
    made.check()
    made.page.close()


def test_large_pictures_become_thumbnails_within_the_budget(edits: Path) -> None:
    html = (edits / "report.html").read_text(encoding="utf-8")
    kinds = set(re.findall(r"data:image/(\w+);", html))
    assert kinds == {"webp"}
    given = int(re.search(r"(\d+) of 44 items have their images in this file", html)[1])
    assert 0 < given < 44 and f"The other {44 - given} are listed without images" in html
    assert html.count('class="shots"') == given and html.count('<article class="item') == 44
    assert sum(map(len, re.findall(r'src="(data:image[^"]*)"', html))) <= 900_000


def test_a_lost_picture_is_said_and_a_lost_bench_refused(folder: Path, tmp_path: Path) -> None:
    lost = shutil.copytree(folder, tmp_path / "lost")
    shutil.rmtree(lost / "images" / "base")
    (lost / "images/source").joinpath("broken.png").write_bytes(b"no picture")
    scores, rows = load(lost)
    rows[-1]["image"] = "images/source/broken.png"
    write(lost, scores, rows)
    html = report(lost).read_text(encoding="utf-8")
    assert html[html.index('id="images"') :].count("no image</div>") == 36 + 1
    with pytest.raises(UserError, match="no finished bench"):
        report(tmp_path / "nowhere")
    (lost / "scores.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        report(lost)


def test_a_bench_without_base_teachers_and_judge_still_reports(folder: Path, tmp_path: Path) -> None:
    """Pictures of two models made elsewhere, in a result that has only what must be there."""
    alone = shutil.copytree(folder, tmp_path / "alone")
    scores, rows = load(alone)
    scores = {k: v for k, v in scores.items() if k in ("format", "suite", "created", "student", "models", "comparison")}
    scores["models"] = [m | {"role": "other" if m["name"] == "blend" else m["role"]} for m in scores["models"][-2:]]
    nobody = {"best_teacher": None, "against_best": {}, "exact": None}
    scores["comparison"] = {c: found | nobody for c, found in scores["comparison"].items()}
    write(alone, scores, [row for row in rows if row["model"] in ("blend", "student")])
    html = report(alone).read_text(encoding="utf-8")
    assert "no base and no teacher" in html and "against blend" in html and "<h2>Interference</h2>" not in html
    assert json.loads((alone / "scores.json").read_text()) == scores
