"""What is read from an answer and what is not, how far judges agree, and what a question is taken to cost."""

from __future__ import annotations

import json
import math
import random
import time
from pathlib import Path

import pytest

from danceopd.bench.judges.agreement import agreement, agreement_of_files
from danceopd.bench.judges.answers import reparse
from danceopd.bench.judges.cost import Prices, image_tokens, prices_of, text_tokens
from danceopd.bench.judges.parse import read
from danceopd.bench.judges.protocol import Answer, Question, Reads
from danceopd.common.system import redacted
from danceopd.errors import UserError

TWO, ONE, FIVE = Reads(2, 0, 10), Reads(1, 0, 10), Reads(3, 1, 5)
VOTE, YES = Reads(choices=("A", "B", "tie")), Reads(choices=("yes", "no"))

READ = [
    (TWO, '{"score": [8, 7], "reasoning": "good"}', (8, 7)),
    (TWO, 'Sure!\n```json\n{"score": [8, 7], "reasoning": "good"}\n```\nAnything else?', (8, 7)),
    (TWO, 'Here: {"reasoning": "a {brace} and \\"quotes\\"", "score": [8, 7],} done', (8, 7)),
    (TWO, "{'score': [8, 7], 'reasoning': 'Python'}", (8, 7)),
    (TWO, '{"score": ["8", "7/10"]}', (8, 7)),
    (TWO, '{"score": ["eight", 7.5]}', (8, 7.5)),
    (TWO, '{"Score": [0, 10]}', (0, 10)),
    (TWO, '{"score1": 8, "score2": 7}', (8, 7)),
    (TWO, '||V^=^V||\n{"score": [8, 7]}\n||V^=^V||', (8, 7)),
    (TWO, "[8, 7]", (8, 7)),
    (TWO, "```\n[8, 7]\n```", (8, 7)),
    (TWO, '{"score": [8, 7], "reasoning": "the "red" car"}', (8, 7)),
    (TWO, '{"score": [8, 7], "reasoning": "cut of', (8, 7)),
    (TWO, '{"score": [8, 7],\n "reasoning": "two\nlines"}', (8, 7)),
    (TWO, '<think>maybe {"score": [1, 1]}</think>{"score": [8, 7]}', (8, 7)),
    (TWO, '{"score": [8, 7]} and again {"score": [8, 7]}', (8, 7)),
    (FIVE, "Brief reasoning: fine.\nStyle Fidelity: 4\n**Seamlessness:** 3\nDetail: 5/5", (4, 3, 5)),
    (ONE, "7", (7,)),
    (ONE, " **7/10** ", (7,)),
    (ONE, "Score: 7", (7,)),
    (ONE, '{"score": 7}', (7,)),
    (ONE, '{"score": [7]}', (7,)),
    (ONE, '{"score": 7, "reasoning": "cut of', (7,)),
    (FIVE, "Brief reasoning: fine.\n1. Compliance: 4\n2) Seamlessness: 3\n(3) Detail: 5\r\n", (4, 3, 5)),
    (FIVE, "**1. Compliance: 4**\n- 2. Seamlessness: **3**\n3. Detail：5", (4, 3, 5)),
    *((TWO, f'{draft}{end}{{"score": [8, 7]}}', (8, 7)) for draft, end in (
        ('<thinking>{"score": [1, 2]}', "</thinking>"),
        ('[THINK]{"score": [1, 2]}', "[/THINK]"),
        ('◁think▷{"score": [1, 2]}', "◁/think▷"),
        ('{"score": [1, 2]} but wait', "</think>\n"),
        ('<|channel|>analysis<|message|>{"score": [1, 2]}', "<|end|><|start|>assistant<|channel|>final<|message|>"),
    )),
]  # fmt: skip
NOT_READ = [
    (TWO, ""),
    (TWO, "8"),
    (TWO, '{"score": 8}'),
    (TWO, '{"score": [8]}'),
    (TWO, '{"score": [8, 7, 6]}'),
    (TWO, '{"score": [8, 11]}'),
    (TWO, '{"score": [-1, 7]}'),
    (TWO, '{"score": [8, null]}'),
    (TWO, '{"score": [true, 7]}'),
    (TWO, '{"score": [NaN, 7]}'),
    (TWO, '{"score": ["8/5", 7]}'),
    (TWO, '{"score": [8, '),
    (TWO, '{"success": 8, "overediting": 7}'),
    (TWO, '{"score": [8, 7]} or rather {"score": [3, 7]}'),
    (TWO, "I would give it [8, 7]."),
    (TWO, "On a scale of [0, 10] this is good."),
    (TWO, "8 and 7"),
    (TWO, "Success: 8\nNaturalness: 7\nOverall: 7"),
    (TWO, '{"score1": 8, "score3": 7}'),
    (FIVE, '{"score": [0, 3, 4]}'),
    (ONE, "I would give it 7."),
    (ONE, "7,5"),
    (ONE, "There are: 7"),
    (ONE, "7 8"),
    (ONE, '{"confidence": 9}'),
    (ONE, "Score: 7\nScore: 8"),
    (FIVE, "1. 4\n2. 3\n3. 5"),
    *((TWO, f'{begin}perhaps {{"score": [1, 2]}}, but wait') for begin in (
        "<think>", "<THINK>", "<thinking>", "[THINK]", "◁think▷", "<seed:think>", "<reasoning>", "<|begin_of_thought|>",
        "<think>a</think><think>", "<|channel|>analysis<|message|>", "<think>x<thinking>y</thinking>",
    )),
    (TWO, '{"score": [8, 7]}<think>or rather'),
    (TWO, '{"score": [1' + "0" * 400 + ", 8]}"),
]  # fmt: skip
HOSTILE = {
    "open brackets": "[" * 49_000,
    "too long": "[" * 60_000,
    "deep": "[" * 20_000 + "]" * 20_000,
    "deep Python": "[" + "(" * 5_000 + ")" * 5_000 + "]",
    "newlines": "x" + "\n" * 49_000 + "y",
    "spaces": "x: " + " " * 49_000 + "y",
    "signs": "a: " + "* " * 20_000 + "b",
    "digits": '{"score": [' + "9" * 5_000 + ", 8]}",
    "a long name": "score1" + "1" * 20_000 + ": 3",
    "numbers": '{"score1' + "1" * 5_000 + '": 3}',
    "quotes": '"' * 49_000 + "{}",
    "halves of objects": '{"a":[' * 8_000,
    "punctuation": ". " * 24_000,
    "thoughts": "<think>" * 6_000,
}
"""Answers that a parser without bounds would be at for minutes, or fail at."""


