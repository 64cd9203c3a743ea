"""Pages to publish: two models side by side, and the vote of people, opened as a reader opens them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from browser import Page
from PIL import Image
from report_folders import HOSTILE, judged, scenes, write

from danceopd.bench.evidence.people import people, read_votes, sentences
from danceopd.bench.pages.blind import KEY, PAGE, read_key
from danceopd.bench.pages.contact import SIDE, STRIP, contact_sheet, write_contact_sheet
from danceopd.bench.pages.sides import recipe_differences
from danceopd.bench.report.items import highlights, items_of
from danceopd.bench.results import load
from danceopd.cli.compare import markdown, run
from danceopd.errors import UserError

WIDTHS = (390, 1280)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = scenes(tmp_path_factory.mktemp("scenes"))
    scores, rows = load(made)
    write(made, scores | {"recipe_yaml": "base: klein\nsteps: 180\nteachers:\n- {name: draws, weight: 2.0}\n"}, rows)
    return made


@pytest.fixture(scope="module")
def edits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return judged(tmp_path_factory.mktemp("judged"), items=24, size=(160, 120), files=3)


@pytest.fixture(scope="module")
def compared(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison with a page of ten pairs to vote on."""
    output = tmp_path_factory.mktemp("compared") / "out"
    run(folder, folder, output, ["student", "blend"], blind=10)
    return output


@pytest.mark.parametrize("width", WIDTHS)
def test_two_models_stand_side_by_side_with_pictures(compared: Path, browser, width: int) -> None:
    found = json.loads((compared / "compare.json").read_text())
    made = Page(browser, compared / "compare.html", viewport={"width": width, "height": 900})
    page = made.page
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert found["verdict"]["sentence"] in page.locator(".lead").inner_text()
    first = page.locator("main .pair").first
    assert first.locator("img").count() == 2 and first.is_visible()
    top = page.locator("main h2").first.bounding_box(), page.locator("table").first.bounding_box()
    assert top[0]["y"] < top[1]["y"]  # pictures first
    worst = next(item for item in found["items"] if item["capability"] == "editing")
    card = page.locator(".pair", has=page.get_by_text(worst["prompt"], exact=True)).first
    assert card.locator("figure.source img, figure.a img, figure.b img").count() == 3
    assert "A lost most against B" in page.locator("main").inner_text()
    sizes = page.eval_on_selector_all("main img", "all => all.map(i => i.naturalWidth)")
    assert len(sizes) > 20 and set(sizes) == {64}
    made.check()
    made.page.close()


def test_a_comparison_of_two_merges_names_what_their_recipes_differ_in(folder: Path, tmp_path: Path) -> None:
    other = shutil.copytree(folder, tmp_path / "other")
    scores, rows = load(other)
    recipe = scores["recipe_yaml"].replace("180", "360").replace("2.0", "1.0")
    scores["models"][-1]["label"] = HOSTILE
    write(other, scores | {"recipe_yaml": recipe, "created": "later"}, rows)
    run(folder, other, tmp_path / "out")
    html = (tmp_path / "out" / "compare.html").read_text(encoding="utf-8")
    assert "<code>steps</code></th><td class=\"text\">180</td><td class=\"text\">360</td>" in html
    assert "<code>teachers.draws.weight</code>" in html
    assert "<script" not in html and "&lt;script&gt;window.evil" in html
    assert recipe_differences("a: 1", None) == [] == recipe_differences("a: [", "a: 1")
    assert recipe_differences("a: {b: [1, 2]}", "c: x") == [("a.b", "[1, 2]", "–"), ("c", "–", "x")]


@pytest.mark.parametrize("width", WIDTHS)
def test_people_vote_without_names_and_save_their_votes(
    compared: Path, folder: Path, browser, width: int, tmp_path: Path
) -> None:
    html, key = (compared / PAGE).read_text(encoding="utf-8"), read_key(compared)
    assert key is not None and len(key["pairs"]) == 10
    body = html[html.index("<body") :]
    assert [word for word in ("student", "blend", "swapped", "images/") if word in body] == []
    made = Page(browser, compared / PAGE, viewport={"width": width, "height": 800})
    page = made.page
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator(".pair:visible").count() == 1 and page.locator(".save").is_hidden()
    for number, pair in enumerate(key["pairs"]):
        assert f"Pair {number + 1} of 10" in page.locator(".progress").inner_text()
        wanted = "right" if pair["swapped"] else "left"  # always the first model
        if number == 3:
            page.locator('[data-vote="tie"]').click()
            page.locator(".back").click()
            assert page.locator('[data-vote="tie"]').get_attribute("aria-pressed") == "true"
        if number % 2:
            page.keyboard.press({"left": "ArrowLeft", "right": "ArrowRight"}[wanted])
        else:
            page.locator(f'[data-vote="{wanted}"]').click()
    page.locator("#voter").fill("Anna B.")
    with page.expect_download() as saved:
        page.locator(".save").click()
    file = tmp_path / saved.value.suggested_filename
    saved.value.save_as(file)
    assert file.name == "votes-Anna-B-.json" and "10 votes saved" in page.locator(".saved").inner_text()
    assert made.complaints == []
    page.close()
    found = run(folder, folder, shutil.copytree(compared, tmp_path / "out"), ["student", "blend"], ballots=[file])
    figures = found["people"]["capabilities"]
    assert found["people"]["voters"] == {"Anna B.": 10}
    assert sum(of["wins"] for of in figures.values()) == 10 and all(of["mean"] == 1 for of in figures.values())
    assert "Votes of people, editing" in markdown(found)
    assert "Votes of people" in (tmp_path / "out" / "compare.html").read_text(encoding="utf-8")


