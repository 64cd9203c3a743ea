"""Parsing a judge's text into the numbers or the choice that were asked for, or into a status.

Accepted are: a JSON object with a score, in or out of code fences, with prose around it, trailing commas, single
quotes, or cut off after the score; a bare list; as many "name: number" lines as numbers are asked for (ImgEdit's form,
numbered or not); one number alone where one is asked for. Two objects that disagree, a wrong count, a number out of
range or a number somewhere in prose are unparsable. So is all that stands in a model's thoughts, whose end is missing
where the answer was cut off. Nothing is guessed, clamped or filled in. Time is linear in the length of the text.
"""

from __future__ import annotations

import ast
import json
import re
from dataclasses import dataclass, replace
from typing import Any

from danceopd.bench.judges.protocol import Answer, Question, Reads, Status

SCORES = ("score", "scores", "rating", "ratings", "numbers")
CHOICES = ("choice", "answer", "winner", "verdict", "preference", "better", "correct")
REASONS = ("reasoning", "reason", "explanation", "rationale", "analysis")
WORDS = dict(zip("zero one two three four five six seven eight nine ten".split(), range(11)))

_NUMBER = r"[-+]?\d+(?:\.\d+)?"
_RATIO = re.compile(rf"({_NUMBER})(?:\s*(?:/|out of)\s*({_NUMBER}))?")
_GAP = r"[ \t*]{0,9}"  # bounded, as every repetition of characters that may stand anywhere
_LINE = re.compile(
    rf"^[ \t*#>-]{{0,9}}(?:\(?\d{{1,2}}[.)]{_GAP})?([A-Za-z][^:\n]{{0,80}}?){_GAP}[:=：]{_GAP}({_NUMBER})"
    rf"(?:[ \t]?/[ \t]?({_NUMBER}))?[ \t\r*.]{{0,9}}$", re.M
)  # fmt: skip
_CUT = re.compile(rf"[\"'](?:scores?|ratings?)[\"']\s*:\s*(\[[^\[\]{{}}]*\]|{_NUMBER}(?=\s*[,}}]))", re.I)
_REFUSAL = re.compile(
    r"^\W{0,9}(?:i['’]m|i am)?\s{0,9}(?:very )?sorry\b.{0,40}?\b(?:can(?:['’]t|not)|unable)\b"
    r"|^\W{0,9}(?:i\b.{0,12}\b)?(?:can(?:['’]t|not)|am unable to|['’]m unable to|won['’]t)\s+"
    r"(?:assist|help|comply|evaluate|judge|rate|score|provide|process|analy[sz]e|fulfil)",
    re.I | re.S,
)
_OPEN = re.compile(r"[{\[]")
_BRACKETS = re.compile(r'\\.|["{}\[\]]', re.S)
_THOUGHTS = [
    (re.compile(begin, re.I), re.compile(end, re.I))
    for begin, end in (
        (r"<(?:seed:)?think>", r"</(?:seed:)?think>"),
        (r"<thinking>", r"</thinking>"),
        (r"<(thoughts?|reasoning|analysis|scratchpad)>", r"</(?:thoughts?|reasoning|analysis|scratchpad)>"),
        (r"\[THINK\]", r"\[/THINK\]"),
        ("◁think▷", "◁/think▷"),
        (r"<\|begin_of_thought\|>", r"<\|end_of_thought\|>"),
        (r"<\|channel\|?>\s?(?:analysis|thought)\b", r"<\|channel\|>\s?final\s?<\|message\|>|<channel\|>"),
    )
]
"""How models mark the begin and the end of what they think before they answer."""
MAX_LENGTH, MAX_OBJECTS = 50_000, 20
"""Characters of an answer, and brackets that do not parse in it, beyond which it is none."""
UNFINISHED = "cut off while the judge was still reasoning; give it more tokens with --judge-thinking 8000"
CUT = "cut off before its end; give a judge that reasons first more tokens with --judge-thinking 8000"


