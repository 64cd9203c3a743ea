"""VIEScore for an edit: two questions, four numbers from 0 to 10, one score (arXiv 2312.14867; GEdit-Bench's judge).

SC (semantic consistency) is asked with the instruction, the source image and the edit: success, and restraint (10:
nothing else has changed); SC is the lower of the two. PQ (perceptual quality) is asked with the edit alone:
naturalness, and freedom from artifacts; PQ is the lower of the two. O = sqrt(SC * PQ) of each item. As in GEdit-Bench,
the edit is resized to the source's size first, and the order is text, source, edit. The judge's prompts here are our
own; `official_prompts` reads those of the user's copy of the official code instead.
"""

from __future__ import annotations

import ast
import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from danceopd.bench.judges.protocol import Answer, Question, Reads
from danceopd.bench.suites.judged import FAILURES, failure, numbers_of, official_file, reasons
from danceopd.bench.suites.protocol import Item, Score
from danceopd.data.images import picture
from danceopd.errors import UserError

PROMPTS_VERSION = "1"
ASPECTS = ("SC", "PQ")
READS = Reads(count=2, low=0, high=10)

SC_PROMPT = """\
You grade one edit that an image editing model made. The first picture is the source, the second is what the model \
returned. This was the instruction:

<instruction>

Give two numbers from 0 to 10.

Success: how far the second picture carries out the instruction.
0: nothing that was asked for is there, or the source came back unchanged.
5: the right thing was attempted, and about half of what was asked for is there or right.
10: everything that was asked for is there, in the right place and amount, with the right properties.

Restraint: how far everything that the instruction leaves alone is still as it was in the source.
0: a different picture; what it showed before cannot be recognised.
5: the source can be recognised, but other things, people, places or colours have changed as well.
10: only what the instruction calls for has changed, however large that change had to be.

Compare the two pictures part by part before you decide. A flaw in beauty or realism is no matter here. \
Answer with one JSON object and nothing else, the reasoning in at most two sentences:
{"reasoning": "...", "score": [success, restraint]}"""

PQ_PROMPT = """\
You grade the technical quality of one picture that an image model made. What it shows, and whether anybody asked for \
that, is no matter here.

Give two numbers from 0 to 10.

Naturalness: whether the scene holds together for the eye, or for its own style where it is drawn or painted.
0: light, shadows, sizes or distances contradict each other everywhere.
5: believable at first sight, with contradictions that show when one looks.
10: nothing about light, shadows, sizes, distances or style is out of place.

Cleanness: freedom from damage.
0: large parts are distorted, smeared, noisy, cut out badly, marked or scratched, or bodies and faces are malformed.
5: some damage that shows when one looks.
10: no damage can be found.

Answer with one JSON object and nothing else, the reasoning in at most two sentences:
{"reasoning": "...", "score": [naturalness, cleanness]}"""


@dataclass(frozen=True)
class JudgePrompts:
    """The judge's two prompts, `<instruction>` standing for the instruction, and how a result names them."""

    sc: str = SC_PROMPT
    pq: str = PQ_PROMPT
    source: str = f"danceopd {PROMPTS_VERSION}"
    max_tokens: int = 1000

    def rules(self) -> dict[str, Any]:
        """Their source and hashes, for the result."""
        texts = {"SC": self.sc, "PQ": self.pq}
        return {
            "source": self.source,
            "sha256": {aspect: hashlib.sha256(text.encode()).hexdigest() for aspect, text in texts.items()},
            "max_tokens": self.max_tokens,
        }


OFFICIAL_FILE = "vie_prompts.py"
OFFICIAL_PLACES = (".", "viescore", "GEdit-Bench/viescore")
"""Where the file may lie below the folder that `--official-prompts` names."""
_CONTEXT, _PAIR, _SC, _PQ = (
    "_context_no_delimit",
    "_prompts_0shot_two_image_edit_rule",
    "_prompts_0shot_tie_rule_SC",
    "_prompts_0shot_rule_PQ",
)


def judge_prompts(official: str | Path | None) -> JudgePrompts:
    """Our own prompts, or with the folder of `--official-prompts` those of the official code."""
    return JudgePrompts() if official is None else official_prompts(official)


def official_prompts(folder: str | Path) -> JudgePrompts:
    """The prompts of `vie_prompts.py` in the user's copy of Step1X-Edit's GEdit-Bench; the file is read, never run."""
    advice = "give the folder GEdit-Bench/viescore of a copy of https://github.com/stepfun-ai/Step1X-Edit"
    file = official_file(folder, OFFICIAL_FILE, OFFICIAL_PLACES, advice)
    try:
        parts = {
            target.id: ast.literal_eval(node.value)
            for node in ast.parse(file.read_text(encoding="utf-8")).body
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        context, pair, sc, pq = (str(parts[name]) for name in (_CONTEXT, _PAIR, _SC, _PQ))
    except KeyError as error:
        raise UserError(f"{file} does not hold {error}; use the file of the official repository") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}); use the file of the official repository") from None
    return JudgePrompts("\n".join([context, pair, sc]), "\n".join([context, pq]), "official", 1400)


@dataclass(frozen=True)
class EditScore(Score):
    """``value`` is O, 0 to 10; ``sc`` and ``pq`` are the lower number of each question; the four numbers follow."""

    sc: float | None = None
    pq: float | None = None
    success: float | None = None
    over_editing: float | None = None
    naturalness: float | None = None
    artifacts: float | None = None


def rules(prompts: JudgePrompts) -> dict[str, Any]:
    """VIEScore's part of a suite's `rules`."""
    return {
        "prompts": prompts.rules(),
        "resize": "the edit to the size of the source (bicubic), where they differ; nothing else",
        "message order": {"SC": ["text", "source", "edit"], "PQ": ["text", "edit"]},
        "item": "SC = min(success, restraint), PQ = min(naturalness, cleanness), O = sqrt(SC * PQ)",
        "failures": FAILURES,
    }


def questions(item: Item, image: Image.Image, prompts: JudgePrompts, facts: Mapping[str, Any]) -> list[Question]:
    """The questions SC and PQ about one edit."""
    assert item.source is not None
    source = picture(item.source)
    edit = picture(image)
    if edit.size != source.size:
        edit = edit.resize(source.size, Image.Resampling.BICUBIC)
    parts = {"SC": (prompts.sc.replace("<instruction>", item.prompt), source, edit), "PQ": (prompts.pq, edit)}
    return [
        Question(f"{item.key}/{aspect}", aspect, part, READS, facts=facts, max_tokens=prompts.max_tokens)
        for aspect, part in parts.items()
    ]


def verdict(answers: Mapping[str, Answer]) -> EditScore:
    """The four numbers as one score; recorded official results hold only the lower number of each pair."""
    if failed := failure(ASPECTS, answers):
        return EditScore(None, False, failed[1], failed[0])
    both = [numbers_of(answers[aspect]) for aspect in ASPECTS]
    sc, pq = map(min, both)
    (success, restraint), (naturalness, cleanness) = (found if len(found) == 2 else (None, None) for found in both)
    return EditScore(
        math.sqrt(sc * pq),
        sc == pq == READS.high,
        reasons(answers, ASPECTS),
        sc=sc,
        pq=pq,
        success=success,
        over_editing=restraint,
        naturalness=naturalness,
        artifacts=cleanness,
    )
