"""What is read from an answer and what is not, how far judges agree, and what a question is taken to cost."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from danceopd.bench.judges.agreement import agreement, agreement_of_files
from danceopd.bench.judges.cost import Prices, image_tokens, prices_of, text_tokens
from danceopd.bench.judges.parse import read
from danceopd.bench.judges.protocol import Answer, Reads
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
]
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
]


@pytest.mark.parametrize(("reads", "text", "numbers"), READ)
def test_what_is_certain_is_read(reads: Reads, text: str, numbers: tuple[float, ...]) -> None:
    got = read(text, reads)
    assert (got.status, got.numbers, got.choice) == ("ok", tuple(map(float, numbers)), None)


@pytest.mark.parametrize(("reads", "text"), NOT_READ)
def test_what_is_not_is_a_status_and_never_a_number(reads: Reads, text: str) -> None:
    got = read(text, reads)
    assert (got.status, got.numbers, got.choice) == ("unparsable", None, None)


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
