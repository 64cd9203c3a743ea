"""The prompt bank: what it has, which rows `data: auto` gives, and which are held out."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from danceopd.bench.suites.gedit import CATEGORIES as GEDIT
from danceopd.data.bank.build import COUNTS, build, normal
from danceopd.data.bank.rows import BankEdits, Setting, bank_data
from danceopd.errors import UserError

SETTING = Setting(("en", "zh"), (512, 384), Path("/run/cache/sources"), 0)


@pytest.fixture(scope="module")
def bank() -> dict:
    return build()


def test_a_part_of_the_bank_holds_out_what_the_whole_does() -> None:
    """So that no source which one teacher learns from measures another."""
    whole = bank_data("auto", "editing", 10**6, SETTING)
    for kind in ("motion_change", "color_alter", "ps_human"):
        part = bank_data(f"auto:{kind}", "editing", 10**6, SETTING)
        assert part.held_out.drawn_from and not {*part.held_out.drawn_from} & {*whole.drawn_from}
        assert not {*whole.held_out.drawn_from} & {*part.drawn_from}


def test_prompts_are_many_and_none_comes_twice(bank: dict) -> None:
    prompts = [p for kinds in bank["generation"].values() for found in kinds.values() for p in found]
    sources = [prompt for found in bank["editing"].values() for prompt, _ in found]
    assert len(prompts) + len(sources) > 4000
    assert len(set(map(normal, [*prompts, *sources]))) == len(prompts) + len(sources)
    assert all(set(kinds) == set(COUNTS) and all(map(len, kinds.values())) for kinds in bank["generation"].values())
    assert not [p for p in [*prompts, *sources] if p.lower().startswith("a photo of")]  # GenEval's form
    assert max(map(len, [*prompts, *sources])) < 160  # none is cut at the 77 tokens of CLIP


def test_edits_have_all_kinds_and_name_what_is_there(bank: dict) -> None:
    for language, sources in bank["editing"].items():
        kinds = [kind for _, edits in sources for kind, _ in edits]
        assert set(kinds) == set(GEDIT), language
        assert min(map(kinds.count, GEDIT)) > len(kinds) / 40, language
    made = [(prompt, text) for prompt, edits in bank["editing"]["en"] for _, text in edits if prompt[0].islower()]
    patterns = (r"Remove the (.+)\.", r"Replace the (.+) with", r"Make the (.+) out of", r"color of the (.+) from",
                r'Change the text "(.+)" to', r"beside the (.+)\.", r"next to the (.+)\.", r"behind the (.+) to")
    named = [(prompt, found[1]) for prompt, text in made for p in patterns if (found := re.search(p, text))]
    assert len(named) > 1000
    assert [(prompt, what) for prompt, what in named if what.removeprefix("text from the ") not in prompt] == []
    assert not [text for _, text in made if re.search(r"(?:from|Replace the) (\w+) (?:to|with an?) \1\.", text)]


def test_rows_are_those_of_the_seed_and_held_out_rows_are_others() -> None:
    one, again = (bank_data("auto", "generation", 8, SETTING) for _ in range(2))
    other = bank_data("auto", "generation", 8, replace(SETTING, seed=1))
    assert one[:] == again[:] != other[:] and sorted(one[:]) == sorted(other[:])  # what is held out, no seed moves
    assert len(one) > 3000 and len(one.held_out) > 250 and not set(one[:]) & set(one.held_out[:])
    edits = bank_data("auto", "editing", 40, SETTING)
    assert isinstance(edits, BankEdits) and len(edits) == 40 and len(set(edits.drawn_from)) < 12
    assert not set(edits.drawn_from) & set(edits.held_out.drawn_from)
    assert edits.sizes(0) == [(512, 384)] and edits[0][1].parent == SETTING.folder and edits[0][1].suffix == ".png"
    moved = bank_data("auto", "editing", 40, replace(SETTING, size=(64, 64)))
    assert edits[0][1].name != moved[0][1].name  # another size is another picture


@pytest.mark.parametrize(
    ("spec", "capability", "wanted"),
    [
        ("auto:zh", "generation", lambda p: re.search("[一-鿿]", p)),
        ("auto:en", "editing", lambda p: not re.search("[一-鿿]", p[0])),
        ("auto:counting,en", "generation", lambda p: re.search("two|three|four|five|seven", p.lower())),
        ("auto:text_change,en", "editing", lambda p: "text" in p[0] or "word" in p[0] or "sign" in p[0]),
    ],
)
def test_a_part_of_the_bank(spec: str, capability: str, wanted: object) -> None:
    found = bank_data(spec, capability, 1000, SETTING)
    assert len(found) > 40 and all(map(wanted, found[:])) and all(map(wanted, found.held_out[:]))


def test_a_base_that_reads_no_chinese_is_asked_in_english() -> None:
    found = bank_data("auto", "generation", 8, replace(SETTING, languages=("en",)))
    assert not [prompt for prompt in found if re.search("[一-鿿]", prompt)]


@pytest.mark.parametrize(("spec", "capability"), [("auto:conting", "generation"), ("auto:people", "editing")])
def test_an_unknown_kind_is_refused(spec: str, capability: str) -> None:
    with pytest.raises(UserError, match=f"data source '{spec}' names '{spec[5:]}'"):
        bank_data(spec, capability, 8, SETTING)