@dataclass(frozen=True)
class ParsedAnswer:
    """The content of an answer's text; ``numbers`` and ``choice`` are None unless ``status`` is "ok"."""

    status: Status
    numbers: tuple[float, ...] | None = None
    choice: str | None = None
    reasoning: str = ""

    def answer(self, question: Question, text: str, **fields: Any) -> Answer:
        """The answer to a question with this content and its raw text; `fields` are further ones of `Answer`."""
        parsed = (self.status, self.numbers, self.choice, self.reasoning)
        return Answer(question.key, *parsed, text, repeat=question.repeat, **fields)


def read(text: str, reads: Reads, cut: bool = False) -> ParsedAnswer:
    """Parse a judge's ``text`` as ``reads`` asks; status unparsable or refused where it does not hold that.

    ``cut``: the text is known to stop before the judge's end. Then only an answer that it begins with is read.
    """
    answer = _without_thoughts(text)
    if answer is None:
        return ParsedAnswer("unparsable", reasoning=UNFINISHED)
    readable = len(answer) <= MAX_LENGTH and (not cut or re.match(r"(?:```\w*\s{0,9})?[{\[]", answer))
    try:
        got = _read(answer, reads) if readable else ParsedAnswer("unparsable")
    except (RecursionError, OverflowError, ValueError):  # nested too deeply, or numbers of thousands of digits
        got = ParsedAnswer("unparsable")
    return replace(got, reasoning=CUT) if cut and got.status != "ok" else got


def _without_thoughts(text: str) -> str | None:
    """What a model says after its thoughts; None where they have no end. An end without a begin counts: the begin is
    often part of the prompt."""
    last = 0
    for begin, end in _THOUGHTS:
        begins, ends = ([found.end() for found in mark.finditer(text)] for mark in (begin, end))
        if begins and begins[-1] > max(ends, default=0):
            return None
        last = max(last, *ends, 0)
    return text[last:].replace("||V^=^V||", " ").strip()


def _read(answer: str, reads: Reads) -> ParsedAnswer:
    objects = [found for found in _objects(answer) if isinstance(found, dict)]
    reasoning = next((r for r in map(_reason, objects) if r), answer if not objects else "")
    # None stands for a score or choice that is there but not as asked; it must not be skipped
    found = (_choices if reads.choices else _scores)(answer, objects, reads)
    if not found or any(one != found[0] for one in found) or found[0] is None:
        status: Status = "refused" if not objects and _REFUSAL.search(answer) else "unparsable"
        return ParsedAnswer(status, reasoning=reasoning)
    if reads.choices:
        return ParsedAnswer("ok", choice=found[0], reasoning=reasoning)
    return ParsedAnswer("ok", numbers=found[0], reasoning=reasoning)


def _scores(answer: str, objects: list[dict], reads: Reads) -> list[Any]:
    """The numbers of every place that holds scores; None for one that is not as asked."""
    held = [_field(each, SCORES) for each in objects]
    held = [value for value in held if value is not None] or [v for v in map(_numbered, objects) if v]
    if held:
        return [_numbers(value, reads) for value in held]
    if objects:
        return []
    if cut := _CUT.findall(answer):  # the object is cut off or broken by prose, but its list is complete
        return [_numbers(_literal(value), reads) for value in cut]
    bare = re.sub(r"^```\w*|```$", "", answer).strip()
    if bare.startswith("[") and bare.endswith("]"):
        return [_numbers(_literal(bare), reads)]
    lines = _LINE.findall(answer)
    if reads.count > 1:
        return [_numbers([_over(n, of) for _, n, of in lines], reads)] if lines else []
    if not lines:
        return [_numbers(bare.strip("*. "), reads)]
    return [_numbers(_over(n, of), reads) for name, n, of in lines if _named(name, SCORES)]


def _choices(answer: str, objects: list[dict], reads: Reads) -> list[Any]:
    held = [value for each in objects if (value := _field(each, CHOICES)) is not None]
    if held or objects:
        return [_choice(value, reads) for value in held]
    if marked := re.findall(r"\[\[([^\[\]]+)\]\]", answer):
        return [_choice(value, reads) for value in marked]
    lines = re.findall(rf"^[ \t*#>-]{{0,9}}([A-Za-z][\w ]{{0,40}}?){_GAP}:(.+)$", answer, re.M)
    if named := [_choice(value, reads) for name, value in lines if _named(name, CHOICES)]:
        return named
    if (whole := _choice(answer, reads)) is not None:
        return [whole]
    first = re.match(r"[\s*\"']{0,9}([\w ]{1,40}?)[*\"']{0,9}(?:[.,:;!\n]|\s[-–—])", answer)
    others = [c for c in reads.choices or () if re.search(rf"\b{re.escape(c)}\b", answer, re.I)]
    return [_choice(first[1], reads)] if first and len(others) == 1 else []


