"""The ``geneval`` suite: GenEval (arXiv 2310.11513), 553 prompts in six categories; each image is correct or not.

The judge decides: the official evaluator's `results.jsonl` (a replay judge), a detector in its own process (a program
judge, which gets the official record in the question's facts), or a vision-language model, which gets the record in
words. The result names the judge; numbers of different kinds of judges do not compare. A category is the share of
correct images over all samples, the overall score the mean of the six. Images lie as in the official code:
`00000/samples/0000.png`, with `00000/metadata.jsonl` beside them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from danceopd.bench.judges.protocol import Answer, Question, Reads
from danceopd.bench.suites.judged import FAILURES, failure, refuse_duplicates
from danceopd.bench.suites.protocol import Item, JudgedSuite, Score, json_sha256
from danceopd.bench.suites.records import Row, located, read_rows
from danceopd.common.messages import did_you_mean
from danceopd.data.images import picture
from danceopd.errors import UserError

CATEGORIES = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
SIZE = 553
SAMPLES = 4
"""Images for each prompt in the published protocol."""
TABLES = ("evaluation_metadata.jsonl", "prompts/evaluation_metadata.jsonl")
READS = Reads(choices=("correct", "incorrect"))
ASPECT = "correct"
PROMPT_VERSION = "1"
PROMPT = """\
You check one picture that an image model made against a list of facts. All of them have to hold:

<facts>

Count an object only where it is really shown, not where it is hinted at, drawn on another object or reflected. An \
object's colour is the main colour of the object itself. Left and right are the viewer's. Nothing else about the \
picture matters, neither its beauty nor what else it shows.

Check the facts one by one, then answer with one JSON object and nothing else:
{"reasoning": "what was found for each fact, in a few words", "answer": "correct" or "incorrect"}"""


class Suite(JudgedSuite):
    """The suite. ``data``: `evaluation_metadata.jsonl`, a copy of the official code, or a folder in its result layout.

    ``samples``: images for each prompt; the published protocol has 4.
    """

    name = "geneval"
    version = "1"
    needs = "run `git clone https://github.com/djghosh13/geneval` and give --data geneval"
    scale = {"generation": (0.0, 1.0)}
    share = {"generation": True}

    def __init__(self, data: str | Path | None = None, samples: int = SAMPLES):
        if samples < 1:
            raise UserError(f"--samples is {samples}; give 1 or more images for each prompt")
        found = located(data, self.needs)
        if found is None:
            raise UserError(f"suite geneval needs its prompts, which are not on the hub; {self.needs}")
        self.data, self.samples = found, samples
        self.published = {"generation": SIZE * samples}

    @cached_property
    def items(self) -> list[Item]:
        """The first sample of every prompt, then the second of every prompt, and so on."""
        records = self._records()
        return [
            Item(
                key=f"{number:05}-{sample}",
                capability="generation",
                group="generation",
                category=record["tag"],
                prompt=record["prompt"],
                task={"record": record, "number": number, "sample": sample},
                tags=(f"sample {sample}",) if self.samples > 1 else (),
            )
            for sample in range(self.samples)
            for number, record in records
        ]

    @cached_property
    def rules(self) -> dict[str, Any]:
        """How it is asked and averaged, and which prompts it was."""
        records = [[i.task["number"], i.task["record"]] for i in self.items if not i.task["sample"]]
        return {
            "prompts": {
                "source": f"danceopd {PROMPT_VERSION}; a program or the official evaluator does not read them",
                "sha256": {ASPECT: hashlib.sha256(PROMPT.encode()).hexdigest()},
                "max_tokens": 1000,
            },
            "resize": "none",
            "message order": {ASPECT: ["text", "picture"]},
            "samples": self.samples,
            "item": "1 when every include clause and no exclude clause holds, else 0",
            "overall": "unweighted mean of the six shares of right pictures, over pictures and not over prompts",
            "checker": "the judge of this result; detectors and language models do not give comparable numbers",
            "failures": FAILURES,
            "data": {
                "name": "djghosh13/geneval, evaluation_metadata.jsonl",
                "prompts": len(records),
                "complete": len(records) == SIZE,
                "texts_sha256": json_sha256(records),
            },
        }

    def image_path(self, item: Item) -> str:
        """`00000/samples/0000.png`."""
        return f"{item.task['number']:05}/samples/{item.task['sample']:04}.png"

    def image_paths(self, item: Item) -> tuple[str, ...]:
        """The official path, and the name with five digits that the official sampling script writes."""
        return self.image_path(item), f"{item.task['number']:05}/samples/{item.task['sample']:05}.png"

    def extra_files(self, item: Item) -> dict[str, str]:
        """`00000/metadata.jsonl`, the prompt's record."""
        return {f"{item.task['number']:05}/metadata.jsonl": json.dumps(item.task["record"])}

    def questions(self, item: Item, image: Image.Image) -> list[Question]:
        """One question: the facts in words for a model, the official record for a program."""
        record = item.task["record"]
        text = PROMPT.replace("<facts>", "\n".join(f"{n}. {fact}" for n, fact in enumerate(clauses(record), 1)))
        facts = {
            "suite": self.name,
            "place": self.image_path(item),
            "places": list(self.image_paths(item)),
            "metadata": record,
            "prompt": item.prompt,
            "category": item.category,
        }
        return [Question(f"{item.key}/{ASPECT}", ASPECT, (text, picture(image)), READS, facts=facts)]

    def verdict(self, item: Item, answers: Mapping[str, Answer]) -> Score:
        """1 for a correct image, else 0."""
        if failed := failure((ASPECT,), answers):
            return Score(None, False, failed[1], failed[0])
        right = answers[ASPECT].choice == READS.choices[0] if READS.choices else False
        return Score(float(right), right, answers[ASPECT].reasoning)

    def _records(self) -> list[tuple[int, dict[str, Any]]]:
        """(number, record) of every prompt: the lines of the table, or the folders of a result folder."""
        folders = _folders(self.data) if self.data.is_dir() else []
        if folders:
            rows = [(int(f.name), row) for f in folders for row in _one(f / "metadata.jsonl")]
        else:
            rows = list(enumerate(read_rows(self.data, (), TABLES)))
        if not rows:
            raise UserError(f"{self.data} holds no prompts; {self.needs}")
        refuse_duplicates(((f"{number:05}", row.where) for number, row in rows), "number")
        refuse_duplicates(((row.text("prompt"), row.where) for _, row in rows), "prompt")
        return [(number, checked(row)) for number, row in rows]


