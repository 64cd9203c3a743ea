"""The averaging reproduces published tables from their cells: whatever is summed up here means what it means there."""

from __future__ import annotations

import math

import pytest
from suites_data import answer

from danceopd.bench import statistics
from danceopd.bench.suites import gedit, geneval, imgedit, viescore

# DanceOPD (arXiv 2606.27377), tables A and B: add, replace, background, style, colour, remove; the average
DANCEOPD = {
    "edit source": ((6.033, 5.417, 4.490, 3.923, 4.889, 4.828), 4.930),
    "DiffusionOPD, A": ((5.488, 5.850, 4.242, 4.303, 4.588, 5.211), 4.947),
    "DanceOPD, A": ((5.681, 5.857, 5.173, 5.218, 4.840, 5.310), 5.347),
    "local source": ((5.555, 5.742, 4.856, 3.817, 4.581, 6.017), 5.095),
    "global source": ((3.119, 4.414, 4.040, 5.209, 4.287, 1.433), 3.750),
    "DanceOPD, B": ((5.178, 5.549, 6.153, 5.944, 5.812, 4.348), 5.498),
}
SIZES = dict(zip(gedit.PAPER, (60, 60, 40, 60, 40, 57)))
# the same tables' GenEval: single object, two objects, counting, colours, position, attributes; the average
GENEVAL = {
    "generation source": ((0.950, 0.939, 0.938, 0.947, 0.520, 0.700), 0.832),
    "edit source": ((0.838, 0.828, 0.713, 0.840, 0.580, 0.470), 0.711),
    "DanceOPD, A": ((0.988, 0.939, 0.963, 0.894, 0.640, 0.670), 0.849),
    "local source": ((0.988, 0.929, 0.813, 0.862, 0.600, 0.570), 0.793),
    "global source": ((0.950, 0.939, 0.838, 0.872, 0.600, 0.650), 0.808),
    "DanceOPD, B": ((1.000, 0.949, 0.925, 0.926, 0.650, 0.640), 0.848),
}
PROMPTS = dict(zip(geneval.CATEGORIES, (80, 99, 80, 94, 100, 100)))
# GEdit-Bench-EN, all eleven categories in the data's order, as Step1X-Edit's table has them
ELEVEN = {
    "Step1X-Edit": ((6.547, 6.545, 6.204, 6.483, 6.787, 7.221, 6.975, 6.512, 7.068, 6.921, 6.448), 6.701),
    "OmniGen": ((5.281, 6.003, 5.308, 2.916, 3.087, 4.903, 6.628, 6.352, 5.616, 4.519, 5.064), 5.062),
}
# ImgEdit-Bench's table, in its order; most rows add up by category
IMGEDIT = {
    "ICEdit": ((3.58, 3.39, 1.73, 3.15, 2.93, 3.08, 3.84, 2.04, 3.68), 3.05),
    "Step1X-Edit": ((3.88, 3.14, 1.76, 3.40, 2.41, 3.16, 4.63, 2.64, 2.52), 3.06),
    "UltraEdit": ((3.44, 2.81, 2.13, 2.96, 1.45, 2.83, 3.76, 1.91, 2.98), 2.70),
}


def rows(capability, categories, values):
    """One row an item: ``values`` of each category."""
    return [
        {"model": "m", "capability": capability, "category": category, "key": f"{category}{n}", "score": value}
        for category in categories
        for n, value in enumerate(values(category))
    ]


def edits(cells, sizes):
    """Scores of items that differ, whose mean is each category's cell, by way of judged numbers."""

    def of(category):
        cell, n = cells[category], sizes[category]
        for at in range(n):
            o = cell + 0.5 * math.sin(2 * math.pi * at / n)
            got = viescore.verdict({"SC": answer(o, 10.0), "PQ": answer(10.0, o)})
            assert got.value is not None
            yield got.value

    return rows("editing", sizes, lambda category: list(of(category)))


@pytest.mark.parametrize("row", DANCEOPD)
def test_danceopd_editing(row):
    cells, average = DANCEOPD[row]
    found = statistics.summary(edits(dict(zip(gedit.PAPER, cells)), SIZES), "m", "editing", False, (0, 10))
    assert {c: round(f["mean"], 3) for c, f in found["categories"].items()} == dict(zip(gedit.PAPER, cells))
    assert found["overall"]["mean"] == pytest.approx(average, abs=0.001)  # cells and average are rounded
    assert found["overall"]["n"] == 317


@pytest.mark.parametrize("row", GENEVAL)
def test_danceopd_generation(row):
    """One picture a prompt: every cell is a whole number of right pictures."""
    cells, average = GENEVAL[row]
    share = dict(zip(PROMPTS, cells))
    suite = geneval.Suite.__new__(geneval.Suite)

    def scored(category):
        n = PROMPTS[category]
        right = round(share[category] * n)
        answers = [answer(choice="correct" if at < right else "incorrect") for at in range(n)]
        return [suite.verdict(None, {geneval.ASPECT: one}).value for one in answers]

    found = statistics.summary(rows("generation", PROMPTS, scored), "m", "generation", True, (0, 1))
    assert {c: f["mean"] for c, f in found["categories"].items()} == pytest.approx(share, abs=0.00051)
    assert round(found["overall"]["mean"], 3) == average
    assert found["overall"]["n"] == 553


@pytest.mark.parametrize("row", ELEVEN)
def test_all_eleven_categories(row):
    cells, average = ELEVEN[row]
    sizes = dict(zip(gedit.CATEGORIES, (40, 40, 40, 40, 70, 60, 60, 57, 60, 99, 40)))
    found = statistics.summary(edits(dict(zip(gedit.CATEGORIES, cells)), sizes), "m", "editing", False, (0, 10))
    assert sum(sizes.values()) == gedit.SIZE
    assert found["overall"]["mean"] == pytest.approx(average, abs=0.001)


@pytest.mark.parametrize("row", IMGEDIT)
def test_imgedit(row):
    cells, average = IMGEDIT[row]
    sizes = dict(zip(imgedit.CATEGORIES, (95, 94, 117, 92, 86, 94, 100, 23, 36)))
    share = dict(zip(imgedit.CATEGORIES, cells))
    found = statistics.summary(
        rows("editing", sizes, lambda c: [share[c]] * sizes[c]), "m", "editing", False, (1, 5)
    )
    assert sum(sizes.values()) == imgedit.SIZE
    assert round(found["overall"]["mean"], 2) == average


def test_a_category_is_a_mean_of_roots():
    """Not the root of the means of SC and PQ, which is 5 here."""
    scores = [viescore.verdict({"SC": answer(a, 10), "PQ": answer(b, 10)}).value for a, b in ((9, 1), (1, 9))]
    assert sum(scores) / 2 == 3.0