def _choice(value: Any, reads: Reads) -> str | None:
    known = {choice.casefold(): choice for choice in reads.choices or ()}
    if isinstance(value, bool):
        value = next((word for word in (("yes", "true", "correct") if value else ("no", "false", "incorrect"))
                      if word in known), "")  # fmt: skip
    return known.get(str(value).strip(" \t\r\n*.\"'`()").casefold())


def _numbers(value: Any, reads: Reads) -> tuple[float, ...] | None:
    """As many numbers as asked for, all in range; else None."""
    values = value if isinstance(value, list | tuple) else [value]
    numbers = [_number(each, reads.high) for each in values]
    if len(numbers) != reads.count or any(n is None or not reads.low <= n <= reads.high for n in numbers):
        return None
    return tuple(float(n) for n in numbers if n is not None)


def _number(value: Any, high: float) -> float | None:
    """A number, or text that is only a number: "7", "7/10" where 10 is the highest, "seven"."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return float(value)  # NaN is in no range
    if not isinstance(value, str):
        return None
    word = value.strip().casefold()
    if word in WORDS:
        return float(WORDS[word])
    match = _RATIO.fullmatch(word)
    if not match or (match[2] is not None and float(match[2]) != high):
        return None
    return float(match[1])


def _over(number: str, of: str) -> str:
    return f"{number}/{of}" if of else number


def _named(name: str, known: tuple[str, ...]) -> bool:
    return bool({re.sub(r"\W", "", word).casefold() for word in name.split()} & {*known, *(f"{k}s" for k in known)})


def _field(found: dict, names: tuple[str, ...]) -> Any:
    folded = {str(key).strip().casefold(): value for key, value in found.items()}
    return next((folded[name] for name in names if name in folded), None)


def _numbered(found: dict) -> list[Any] | None:
    """{"score1": 8, "score2": 7} as a list; None where the numbering has gaps."""
    names = {key: re.fullmatch(r"(?i)scores?[ _-]?(\d{1,3})", str(key)) for key in found}
    held = {int(match[1]): found[key] for key, match in names.items() if match}
    return [held[n] for n in sorted(held)] if held and sorted(held) == list(range(1, len(held) + 1)) else None


def _reason(found: dict) -> str:
    reason = _field(found, REASONS)
    return reason.strip() if isinstance(reason, str) else "" if reason is None else json.dumps(reason)


def _objects(text: str) -> list[Any]:
    """Every outermost JSON object or list in the text, parsed leniently; ValueError for a text full of brackets."""
    found, at, failed = [], 0, 0
    while match := _OPEN.search(text, at):
        end = _closing(text, match.start())
        value = _literal(text[match.start() : end]) if end else None
        if value is not None:
            found.append(value)
        elif (failed := failed + 1) > MAX_OBJECTS:
            raise ValueError("a text full of brackets")
        at = end if end and value is not None else match.start() + 1
    return found


def _closing(text: str, start: int) -> int | None:
    """The end of the bracket at ``start``, brackets in quotes not counted."""
    depth, quoted = 0, False
    for match in _BRACKETS.finditer(text, start):
        sign = match[0]
        if sign == '"':
            quoted = not quoted
        elif not quoted and len(sign) == 1:
            depth += 1 if sign in "{[" else -1
            if depth == 0:
                return match.end()
    return None


def _literal(text: str) -> Any:
    """JSON, with line breaks in strings and trailing commas allowed; or a Python literal; or None."""
    for candidate in (text, re.sub(r",(?=\s*[}\]])", "", text)):
        try:
            return json.loads(candidate, strict=False)
        except (ValueError, RecursionError):
            continue
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