def _folders(data: Path) -> list[Path]:
    """The numbered folders of a result folder that hold a record."""
    return sorted((f for f in data.iterdir() if f.name.isdigit() and (f / "metadata.jsonl").is_file()), key=_number)


def _number(folder: Path) -> int:
    return int(folder.name)


def _one(file: Path) -> Iterable[Row]:
    """The one record of a result folder."""
    rows = read_rows(file, ())
    if len(rows) != 1:
        raise UserError(f"{file} holds {len(rows)} records; a result folder has one")
    return rows


def checked(row: Row) -> dict[str, Any]:
    """The record of a row; UserError for a clause that no checker could check."""
    tag = row.text("tag")
    row.text("prompt")
    if tag not in CATEGORIES:
        raise UserError(f"{row.where} has the tag {tag!r}{did_you_mean(tag, CATEGORIES)}")
    include = row.cells.get("include")
    if not isinstance(include, list) or not include:
        raise UserError(f"{row.where} has no list 'include' of what the image must show; use the official file")
    for at, clause in enumerate([*include, *(row.cells.get("exclude") or [])]):
        known = isinstance(clause, dict) and isinstance(clause.get("class"), str)
        count = clause.get("count") if known else None
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise UserError(f"{row.where} has a clause without 'class' and 'count': {clause!r}; use the official file")
        if "color" in clause and clause["color"] not in COLOURS:
            raise UserError(f"{row.where} has the colour {clause['color']!r}{did_you_mean(clause['color'], COLOURS)}")
        if "position" in clause and not _is_relation(clause["position"], at):
            raise UserError(f"{row.where} has the position {clause['position']!r}; give [relation, earlier clause]")
    return dict(row.cells)


def _is_relation(position: Any, at: int) -> bool:
    return (
        isinstance(position, list)
        and len(position) == 2
        and position[0] in RELATIONS
        and isinstance(position[1], int)
        and 0 <= position[1] < at
    )


def clauses(record: Mapping[str, Any]) -> list[str]:
    """A record's clauses as sentences, for a language model."""
    include = record["include"]
    found = []
    for clause in include:
        colour = f"{clause['color']} " if "color" in clause else ""
        found.append(f"The picture shows at least {clause['count']} {colour}{clause['class']}.")
        if "position" in clause:
            relation, target = clause["position"]
            found.append(f"The {clause['class']} is {relation} the {include[target]['class']}.")
    for clause in record.get("exclude") or ():
        found.append(f"The picture does not show {clause['count']} or more {clause['class']}.")
    return found