@pytest.mark.parametrize(("reads", "text", "numbers"), READ)
def test_what_is_certain_is_read(reads: Reads, text: str, numbers: tuple[float, ...]) -> None:
    got = read(text, reads)
    assert (got.status, got.numbers, got.choice) == ("ok", tuple(map(float, numbers)), None)


@pytest.mark.parametrize(("reads", "text"), NOT_READ)
def test_what_is_not_is_a_status_and_never_a_number(reads: Reads, text: str) -> None:
    got = read(text, reads)
    assert (got.status, got.numbers, got.choice) == ("unparsable", None, None)


@pytest.mark.parametrize("name", HOSTILE)
def test_any_answer_is_read_at_once(name: str) -> None:
    began = time.process_time()
    for reads in (TWO, VOTE):
        got = read(HOSTILE[name], reads)
        assert (got.status, got.numbers, got.choice) == ("unparsable", None, None)
    assert time.process_time() - began < 5  # 60,000 brackets took 90 s


def test_what_was_cut_off_is_read_only_where_it_answers_at_once() -> None:
    """A model's thoughts often have no mark at their begin, so what was cut off may be nothing but thoughts."""
    sure = '{"score": [8, 7], "reasoning": "good'
    assert read(sure, TWO, cut=True).numbers == read(f"```json\n{sure}", TWO, cut=True).numbers == (8, 7)
    draft = 'The hat is missing. {"score": [1, 2]}. But'
    got = read(draft, TWO, cut=True)
    assert got.status == "unparsable" and "--judge-thinking" in got.reasoning and read(draft, TWO).numbers == (1, 2)
    assert "--judge-thinking" in read(f"<think>{draft}", TWO).reasoning
    asked = Question("k", "SC", (), TWO)  # and not when it is read again from a file
    assert reparse(Answer("k", "ok", (1.0, 2.0), text=draft, cut=True), asked).status == "unparsable"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("--judge openai:m@http://user:KEY@h/v1?key=KEY&api-version=1 -o x", "openai:m@http://h/v1?key=***&api-version=1"),
        ("openai:m@http://u:KE/Y@h/v1", "openai:m@http://h/v1"),
        ("cmd:python j.py --api-key KEY -x", "--api-key *** -x"),
        ("cmd:API_KEY=KEY python j.py", "API_KEY=*** python"),
        ("x sk-proj-KEYKEYKEYKEYKEYKEY y", "x *** y"),
        ("--judge-key-file key.txt --seed 1", "--judge-key-file key.txt --seed 1"),
    ],
)
def test_a_recorded_command_has_no_keys(text: str, left: str) -> None:
    assert left in redacted(text) and "KEY" not in redacted(text).replace("API_KEY", "")