def test_a_page_that_people_vote_on_stays_as_it_is(compared: Path, folder: Path) -> None:
    before = (compared / PAGE).read_bytes(), (compared / KEY).read_bytes()
    run(folder, folder, compared, ["student", "blend"], blind=10)
    assert ((compared / PAGE).read_bytes(), (compared / KEY).read_bytes()) == before


def test_a_wrong_file_of_votes_is_one_sentence(compared: Path, folder: Path, tmp_path: Path) -> None:
    page = read_key(compared)["page"]  # type: ignore[index]
    good = {"format": "danceopd-votes/1", "page": page, "voter": "a", "votes": [{"pair": 0, "vote": "left"}]}
    cases = [
        ("{", "is no file of votes"),
        (json.dumps([]), "is no file of votes"),
        (json.dumps(good | {"format": "x"}), "is no file of votes"),
        (json.dumps(good | {"page": "other"}), "another page"),
        (json.dumps(good | {"votes": [{"pair": 99, "vote": "left"}]}), "votes on pair 99, and the page has 10"),
        (json.dumps(good | {"votes": [{"pair": 0, "vote": "both"}]}), "is no file of votes"),
    ]
    file = tmp_path / "votes.json"
    for text, words in cases:
        file.write_text(text)
        with pytest.raises(UserError, match=words):
            run(folder, folder, compared, ["student", "blend"], ballots=[file])
    file.write_text(json.dumps(good))
    wrong = [
        (["student", "editing"], compared, [file], None, "holds another comparison"),
        (["student", "blend"], tmp_path / "new", [file], None, "has no blind.json"),
        (["student", "blend"], compared, [tmp_path / "none.json"], None, "there is no file of votes"),
        (["student", "blend"], compared, [], 0, "--blind is 0"),
    ]
    for models, output, ballots, blind, words in wrong:
        with pytest.raises(UserError, match=words):
            run(folder, folder, output, models, ballots=ballots, blind=blind)
    assert not (tmp_path / "new").exists()


def test_agreement_of_people_and_of_the_judge_with_them() -> None:
    keys = [("editing", "cut", str(n)) for n in range(10)]
    anna, ben = dict.fromkeys(keys, 1), dict(zip(keys, [1] * 8 + [0, -1]))
    names, apart = ("capability", "category", "key"), [3] * 5 + [-1] * 5
    items = [dict(zip(names, key)) | {"difference": difference} for key, difference in zip(keys, apart)]
    found = people({"anna": anna, "ben": ben}, items, [])
    assert found["capabilities"]["editing"]["mean"] == pytest.approx((8 + 0.5 + 0) / 10)
    assert found["agreement"]["voters"] | {"low": 0, "high": 0, "kappa": 0} == {
        "n": 10, "agree": 0.8, "low": 0, "high": 0, "kappa": 0
    }  # fmt: skip
    assert found["agreement"]["scores"]["n"] == 9 and found["agreement"]["scores"]["agree"] == pytest.approx(5 / 9)
    assert found["agreement"]["votes"] is None
    words = "\n".join(sentences(found))
    assert "anna (10 pairs), ben (10 pairs)" in words and "the bench's scores with people: 56% of 9 pairs" in words
    alone = people({"anna": anna}, [], [])
    assert "not known" in sentences(alone)[-1]


def test_of_a_voter_the_last_vote_counts(tmp_path: Path) -> None:
    pairs = [{"capability": "editing", "category": "c", "key": str(n), "swapped": bool(n)} for n in range(2)]
    blind = {"page": "p", "pairs": pairs}
    for number, vote in enumerate(("left", "right")):
        votes = [{"pair": n, "vote": vote} for n in range(2)]
        text = json.dumps({"format": "danceopd-votes/1", "page": "p", "voter": " a ", "votes": votes})
        (tmp_path / f"{number}.json").write_text(text)
    found = read_votes([tmp_path / "0.json", tmp_path / "1.json"], blind)
    assert found == {"a": {("editing", "c", "0"): -1, ("editing", "c", "1"): 1}}


def test_the_contact_sheet_has_a_cell_for_each_model(folder: Path, edits: Path, tmp_path: Path) -> None:
    scores, rows = load(folder)
    picked = highlights(scores, items_of(scores, rows))
    path = write_contact_sheet(folder, scores, picked)
    assert path is not None and path.stat().st_size < 1_000_000
    with Image.open(path) as sheet:
        assert 6 * SIDE < sheet.width < 6 * SIDE + 300 and 6 * (SIDE + STRIP) < sheet.height < 6 * (SIDE + STRIP) + 250
        exact = sheet.convert("RGB")
    student = picked["generation"][0][1]["cells"]["student"]["image"]
    pixel = Image.open(folder / student).convert("RGB").getpixel((0, 0))
    corner = exact.width - 12 - SIDE, exact.height - 12 - 6 * (SIDE + STRIP + 6)  # of the first row's last cell
    assert exact.getpixel(corner) == pixel  # the last column, enlarged by whole numbers
    named, judged_rows = load(edits)
    found = contact_sheet(edits, named, highlights(named, items_of(named, judged_rows)))
    assert found is not None and found.mode == "RGB"
    shutil.copytree(folder, tmp_path / "bare", ignore=shutil.ignore_patterns("images"))
    assert write_contact_sheet(tmp_path / "bare", scores, picked) is None
    assert not (tmp_path / "bare" / "contact.png").exists()
