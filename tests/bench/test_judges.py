"""An endpoint that misbehaves, and a session that loses nothing: against a real server, in real processes."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from judge_server import MODEL, JudgeServer
from PIL import Image

from danceopd.bench.judges.protocol import Question, Reads
from danceopd.bench.judges.registry import load_judge
from danceopd.bench.judges.session import JudgeSession
from danceopd.errors import UserError

TESTS = Path(__file__).parent


def colour(n: int) -> tuple[int, int, int]:
    return (25 * (n % 11), 25 * ((n * 3) % 11), n // 11)


def question(n: int, name: str | None = None) -> Question:
    image = Image.new("RGB", (32, 32), colour(n))
    parts = (f"Rate {name or f'item-{n}'}.", Image.new("RGB", (32, 32), "white"), image)
    return Question(f"m/{n}/SC", "SC", parts, Reads(2, 0, 10), system="You judge.", max_tokens=100)


def right(n: int) -> tuple[float, ...]:
    return (float(n % 11), float((n * 3) % 11))


def endpoint(server: JudgeServer, **options: Any) -> Any:
    options = {"timeout": 5.0, "first_wait": 0.02, "concurrency": 4, **options}
    return load_judge(f"openai:gpt-4.1@{server.url}", **options)


def rows(file: Path) -> list[dict[str, Any]]:
    return [row for line in file.read_text().splitlines() if "key" in (row := json.loads(line))]


@pytest.fixture(autouse=True)
def _no_key(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    yield


PLAN = {
    "item-0": ["429", "500"],
    "item-1": ["hang"],
    "item-2": ["half"],
    "item-3": ["reset"],
    "item-4": ["prose"],
    "item-5": ["fence"],
    "item-6": ["one"],
    "item-7": ["range"],
    "item-8": ["refusal"],
    "item-9": ["filter"],
    "item-10": ["filter400"],
    "item-11": ["cut"],
    "item-12": ["words"],
    "item-13": ["500"] * 9,
    "item-14": ["drip"],
    "item-15": ["400"],
    "item-16": ["sorry"],
    "item-17": ["nothing"],
    "item-18": ["empty"],
    "item-19": ["429"] * 4,  # a rate limit does not use up the tries
}
STATUSES = {
    **dict.fromkeys((6, 7, 11, 12, 18), "unparsable"),
    **dict.fromkeys((8, 9, 10, 16), "refused"),
    **dict.fromkeys((13, 15), "failed"),
}


def test_a_server_that_misbehaves_gets_right_scores_and_counted_failures(tmp_path: Path) -> None:
    with JudgeServer(PLAN) as server:
        judge = endpoint(server, timeout=1.0, tries=4, price_in=2.0, price_out=8.0)
        session = JudgeSession(judge, tmp_path / "judge.jsonl")
        seen = []
        answers = session.answers((question(n) for n in range(24)), seen.append)
    assert len(seen) == 24 and len(rows(tmp_path / "judge.jsonl")) == 24
    for n in range(24):
        (answer,) = answers[f"m/{n}/SC"]
        assert answer.status == STATUSES.get(n, "ok"), (n, answer)
        assert answer.numbers == (right(n) if answer.status == "ok" else None)
        assert answer.status == "failed" or n == 10 or answer.judge == MODEL  # the snapshot that says it answered
    assert session.usage["statuses"] == {"ok": 13, "unparsable": 5, "refused": 4, "failed": 2}
    assert server.asked["item-0"] == 3 and server.asked["item-13"] == 4 and server.asked["item-15"] == 1
    assert answers["m/0/SC"][0].attempts == 3 and answers["m/4/SC"][0].attempts == 1
    assert answers["m/6/SC"][0].text == "6" and answers["m/12/SC"][0].text == "It looks fairly good to me."
    assert answers["m/13/SC"][0].text.startswith("HTTP 500") and "1 s" not in answers["m/13/SC"][0].text
    assert "length" in answers["m/18/SC"][0].text and answers["m/8/SC"][0].text == "I can't look at this."
    assert answers["m/4/SC"][0].reasoning == "as seen"
    assert answers["m/14/SC"][0].seconds < 4  # bytes that drip in put no deadline off
    assert server.times["item-0"][1] - server.times["item-0"][0] >= 0.19  # Retry-After
    whole = 1000 * 2e-6 + 100 * 8e-6
    assert answers["m/4/SC"][0].cost == pytest.approx(whole)
    assert answers["m/13/SC"][0].cost == 0.0
    assert answers["m/1/SC"][0].cost > whole  # the attempt that hung may have been billed
    assert session.stopped is None


ODD = {
    **dict.fromkeys(("null choice", "null message", "no message", "number"), "unparsable"),
    **dict.fromkeys(("draft", "thought", "digits", "brackets"), "unparsable"),
    **dict.fromkeys(("word", "deep", "list"), "failed"),  # as if nothing had come: asked again first
    **dict.fromkeys(("parts", "half character", "usage words", "usage nan", "usage negative"), "ok"),
}


def test_any_reply_is_one_recorded_answer(tmp_path: Path) -> None:
    plan = {f"item-{n}": [step] * 9 for n, step in enumerate(ODD)}
    with JudgeServer(plan) as server:
        judge = endpoint(server, tries=2, price_in=2.0, price_out=8.0, thinking=50)
        session = JudgeSession(judge, tmp_path / "judge.jsonl")
        answers = session.answers(question(n) for n in range(len(ODD)))
        asked = sum(server.asked.values())
        again = JudgeSession(judge, tmp_path / "judge.jsonl").answers(question(n) for n in range(len(ODD)))
        assert sum(server.asked.values()) == asked + 2 * 3  # only what had failed, twice each
    for n, (step, status) in enumerate(ODD.items()):
        (answer,) = answers[f"m/{n}/SC"]
        assert (answer.status, answer.numbers) == (status, right(n) if status == "ok" else None), step
        assert again[f"m/{n}/SC"][0].status == status and answer.cost is not None and 0 <= answer.cost < 0.1
    lines = (tmp_path / "judge.jsonl").read_text(encoding="utf-8").splitlines()  # which splits at U+2028 too
    assert all(json.loads(line) for line in lines)
    said = {step: answers[f"m/{n}/SC"][0].reasoning for n, step in enumerate(ODD)}
    assert "after 100 tokens, for its context is full" in said["draft"] and "--judge-longest" in said["draft"]
    assert "--judge-thinking" in said["thought"] and said["half character"] == "a?\u2028b"


def test_a_prompt_that_is_too_long_is_said_with_its_mend(tmp_path: Path) -> None:
    said = pytest.raises(UserError, match="maximum model length of 32768.*--judge-longest")
    with JudgeServer({f"item-{n}": ["long"] for n in range(40)}) as server, said:
        JudgeSession(endpoint(server), tmp_path / "j.jsonl").answers(question(n) for n in range(40))


@pytest.mark.parametrize("place", ["user:sk-in-url@", "sk-in-url@", "?key=sk-in-url", "?api-version=1&token=sk-in-url"])
def test_a_key_in_the_url_is_for_the_endpoint_alone(tmp_path: Path, place: str) -> None:
    with JudgeServer({"item-2": ["401 with the key"]}) as server:
        url = f"{server.url}{place}" if place[0] == "?" else server.url.replace("//", f"//{place}")
        judge = load_judge(f"openai:gpt-4.1@{url}", timeout=5.0, first_wait=0.02)
        JudgeSession(judge, tmp_path / "j.jsonl").answers([question(1)])
        with pytest.raises(UserError, match="401") as refused:
            JudgeSession(judge, tmp_path / "j.jsonl").answers([question(2)])
        sent = " ".join(server.paths)
    assert ("sk-in-url" in sent) == (place[0] == "?") and "/v1/chat/completions" in sent
    written = (tmp_path / "j.jsonl").read_text() + json.dumps(judge.identity) + judge.url + str(refused.value)
    assert "sk-in-url" not in written and "***" in str(refused.value)


@pytest.mark.parametrize("url", ["http://[::1", "http://127.0.0.1:99999/v1", "http://u:sk-x/y@h:1/v1", "http:///v1"])
def test_a_url_that_is_none(url: str) -> None:
    with pytest.raises(UserError, match="the judge's URL .* names no host and port") as refused:
        load_judge(f"openai:m@{url}")
    assert "sk-x" not in str(refused.value)
    with pytest.raises(UserError, match="has no URL"):
        load_judge("openai:m@ftp://host/v1")


def test_a_model_that_thinks_may_think_before_its_answer(tmp_path: Path) -> None:
    asked = question(3)
    with JudgeServer() as server:
        judge = endpoint(server, thinking=500, price_in=1.0, price_out=10.0)
        plain = endpoint(server, price_in=1.0, price_out=10.0)
        assert JudgeSession(judge, tmp_path / "j.jsonl").answers([asked])["m/3/SC"][0].status == "ok"
        (body,) = server.bodies
    assert body["max_tokens"] == 600 and judge.identity == plain.identity | {"thinking": 500}
    said, unsaid = judge.quote(asked), plain.quote(asked)
    assert said.tokens_out == unsaid.tokens_out + 500 and said.at_most == pytest.approx(unsaid.at_most + 3 * 500e-5)
    known = load_judge("openai:o3-2025-04-16@https://api.openai.com/v1")
    assert (known.thinking, known.temperature) == (8000, None) and plain.thinking == 0
    with pytest.raises(UserError, match="0 or more"):
        load_judge("openai:gpt-4.1", thinking=-1)


def test_what_the_judge_sees_is_what_was_pinned(tmp_path: Path) -> None:
    picture = Image.new("RGB", (64, 32), colour(3))
    picture.save(tmp_path / "a.png")
    asked = Question("m/3/SC", "SC", ("first", tmp_path / "a.png", "item-3"), Reads(2), system="sys", max_tokens=77)
    with JudgeServer() as server:
        judge = endpoint(server, codec="jpeg:80", longest=16, temperature=0.3, detail="high")
        answer = JudgeSession(judge, tmp_path / "j.jsonl").answers([asked])["m/3/SC"][0]
        (body,) = server.bodies
    system, user = body["messages"]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("gpt-4.1", 0.3, 77)
    assert system == {"role": "system", "content": "sys"}
    assert [part["type"] for part in user["content"]] == ["text", "image_url", "text"]
    assert user["content"][1]["image_url"]["url"].startswith("data:image/jpeg;base64,")
    assert user["content"][1]["image_url"]["detail"] == "high"
    sent = Image.open(BytesIO(base64.b64decode(user["content"][1]["image_url"]["url"].partition(",")[2])))
    assert (sent.format, sent.size) == ("JPEG", (16, 8))
    assert answer.status == "ok" and server.keys == {"Bearer none"}
    wanted = {"temperature": 0.3, "codec": "jpeg", "quality": 80, "longest": 16, "model": "gpt-4.1", "detail": "high"}
    assert wanted.items() <= judge.identity.items()
    assert judge.codec.size(picture) == (16, 8)
    pinned: dict[str, Any] = {"codec": "jpeg:80", "longest": 16, "temperature": 0.3, "detail": "high"}
    assert endpoint(server, **pinned, concurrency=1, timeout=9.0, price_in=1, price_out=1).identity == judge.identity
    for other in ({"codec": "jpeg:81"}, {"codec": "png"}, {"longest": 32}, {"temperature": 0.0}, {"detail": "low"}):
        assert endpoint(server, **{**pinned, **other}).identity != judge.identity


def test_a_key_is_found_sent_and_written_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "key").write_text("sk-from-file\n")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-from-environment")
    with JudgeServer() as server:
        JudgeSession(endpoint(server), tmp_path / "j.jsonl").answers([question(1)])
        judge = endpoint(server, key_file=tmp_path / "key")
        JudgeSession(judge, tmp_path / "j.jsonl").answers([question(2)])
        assert server.keys == {"Bearer sk-from-environment", "Bearer sk-from-file"}
    assert "sk-" not in (tmp_path / "j.jsonl").read_text() and "sk-" not in json.dumps(judge.identity)
    with pytest.raises(UserError, match="key-file"):
        endpoint(server, key_file=tmp_path / "none").check()
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(UserError, match="OPENAI_API_KEY"):
        load_judge("openai:gpt-4.1").check()


def test_questions_go_out_side_by_side_and_no_more_than_told(tmp_path: Path) -> None:
    with JudgeServer(delay=0.1) as server:
        taken = []

        def some() -> Iterator[Question]:
            for n in range(12):
                taken.append(n)
                assert len(taken) - sum(server.answered.values()) <= 4 + 4  # pictures are not made far ahead
                yield question(n)

        JudgeSession(endpoint(server, concurrency=4), tmp_path / "j.jsonl").answers(some())
    assert 2 <= server.most <= 4


def test_no_item_is_asked_twice(tmp_path: Path) -> None:
    file = tmp_path / "j.jsonl"
    with JudgeServer({"item-2": ["words"], "item-3": ["refusal"], "item-4": ["400"]}, delay=0.02) as server:
        first = JudgeSession(endpoint(server), file).answers(question(n) for n in range(6))
        # another model made the very same picture: one answer for both, and a line for each
        twin = Question("other/1/SC", "SC", question(1).parts, Reads(2, 0, 10), system="You judge.", max_tokens=100)
        new = Question("other/7/SC", "SC", question(7).parts, Reads(2, 0, 10), system="You judge.", max_tokens=100)
        session = JudgeSession(endpoint(server), file)
        second = session.answers([*(question(n) for n in range(6)), twin, question(7), new])
    assert server.asked == {"item-0": 1, "item-1": 1, "item-2": 1, "item-3": 1, "item-4": 2, "item-5": 1, "item-7": 1}
    assert session.usage["asked"] == 2  # the one that had failed, and the new one
    assert second["other/1/SC"][0].numbers == right(1) and second["other/7/SC"][0].numbers == right(7)
    assert second["other/1/SC"][0].cost == 0.0
    assert [first[f"m/{n}/SC"][0].status for n in range(6)] == ["ok", "ok", "unparsable", "refused", "failed", "ok"]
    assert second["m/4/SC"][0].status == "ok"
    assert {row["key"] for row in rows(file)} >= {"other/1/SC", "other/7/SC"}


def test_whatever_could_change_an_answer_is_another_question(tmp_path: Path) -> None:
    def changed(**other: Any) -> Question:
        return replace(question(0), **other)

    white = Image.new("RGB", (32, 32), "white")
    others = [
        changed(parts=("Rate item-0 otherwise.", *question(0).parts[1:])),
        changed(parts=(question(0).parts[0], white, white)),
        changed(parts=(*question(0).parts[1:], question(0).parts[0])),
        changed(system="You judge well."),
        changed(max_tokens=101),
    ]
    with JudgeServer() as server, JudgeServer() as elsewhere:
        JudgeSession(endpoint(server), tmp_path / "j.jsonl").answers([question(0)])
        session = JudgeSession(endpoint(server), tmp_path / "j.jsonl")
        for other in others:
            assert session.estimate([other]).to_ask == 1
        same = changed(key="other/0/SC", aspect="PQ", facts={"place": "a.png"})
        assert session.estimate([same, question(0)]).recorded == 2
        assert JudgeSession(endpoint(elsewhere), tmp_path / "j.jsonl").estimate([question(0)]).to_ask == 1


def test_repeats_are_asked_apart_and_their_agreement_told(tmp_path: Path) -> None:
    with JudgeServer({"item-1": ["ok", "prose", "words"]}) as server:
        session = JudgeSession(endpoint(server, concurrency=1), tmp_path / "j.jsonl", repeats=3)
        answers = session.answers(question(n) for n in range(4))
        assert server.asked == {f"item-{n}": 3 for n in range(4)}
        again = JudgeSession(endpoint(server), tmp_path / "j.jsonl", repeats=3).answers(question(n) for n in range(4))
        assert sum(server.asked.values()) == 12
    assert [a.repeat for a in answers["m/2/SC"]] == [0, 1, 2]
    assert [a.status for a in answers["m/1/SC"]] == ["ok", "ok", "unparsable"]
    for key, held in answers.items():
        assert [a.numbers for a in again[key]] == [a.numbers for a in held]
    figures = session.agreement()["SC"]
    assert (figures["n"], figures["unread"], figures["exact"], figures["kappa"]) == (10, 2, 1.0, 1.0)


CHILD = """
import sys
sys.path[:0] = {paths!r}
from test_judges import load_judge, question, JudgeSession
judge = load_judge("openai:gpt-4.1@" + sys.argv[1], timeout=5.0, concurrency=3)
JudgeSession(judge, sys.argv[2]).answers(question(n) for n in range(24))
"""


def test_a_kill_in_the_middle_loses_nothing(tmp_path: Path) -> None:
    file = tmp_path / "j.jsonl"
    with JudgeServer(delay=0.1) as server:
        code = CHILD.format(paths=[str(TESTS), str(TESTS.parent / "helpers")])
        child = subprocess.Popen([sys.executable, "-c", code, server.url, str(file)])
        deadline = time.monotonic() + 60
        while sum(server.answered.values()) < 9 and time.monotonic() < deadline:
            time.sleep(0.02)
        whole = sum(server.answered.values())
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        kept = {row["key"]: row for row in rows(file)}
        assert whole - 3 <= len(kept) < 24  # each was on disk when it had come
        before = dict(server.asked)
        with open(file, "a") as opened:
            opened.write('{"hash": "cut in ha')  # what a kill within a write leaves
        server.delay = 0.0
        session = JudgeSession(endpoint(server), file)
        answers = session.answers(question(n) for n in range(24))
    assert all(answers[f"m/{n}/SC"][0].numbers == right(n) for n in range(24))
    for key in kept:  # what was on disk was not asked again
        name = f"item-{key.split('/')[1]}"
        assert server.asked[name] == before[name] == 1
    assert sum(server.asked.values()) <= 24 + 3  # only what was out when it died
    assert session.usage["asked"] == 24 - len(kept)
    assert '{"hash": "cut in ha' in file.read_text().splitlines()  # and what came after it is whole


def test_the_cost_cap_holds_and_a_raised_one_goes_on(tmp_path: Path) -> None:
    file = tmp_path / "j.jsonl"
    price: dict[str, Any] = {"price_in": 2.0, "price_out": 8.0, "concurrency": 8}
    with JudgeServer({"item-2": ["no-usage"], "item-3": ["reset"]}, delay=0.02) as server:
        each = endpoint(server, **price).quote(question(0))
        assert each.cost < each.at_most
        session = JudgeSession(endpoint(server, **price), file, max_cost=0.06)
        answers = session.answers(question(n) for n in range(50))
        spent = sum(row["cost"] for row in rows(file))
        asked = sum(server.asked.values())
        assert spent == pytest.approx(session.usage["spent"])
        assert 0.06 - each.at_most < spent <= 0.06
        assert asked < 50 and session.stopped is not None and "--max-cost 0.06" in session.stopped
        left = [held[0] for held in answers.values() if held[0].status == "missing"]
        assert len(left) == 50 - session.usage["asked"] and len(answers) == 50
        # the same cap again asks nothing, and what is recorded is still given
        again = JudgeSession(endpoint(server, **price), file, max_cost=0.06)
        assert [a[0].status for a in again.answers(question(n) for n in range(50)).values()] == [
            a[0].status for a in answers.values()
        ]
        assert sum(server.asked.values()) == asked
        more = JudgeSession(endpoint(server, **price), file, max_cost=10.0)
        done = more.answers(question(n) for n in range(50))
        assert more.stopped is None and all(a[0].status == "ok" for a in done.values())
        assert sum(server.asked.values()) == 51  # the reset one twice


def test_an_answer_dearer_than_estimated_tightens_the_reserve(tmp_path: Path) -> None:
    with JudgeServer(usage=(200_000, 100)) as server:  # many times the estimate
        judge = endpoint(server, price_in=2.0, price_out=8.0, concurrency=1)
        session = JudgeSession(judge, tmp_path / "j.jsonl", max_cost=1.5)
        session.answers(question(n) for n in range(20))
    assert session.usage["asked"] == 3 and session.usage["spent"] < 1.5


def test_a_price_that_is_not_known_cannot_be_capped(tmp_path: Path) -> None:
    with JudgeServer() as server:
        with pytest.raises(UserError, match="--price-in"):
            JudgeSession(endpoint(server), tmp_path / "j.jsonl", max_cost=1.0).answers([question(1)])
        assert not server.asked
        session = JudgeSession(endpoint(server), tmp_path / "j.jsonl")
        assert session.estimate([question(1)]).cost is None
        assert session.answers([question(1)])["m/1/SC"][0].cost is None
        assert session.usage["cost"] is None and session.usage["tokens_in"] == 1000


def test_an_estimate_asks_nothing(tmp_path: Path) -> None:
    with JudgeServer() as server:
        judge = endpoint(server, price_in=2.0, price_out=8.0)
        JudgeSession(judge, tmp_path / "j.jsonl").answers([question(1)])
        twin = Question("n/2/SC", "SC", question(2).parts, Reads(2, 0, 10), system="You judge.", max_tokens=100)
        before = (tmp_path / "j.jsonl").read_text()
        got = JudgeSession(judge, tmp_path / "j.jsonl").estimate([question(1), question(2), twin, question(3)])
        assert (got.questions, got.recorded, got.equal, got.to_ask) == (4, 1, 1, 2)
        assert got.cost == pytest.approx(2 * judge.quote(question(2)).cost)
        assert got.at_most > got.cost and got.tokens_in > 2 * 2 * 765
        to_come = [question(1), replace(question(1), key="n/1/SC")]  # no image is equal to one that is not there yet
        more = JudgeSession(judge, tmp_path / "j.jsonl").estimate([question(1)], to_come)
        assert (more.questions, more.recorded, more.equal, more.to_ask) == (3, 1, 0, 2)
        assert sum(server.asked.values()) == 1 and (tmp_path / "j.jsonl").read_text() == before


@pytest.mark.parametrize(("step", "word"), [("401", "Incorrect API key"), ("quota", "no money left")])
def test_what_cannot_work_ends_the_run_and_keeps_what_came(tmp_path: Path, step: str, word: str) -> None:
    with JudgeServer({f"item-{n}": [step] for n in range(5, 40)}, delay=0.02) as server:
        with pytest.raises(UserError, match=word):
            JudgeSession(endpoint(server, concurrency=3), tmp_path / "j.jsonl").answers(question(n) for n in range(40))
        assert sum(server.asked.values()) <= 5 + 3 + 3
    assert len(rows(tmp_path / "j.jsonl")) == 5


def test_a_server_that_is_gone_ends_the_run(tmp_path: Path) -> None:
    with JudgeServer() as server:
        url = server.url
    judge = load_judge(f"openai:x@{url}", tries=1, concurrency=2)
    with pytest.raises(UserError, match="12 times in a row"):
        JudgeSession(judge, tmp_path / "j.jsonl").answers(question(n) for n in range(100))
    assert 12 <= len(rows(tmp_path / "j.jsonl")) <= 14


def test_one_file_is_for_one_process(tmp_path: Path) -> None:
    with JudgeServer() as server:

        def questions() -> Iterator[Question]:
            with pytest.raises(UserError, match="in use"):
                JudgeSession(endpoint(server), tmp_path / "j.jsonl").answers([question(2)])
            yield question(1)

        assert JudgeSession(endpoint(server), tmp_path / "j.jsonl").answers(questions())["m/1/SC"][0].status == "ok"


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        ("gpt-4.1", {}, "openai:"),
        ("opnai:gpt-4.1", {}, "did you mean 'openai'"),
        ("openai:", {}, "nothing follows"),
        ("openai:m@http://h/v1", {"batch": 3}, "--judge-batch"),
        ("openai:m@http://h/v1", {"codec": "webp"}, "jpeg:QUALITY"),
        ("openai:m@http://h/v1", {"concurrency": 0}, "above zero"),
        ("cmd:no-such-program-here", {}, "program no-such-program-here is not found"),
        ("cmd:API_KEY=mine python j.py", {}, r"program API_KEY=\*\*\* is not found"),
        ("replay:nowhere.jsonl", {}, "does not exist"),
    ],
)
def test_a_judge_that_is_not_understood_is_refused_in_a_sentence(text: str, options: dict, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        load_judge(text, **options)
    assert "\n" not in str(caught.value)


def test_without_the_package_one_sentence_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UserError, match=r"danceopd\[bench\]"):
        load_judge("openai:m@http://h/v1").check()


def test_naming_a_judge_loads_neither_torch_nor_the_client() -> None:
    code = (
        "import sys; from danceopd.bench.judges.registry import load_judge; load_judge('openai:m@http://h/v1'); "
        "assert not {'torch', 'openai', 'transformers'} & set(sys.modules), 'loaded'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
