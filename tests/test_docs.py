"""The pages are true where a machine can tell: links, anchors, the site's table of contents, commands, sentences."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from danceopd.cli.app import app
from danceopd.recipe.reference import slug

ROOT = Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*DOCS, *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "checkpoints/README.md"))]
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, of which a second of the same name ends in -1."""
    found: list[str] = []
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        name = slug(re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading))
        found.append(f"{name}-{found.count(name)}" if name in found else name)
    return set(found)


def broken(page: Path) -> list[str]:
    """The relative links of a page that lead nowhere."""
    found = []
    for link in LINK.findall(CODE.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            found.append(link)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    assert broken(page) == []


def test_a_broken_link_would_be_found(tmp_path: Path) -> None:
    links = "[x](b.md) [y](#a-b-c) [z](#other) [w](a.md#a-b-c) `[v](no.md)` [h](http://h)"
    (tmp_path / "a.md").write_text(f"# A `b` c\n{links}")
    assert broken(tmp_path / "a.md") == ["b.md", "#other"]


def entries(nav: list[Any]) -> list[str]:
    """The files of the site's table of contents."""
    values = [value for one in nav for value in one.values()]
    return [file for value in values for file in (entries(value) if isinstance(value, list) else [value])]


def test_every_page_is_on_the_site_and_on_its_first_page() -> None:
    names = {page.name for page in DOCS}
    assert sorted(entries(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])) == sorted(names)
    assert set(re.findall(r"\(([\w-]+\.md)\)", (ROOT / "docs" / "index.md").read_text())) == names - {"index.md"}


def commands() -> list[tuple[str, str]]:
    """Every `danceopd …` in a page, in a block or a line."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        blocks = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)
        lines = [line.strip() for block in blocks for line in block.splitlines()]
        lines += re.findall(r"(?<!`)`(danceopd [^`\n]*)`", text)
        found += [(page.name, line.partition(" # ")[0]) for line in lines if line.startswith("danceopd ")]
    return found


def test_every_command_and_flag_exists() -> None:
    group: Any = typer.main.get_command(app)
    said = commands()
    assert len(said) > 60
    wrong = []
    for page, line in said:
        try:
            words = shlex.split(re.sub(r"[…<>()|]", " ", line))
        except ValueError:  # an example that is cut short
            continue
        here, flags = group, [word.partition("=")[0] for word in words if re.match(r"--?[a-z]", word)]
        for word in words[1:3]:
            here = getattr(here, "commands", {}).get(word, here)
        if here is group and len(words) > 1 and re.fullmatch(r"[a-z]+", words[1]):
            wrong.append(f"{page}: {line}")
        known = {name for command in (here, group) for one in command.params for name in one.opts} | {"-h", "--help"}
        wrong += [f"{page}: {flag} in {line}" for flag in flags if here is not group and flag not in known]
    assert wrong == []


def test_the_sentences_of_troubleshooting_are_those_that_are_printed() -> None:
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    cells = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| ")]
    quoted = [words for cell in cells for words in re.findall(r"`([^`]+)`", cell) if " " in words and "--" not in words]
    source = "".join(path.read_text(encoding="utf-8") for top in ("danceopd", "pipelines")
                     for path in sorted((ROOT / top).rglob("*.py")))  # fmt: skip
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # a string over several lines
    assert len(quoted) > 12
    assert [words for words in quoted if words not in source] == []


def test_the_table_of_families_is_true():
    """Its families, how many sources an edit has, the settings of `call`, and the lines of each file."""
    from danceopd.pipelines.registry import BUILTIN

    text = (ROOT / "docs" / "bring-your-own-model.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if ".py`, " in line]
    assert [cells[0].strip("`") for cells in rows] == list(BUILTIN)
    for cells, family in zip(rows, BUILTIN.values(), strict=True):
        most = max((family.references(name) for name in family.classes), default=1) if family.editing else 0
        told = "" if not most else "1" if most == 1 else f"up to {most}" + (", RGBA" if family.alpha else "")
        assert cells[4] == told, family.name
        taken = [f"`{key}`" for key in family.call if key != "max_sequence_length"]
        assert cells[5] == ", ".join(taken), family.name
        place, lines = re.fullmatch(r"`(\S+)`, (\d+)", cells[6]).groups()
        assert len((ROOT / place).read_text(encoding="utf-8").splitlines()) == int(lines), place