@pytest.mark.parametrize(
    ("reads", "text", "choice"),
    [
        (VOTE, '{"choice": "a", "reasoning": "B is worse"}', "A"),
        (VOTE, '{"winner": "Tie"}', "tie"),
        (VOTE, "B", "B"),
        (VOTE, "**B**.", "B"),
        (VOTE, "A is sharper, B keeps the face.\n[[B]]", "B"),
        (VOTE, "Answer: tie", "tie"),
        (VOTE, "A, as the hat is there", "A"),
        (VOTE, "A cat sits on both", None),
        (VOTE, "A or B", None),
        (VOTE, "[[A]] [[B]]", None),
        (VOTE, '{"choice": "C"}', None),
        (VOTE, '{"score": 3}', None),
        (YES, '{"correct": true}', "yes"),
        (YES, '{"correct": false, "reason": "two dogs"}', "no"),
        (YES, "Yes. There is a dog.", "yes"),
        (YES, "Yes, and no cat", None),
        (YES, "Absolutely", None),
    ],
)
def test_choices_are_read_as_strictly(reads: Reads, text: str, choice: str | None) -> None:
    got = read(text, reads)
    assert (got.status, got.choice, got.numbers) == ("ok" if choice else "unparsable", choice, None)


@pytest.mark.parametrize(
    "text", ["I'm sorry, but I can't assist with that.", "I cannot help with this.", "I'm unable to evaluate it."]
)
def test_a_refusal_in_words_is_one(text: str) -> None:
    assert read(text, TWO).status == "refused"
    assert read('{"score": [1, 2], "reasoning": "I\'m sorry, I can\'t help"}', TWO).numbers == (1, 2)


def test_reasons_are_kept() -> None:
    assert read('{"score": [8, 7], "reasoning": " the hat is gone "}', TWO).reasoning == "the hat is gone"
    assert read("It is good.", TWO).reasoning == "It is good."


def answer(key: str, *numbers: float, choice: str | None = None, status: str = "ok") -> Answer:
    return Answer(key, status, numbers or None, choice)  # type: ignore[arg-type]


def test_agreement_is_what_the_formulas_say() -> None:
    # by hand: exact 1/4; |d| 0 1 1 2 -> 1; E (a_i - b_j)^2 over a 1 2 3 4, b 1 3 2 6 = 5.5; 1 - 1.5/5.5
    pairs = [("SC", answer("x", a), answer("x", b)) for a, b in zip((1, 2, 3, 4), (1, 3, 2, 6))]
    pairs.append(("SC", answer("y", 5), answer("y", status="unparsable")))
    figures = agreement(pairs)["SC"]
    chance = sum((a - b) ** 2 for a in (1, 2, 3, 4) for b in (1, 3, 2, 6)) / 16
    assert figures == pytest.approx(
        {"n": 4, "unread": 1, "exact": 0.25, "difference": 1.0, "kappa": 1 - 1.5 / chance, "spearman": 0.8}
    )


