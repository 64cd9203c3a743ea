"""A judge behind an OpenAI-compatible endpoint.

Several questions are asked at once, each with its own deadline. What may work later (no connection, a timeout, half an
answer, 408, 409, 429, 5xx) is retried after an exponential backoff with jitter, or after the wait that the server asks
for, which then holds for all questions. What cannot work (no access, no such model) ends the run with one sentence. A
request that was sent and got no answer may have been billed: it is counted at its estimated price.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import threading
import time
from collections.abc import Coroutine, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from danceopd.bench.judges.cost import (
    OPENAI_HOST,
    OVERHEAD,
    TYPICAL_OUT,
    TYPICAL_THINKING,
    Codec,
    image_tokens,
    prices_of,
    text_tokens,
)
from danceopd.bench.judges.parse import read
from danceopd.bench.judges.protocol import Answer, Question, Quote, Status
from danceopd.bench.judges.wire import Address, Reply, read_reply
from danceopd.data.images import picture
from danceopd.errors import UserError

DEFAULT_URL = f"https://{OPENAI_HOST}/v1"
FILTERED = re.compile(r"content[_ ]?(?:filter|policy)|responsible_?ai|moderation|safety", re.I)
TOO_LONG = re.compile(r"context (?:length|window|size)|model length|too (?:long|large|many)|token limit", re.I)
MAX_BODY = 1 << 24  # bytes of a reply, once it is unpacked
NO_KEY = "none"  # a local server needs no key, but the client insists on one
SHORTEST_KEY = 5
SMALLER = "send smaller images with --judge-longest 768"
THINKING = 8000  # tokens that a reasoning model may spend before its answer
MAX_LOST = 2  # how often a request may be sent and get no whole answer, before its question has failed
MAX_WAIT = 60.0  # seconds; a server may ask for twice that
RATE_LIMIT_FACTOR = 5  # a rate limit that says how long it holds may reject a question so many times ``tries``
MAX_FAILURES = 12  # failed questions in a row after which the endpoint counts as down


class EndpointJudge:
    """``model`` at ``url``; ``temperature`` None is not sent. Times in seconds, prices in dollars per million tokens.

    ``thinking``: tokens that may be spent before an answer, besides those of the answer; None: `THINKING` for known
    reasoning models, else 0. They are priced as output tokens.
    """

    sees = ()
    deterministic = False

    def __init__(
        self,
        model: str,
        url: str | None = None,
        *,
        temperature: float | None = 0.0,
        codec: str = "png",
        longest: int | None = None,
        detail: str | None = None,
        key_file: str | Path | None = None,
        concurrency: int = 8,
        timeout: float = 120.0,
        tries: int = 7,
        first_wait: float = 1.0,
        price_in: float | None = None,
        price_out: float | None = None,
        thinking: int | None = None,
    ) -> None:
        if not model:
            raise UserError("--judge openai: names no model; write openai:MODEL@URL, such as openai:gpt-4.1-2025-04-14")
        if concurrency < 1 or tries < 1 or not timeout > 0:
            raise UserError("--judge-concurrency, --judge-timeout and the judge's tries must be above zero")
        self.model = model
        self.address = Address.parse(url or os.environ.get("OPENAI_BASE_URL") or DEFAULT_URL)
        self.url, self.secrets = self.address.shown, self.address.secrets
        self.codec = Codec.parse(codec, longest)
        self.temperature, self.detail, self.key_file = temperature, detail, key_file
        self.concurrency, self.timeout, self.tries, self.first_wait = concurrency, timeout, tries, first_wait
        self.prices = prices_of(model, self.url, price_in, price_out)
        self.thinks = bool(re.match(r"(?:gpt-5|o\d)", model)) and self.address.name == OPENAI_HOST
        if self.thinks:
            self.temperature = None  # these models refuse one
        if thinking is not None and thinking < 0:
            raise UserError(f"--judge-thinking is {thinking}; give 0 or more tokens")
        self.thinking = thinking if thinking is not None else THINKING if self.thinks else 0
        self.identity: dict[str, Any] = {
            "kind": "openai",
            "model": model,
            "host": self.address.host,
            "temperature": self.temperature,
            "detail": detail,
            **self.codec.identity,
            **({"thinking": self.thinking} if self.thinking else {}),
        }

    @property
    def name(self) -> str:
        return self.model

    def check(self) -> None:
        """UserError without the package or the key."""
        _package()
        self._key()

    def quote(self, question: Question) -> Quote:
        tokens_in = text_tokens(question.text) + OVERHEAD
        for part in question.parts:
            if not isinstance(part, str):
                tokens_in += image_tokens(*self.codec.size(picture(part)), self.model)
        expected = min(TYPICAL_OUT, question.max_tokens) + min(TYPICAL_THINKING, self.thinking)
        if self.prices is None:
            return Quote(tokens_in, expected, None, None)
        at_most = self.prices.cost(tokens_in, question.max_tokens + self.thinking)
        return Quote(tokens_in, expected, self.prices.cost(tokens_in, expected), at_most * (1 + MAX_LOST))

    def ask(self, questions: Iterable[Question]) -> Generator[Answer, None, None]:
        source, waiting = iter(questions), set[Future[Answer]]()
        wrong: BaseException | None = None
        in_a_row = 0
        with _Client(self) as client:
            while True:
                while wrong is None and len(waiting) < self.concurrency:
                    if (question := next(source, None)) is None:
                        break
                    waiting.add(client.start(question))
                if not waiting:
                    break
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    if error := future.exception():
                        wrong = wrong or error  # the other answers are paid for: take them before stopping
                        continue
                    answer = future.result()
                    in_a_row = in_a_row + 1 if answer.status == "failed" else 0
                    if in_a_row >= MAX_FAILURES:
                        wrong = wrong or UserError(
                            f"judge {self.name} at {self.url} failed {in_a_row} times in a row ({answer.text}); mend "
                            "that and run the same command again: the answers so far are kept"
                        )
                    yield answer
        if wrong is not None:
            raise wrong

    def _key(self) -> str:
        if self.key_file is not None:
            try:
                key = Path(self.key_file).expanduser().read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"--judge-key-file {self.key_file} is unreadable ({error}); give a text file") from None
            if not key:
                raise UserError(f"--judge-key-file {self.key_file} is empty; write the API key into it")
            return key
        if key := os.environ.get("OPENAI_API_KEY", "").strip():
            return key
        if self.address.name == OPENAI_HOST:
            raise UserError(f"judge {self.name} needs an API key; set OPENAI_API_KEY or give --judge-key-file")
        return NO_KEY

    def without_keys(self, text: str) -> str:
        """A text of the server or the client as one line, without the keys that it may repeat."""
        for secret in self.secrets:
            if len(secret) >= SHORTEST_KEY:  # a shorter one stands in many a word
                text = text.replace(secret, "***")
        return " ".join(text.split())


@dataclass
class _Attempts:
    """The attempts at one question so far."""

    began: float
    count: int = 0
    limited: int = 0  # of these, rejected by a rate limit
    lost: int = 0  # of these, sent without getting a whole answer
    why: str = ""


class _Client:
    """The openai client on an event loop in its own thread; leaving it cancels the open requests."""

    def __init__(self, judge: EndpointJudge) -> None:
        self.judge = judge
        self.openai = _package()
        self.key = judge._key()
        judge.secrets += (self.key,)
        self.not_before = 0.0  # monotonic seconds: a pause that the server asked for holds for all questions

    def __enter__(self) -> _Client:
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True, name="judge")
        self.thread.start()
        self.client = self._do(self._connect()).result()
        return self

    def __exit__(self, *_: Any) -> None:
        self._do(self._close()).result(timeout=10)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(timeout=10)
        self.loop.close()

    def start(self, question: Question) -> Future[Answer]:
        """Send a question; its images are encoded here, so that the event loop never waits for that."""
        judge = self.judge
        content: list[dict[str, Any]] = []
        for part in question.parts:
            if isinstance(part, str):
                content.append({"type": "text", "text": part})
            else:
                address = {"url": judge.codec.data_url(picture(part))}
                if judge.detail:
                    address["detail"] = judge.detail
                content.append({"type": "image_url", "image_url": address})
        messages: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if question.system:
            messages.insert(0, {"role": "system", "content": question.system})
        body: dict[str, Any] = {"model": judge.model, "messages": messages}
        body["max_completion_tokens" if judge.thinks else "max_tokens"] = (
            question.max_tokens + judge.thinking
        )
        if judge.temperature is not None:
            body["temperature"] = judge.temperature
        return self._do(self._answer(question, body))

    def _do(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    async def _connect(self) -> Any:
        # retries and deadlines are done here: the client's own neither count attempts nor stop a slow drip of bytes
        judge = self.judge
        return self.openai.AsyncOpenAI(
            api_key=self.key,
            base_url=judge.address.client,
            default_query=judge.address.query,
            max_retries=0,
            timeout=judge.timeout,
        )

    async def _close(self) -> None:
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self.client.close()

    async def _reply(self, body: dict[str, Any]) -> str:
        """The text of the reply to a request; ValueError for half a reply, and for one that does not end."""
        content = bytearray()
        async with self.client.chat.completions.with_streaming_response.create(**body) as response:
            try:
                async for part in response.iter_bytes():
                    content += part
                    if len(content) > MAX_BODY:
                        raise ValueError(f"more than {MAX_BODY >> 20} MiB")
            except Exception as error:  # of the client's transport, whichever it is built on
                raise ValueError(f"half an answer: {error or type(error).__name__}") from None
        return content.decode("utf-8", "replace")

    async def _answer(self, question: Question, body: dict[str, Any]) -> Answer:
        tried = _Attempts(time.monotonic())
        while True:
            await asyncio.sleep(max(0.0, self.not_before - time.monotonic()))
            tried.count += 1
            pause: float | None = None
            try:
                reply = read_reply(await asyncio.wait_for(self._reply(body), self.judge.timeout))
                if isinstance(reply, Reply):
                    return self._parsed(question, reply, tried)
                tried.why = reply
                tried.lost += 1
            except self.openai.APIStatusError as error:
                if refused := self._refused(question, error, tried):
                    return refused
                tried.why = f"HTTP {error.status_code}: {error.message[:300]}"
                if error.status_code == 400 and TOO_LONG.search(error.message):
                    tried.why += f"; {SMALLER}"
                pause = _retry_after(error.response.headers)
                tried.limited += error.status_code == 429 and pause is not None
                if error.status_code not in (408, 409, 429) and error.status_code < 500:
                    return self._ended(question, "failed", tried)
            except (self.openai.APIError, ValueError, asyncio.TimeoutError) as error:
                # no connection, a timeout, or half an answer; what was sent may be billed
                late = isinstance(error, (asyncio.TimeoutError, self.openai.APITimeoutError))
                fault = f"{type(error).__name__}: {error}"[:200]
                tried.why = f"no answer in {self.judge.timeout:g} s" if late else fault
                tried.lost += 1
            tries = self.judge.tries
            spent = tried.count - tried.limited >= tries or tried.limited >= RATE_LIMIT_FACTOR * tries
            if spent or tried.lost > MAX_LOST or (pause or 0.0) > 2 * MAX_WAIT:
                return self._ended(question, "failed", tried)
            if pause is not None:
                self.not_before = max(self.not_before, time.monotonic() + pause)
            longest = min(MAX_WAIT, self.judge.first_wait * 2 ** (tried.count - 1))
            await asyncio.sleep(
                longest * random.uniform(0.5, 1.0) if pause is None else pause * random.uniform(1.0, 1.1)
            )

    def _parsed(self, question: Question, reply: Reply, tried: _Attempts) -> Answer:
        text, got = reply.text, read(reply.text, question.reads, reply.cut)
        if reply.refusal:
            got, text = replace(got, status="refused", numbers=None, choice=None), reply.refusal
        elif reply.finish == "content_filter":
            got, text = replace(got, status="refused", numbers=None, choice=None), text or "content_filter"
        elif not text.strip():
            text = f"(empty answer; it ended by {reply.finish or 'nothing that it named'})"
        if reply.cut and got.status != "ok" and 0 < reply.tokens_out < question.max_tokens + self.judge.thinking:
            got = replace(got, reasoning=f"cut off after {reply.tokens_out} tokens, for its context is full; {SMALLER}")
        spent = self._ended(question, got.status, tried, text=text, usage=(reply.tokens_in, reply.tokens_out))
        judge = self.judge.without_keys(reply.model) or self.judge.model
        found = replace(spent, numbers=got.numbers, choice=got.choice, reasoning=got.reasoning)
        return replace(found, judge=judge, cut=reply.cut)

    def _refused(self, question: Question, error: Any, tried: _Attempts) -> Answer | None:
        """The answer to a refusal, None for other errors; UserError where no question could ever be answered."""
        if error.status_code in (400, 403) and FILTERED.search(f"{error.code} {error.message}"):
            return self._ended(question, "refused", tried, text=self.judge.without_keys(error.message))
        if error.status_code in (401, 403, 404) or error.code == "insufficient_quota":
            why = self.judge.without_keys(error.message)[:200].rstrip(".")
            raise UserError(
                f"judge {self.judge.name} at {self.judge.url} cannot be asked (HTTP {error.status_code}, {why}); "
                "check the key, the model's name and the account, then run the same command again"
            ) from None
        return None

    def _ended(
        self,
        question: Question,
        status: Status,
        tried: _Attempts,
        text: str | None = None,
        usage: tuple[int, int] | None = None,
    ) -> Answer:
        """An answer with its attempts and price. ``usage``: tokens in and out, None: no answer came; without counts the
        estimate counts."""
        prices, quote = self.judge.prices, self.judge.quote(question)
        tokens_in, tokens_out = usage or (0, 0)
        lost = tried.lost + (usage is not None and not tokens_in)
        cost = None
        if prices is not None:
            at_most = (quote.at_most or 0.0) / (1 + MAX_LOST)  # of one attempt
            cost = prices.cost(tokens_in, tokens_out) + lost * at_most
        return Answer(
            question.key,
            status,
            text=self.judge.without_keys(tried.why) if text is None else text,
            attempts=tried.count,
            tokens_in=tokens_in,
            tokens_out=tokens_out,
            cost=cost,
            seconds=round(time.monotonic() - tried.began, 3),
            judge=self.judge.model,
            repeat=question.repeat,
        )


def _retry_after(headers: Any) -> float | None:
    """Seconds that a server asks to wait; None where it does not say, or names a date."""
    for header, divisor in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(header, "")) / divisor
        except ValueError:
            continue
        if seconds >= 0:
            return seconds
    return None


def _package() -> Any:
    try:
        import openai
    except ImportError:
        raise UserError('an openai: judge needs the package openai; run `pip install "danceopd[bench]"`') from None
    return openai