def test_agreement_of_equal_chance_and_constant_answers() -> None:
    rng = random.Random(0)
    ratings = [rng.randint(0, 10) for _ in range(4000)]
    other = [rng.randint(0, 10) for _ in range(4000)]
    same = agreement(("PQ", answer("x", a, a), answer("x", a, a)) for a in ratings[:50])["PQ"]
    assert (same["exact"], same["kappa"], same["spearman"]) == pytest.approx((1, 1, 1))
    chance = agreement(("PQ", answer("x", a), answer("x", b)) for a, b in zip(ratings, other))["PQ"]
    assert abs(chance["kappa"]) < 0.05 and abs(chance["spearman"]) < 0.05
    ties = agreement(("PQ", answer("x", a), answer("x", b)) for a, b in zip((1, 2, 2, 3), (1, 1, 2, 3)))["PQ"]
    assert ties["spearman"] == pytest.approx(5 / 6)  # of the mean ranks 1, 2.5, 2.5, 4 and 1.5, 1.5, 3, 4
    constant = agreement([("PQ", answer("x", 5), answer("x", 5))] * 3)["PQ"]
    assert constant["exact"] == 1 and constant["kappa"] is None and constant["spearman"] is None
    votes = agreement(("pair", answer("x", choice=a), answer("x", choice=b)) for a, b in zip("AABBAABB", "AABBBBAA"))[
        "pair"
    ]
    assert votes["exact"] == 0.5 and votes["kappa"] == pytest.approx(0.0)


def test_agreement_of_two_files_pairs_keys_and_repeats(tmp_path: Path) -> None:
    for name, numbers in (("one", (8, 6)), ("other", (8, 7))):
        rows = [
            {"key": "m/1/SC", "aspect": "SC", "numbers": [numbers[0]], "repeat": 0},
            {"key": "m/1/SC", "aspect": "SC", "numbers": [numbers[1]], "repeat": 1},
            {"key": f"m/{name}/SC", "aspect": "SC", "numbers": [1]},
        ]
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
    figures = agreement_of_files(tmp_path / "one", tmp_path / "other")["SC"]
    assert (figures["n"], figures["exact"], figures["difference"]) == (2, 0.5, 0.5)
    (tmp_path / "third").write_text(json.dumps({"key": "n/1/SC", "numbers": [1]}))
    with pytest.raises(UserError, match="no question in common"):
        agreement_of_files(tmp_path / "one", tmp_path / "third")


def test_prices_are_a_models_own_or_the_users() -> None:
    openai, local = "https://api.openai.com/v1", "http://127.0.0.1:8000/v1"
    assert prices_of("gpt-4.1-2025-04-14", openai, None, None) == Prices(2.0, 8.0)
    assert prices_of("gpt-4.1-mini", openai, None, None) == Prices(0.4, 1.6)
    assert prices_of("gpt-4.1-turbo-max", openai, None, None) is None
    assert prices_of("gpt-4.1", local, None, None) is None
    assert prices_of("anything", local, 1.0, 2.0) == Prices(1.0, 2.0)
    assert Prices(2.0, 8.0).cost(1_000_000, 500_000) == 6.0
    with pytest.raises(UserError, match="--price-out"):
        prices_of("anything", local, 1.0, None)
    with pytest.raises(UserError, match="zero or more"):
        prices_of("anything", local, float("nan"), 1.0)


def test_tokens_are_estimated_from_above() -> None:
    assert text_tokens("abc" * 100) == 100 and text_tokens("编辑") == 2
    assert image_tokens(1024, 1024) == 765 + 604  # 37 x 37 patches of 28 pixels are the larger
    assert image_tokens(512, 512) == 85 + 170 * 4  # scaled to 768: four tiles
    assert image_tokens(4096, 512) == 147 * 19
    assert image_tokens(512, 512, "gpt-4o-mini-2024-07-18") == 2833 + 4 * 5667  # which counts a tile 33 times
    assert image_tokens(1024, 1024, "gpt-4.1-nano") == math.ceil(37 * 37 * 2.46)
