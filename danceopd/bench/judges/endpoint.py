"""A judge behind an OpenAI-compatible endpoint.

Questions go out side by side, each with a deadline of its own. What may work the next time (no connection, no answer
in time, half an answer, 408, 409, 429, 5xx) is tried again after a wait that doubles and is drawn from its upper half,
or that the server names, which then holds for all; what cannot work (no access, no such model) ends the run with one
sentence. An attempt that was sent and lost may have been billed: it is counted at its estimated price.
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
from urllib.parse import urlsplit

from danceopd.bench.judges.codec import Codec
from danceopd.bench.judges.cost import (
    OPENAI_HOST,
    OVERHEAD,
    TYPICAL_OUT,
    TYPICAL_THOUGHT,
    picture_tokens,
    prices_of,
    text_tokens,
)
from danceopd.bench.judges.question import Answer, Question, Quote, Status
from danceopd.bench.judges.reading import read
from danceopd.bench.suites import picture
from danceopd.errors import UserError

DEFAULT_URL = f"https://{OPENAI_HOST}/v1"
FILTERED = re.compile(r"content[_ ]?(?:filter|policy)|responsible_?ai|moderation|safety", re.I)
THINKING = 8000  # tokens that a model known to think may spend before its answer
LOST = 2  # how often a question may be sent and its answer lost, before it has failed
LONGEST_WAIT = 60.0  # seconds; a server may ask for twice that
PATIENCE = 5  # how many times more often than ``tries`` a rate limit may turn a question away
HOPELESS = 12  # failures in a row after which the endpoint is taken to be down


class Endpoint:
    """``model`` at ``url``; ``temperature`` None is not sent. Times in seconds, prices in dollars a million tokens.

    ``thinking`` tokens may be spent before an answer, beside those of the answer itself; None: `THINKING` where the
    model is known to think. Their price is that of written tokens.
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
            raise UserError("the judge has no model; write openai:MODEL@URL, as openai:gpt-4.1-2025-04-14")
        if concurrency < 1 or tries < 1 or not timeout > 0:
            raise UserError("the judge's concurrency, tries and timeout must be above zero")
        self.model = model
        self.url = (url or os.environ.get("OPENAI_BASE_URL") or DEFAULT_URL).rstrip("/")
        self.codec = Codec.named(codec, longest)
        self.temperature, self.detail, self.key_file = temperature, detail, key_file
        self.concurrency, self.timeout, self.tries, self.first_wait = concurrency, timeout, tries, first_wait
        self.prices = prices_of(model, self.url, price_in, price_out)
        self.thinks = bool(re.match(r"(?:gpt-5|o\d)", model)) and urlsplit(self.url).hostname == OPENAI_HOST
        if self.thinks:
            self.temperature = None  # these models refuse one
        if thinking is not None and thinking < 0:
            raise UserError(f"--judge-thinking is {thinking}; give 0 or more tokens")
        self.thinking = thinking if thinking is not None else THINKING if self.thinks else 0
        self.identity: dict[str, Any] = {
            "kind": "openai",
            "model": model,
            "host": urlsplit(self.url).netloc.rpartition("@")[2] + urlsplit(self.url).path,
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
                tokens_in += picture_tokens(*self.codec.size(picture(part)))
        expected = min(TYPICAL_OUT, question.max_tokens) + min(TYPICAL_THOUGHT, self.thinking)
        if self.prices is None:
            return Quote(tokens_in, expected, None, None)
        at_most = self.prices.cost(tokens_in, question.max_tokens + self.thinking)
        return Quote(tokens_in, expected, self.prices.cost(tokens_in, expected), at_most * (1 + LOST))

    def ask(self, questions: Iterable[Question]) -> Generator[Answer, None, None]:
        source, waiting = iter(questions), set[Future[Answer]]()
        wrong: BaseException | None = None
        in_a_row = 0
        with _Loop(self) as loop:
            while True:
                while wrong is None and len(waiting) < self.concurrency:
                    if (question := next(source, None)) is None:
                        break
                    waiting.add(loop.start(question))
                if not waiting:
                    break
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    if error := future.exception():
                        wrong = wrong or error  # the others are paid for: take them before stopping
                        continue
                    answer = future.result()
                    in_a_row = in_a_row + 1 if answer.status == "failed" else 0
                    if in_a_row >= HOPELESS:
                        wrong = wrong or UserError(
                            f"judge {self.name} at {self.url} failed {in_a_row} times in a row ({answer.text}); the "
                            "answers so far are kept: run the same command again when it is back"
                        )
                    yield answer
        if wrong is not None:
            raise wrong

    def _key(self) -> str:
        if self.key_file is not None:
            try:
                key = Path(self.key_file).expanduser().read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"--judge-key-file {self.key_file} cannot be read ({error}); mend that") from None
            if not key:
                raise UserError(f"--judge-key-file {self.key_file} is empty; write the key into it")
            return key
        if key := os.environ.get("OPENAI_API_KEY", "").strip():
            return key
        if urlsplit(self.url).hostname == OPENAI_HOST:
            raise UserError(f"judge {self.name} needs a key; set OPENAI_API_KEY or give --judge-key-file")
        return "none"  # a local server asks for no key, and the client insists on one


@dataclass
class _Tally:
    """The attempts at one question so far."""

    began: float
    attempts: int = 0
    limited: int = 0  # of these, turned away by a rate limit
    lost: int = 0  # sent, and no whole answer came back
    why: str = ""


class _Loop:
    """An event loop in a thread of its own, with the client; leaving it cancels what is still out."""

    def __init__(self, judge: Endpoint) -> None:
        self.judge = judge
        self.openai = _package()
        self.key = judge._key()
        self.not_before = 0.0  # monotonic seconds: a server that asked for a pause gets it from all

    def __enter__(self) -> _Loop:
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
        """Sends a question off; its pictures are encoded here, so that the loop never waits for that."""
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
        # retries and deadlines are kept here: the client's own count neither attempts nor a server that drips
        judge = self.judge
        return self.openai.AsyncOpenAI(api_key=self.key, base_url=judge.url, max_retries=0, timeout=judge.timeout)

    async def _close(self) -> None:
        others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self.client.close()

    async def _answer(self, question: Question, body: dict[str, Any]) -> Answer:
        tally = _Tally(time.monotonic())
        while True:
            await asyncio.sleep(max(0.0, self.not_before - time.monotonic()))
            tally.attempts += 1
            pause: float | None = None
            try:
                reply = await asyncio.wait_for(self.client.chat.completions.create(**body), self.judge.timeout)
                if getattr(reply, "choices", None):
                    return self._read(question, reply, tally)
                tally.why = f"an answer without choices: {str(getattr(reply, 'error', reply))[:200]}"
                tally.lost += 1
            except self.openai.APIStatusError as error:
                if refused := self._refused(question, error, tally):
                    return refused
                tally.why = f"HTTP {error.status_code}: {error.message[:200]}"
                pause = _retry_after(error.response.headers)
                tally.limited += error.status_code == 429
                if error.status_code not in (408, 409, 429) and error.status_code < 500:
                    return self._ended(question, "failed", tally)
            except (self.openai.APIError, ValueError, asyncio.TimeoutError) as error:
                # no connection, no answer in time, or one that is not whole; what was sent may be billed
                late = isinstance(error, (asyncio.TimeoutError, self.openai.APITimeoutError))
                fault = " ".join(f"{type(error).__name__}: {error}".split())[:200]
                tally.why = f"no answer in {self.judge.timeout:g} s" if late else fault
                tally.lost += 1
            worn = tally.attempts - tally.limited >= self.judge.tries or tally.limited >= PATIENCE * self.judge.tries
            if worn or tally.lost > LOST or (pause or 0.0) > 2 * LONGEST_WAIT:
                return self._ended(question, "failed", tally)
            if pause is not None:
                self.not_before = max(self.not_before, time.monotonic() + pause)
            longest = min(LONGEST_WAIT, self.judge.first_wait * 2 ** (tally.attempts - 1))
            await asyncio.sleep(
                longest * random.uniform(0.5, 1.0) if pause is None else pause * random.uniform(1.0, 1.1)
            )

    def _read(self, question: Question, reply: Any, tally: _Tally) -> Answer:
        choice, message = reply.choices[0], reply.choices[0].message
        text = message.content if isinstance(message.content, str) else ""
        got = read(text, question.reads)
        if getattr(message, "refusal", None):
            got, text = replace(got, status="refused", numbers=None, choice=None), message.refusal
        elif choice.finish_reason == "content_filter":
            got, text = replace(got, status="refused", numbers=None, choice=None), text or "content_filter"
        elif not text.strip():
            text = f"(nothing was said; the answer ended by {choice.finish_reason})"
        spent = self._ended(question, got.status, tally, text=text, usage=getattr(reply, "usage", None) or 0)
        judge = reply.model if isinstance(reply.model, str) and reply.model else self.judge.model
        return replace(spent, numbers=got.numbers, choice=got.choice, reasoning=got.reasoning, judge=judge)

    def _refused(self, question: Question, error: Any, tally: _Tally) -> Answer | None:
        """A refusal as an answer; UserError where no question can ever be answered."""
        if error.status_code in (400, 403) and FILTERED.search(f"{error.code} {error.message}"):
            return self._ended(question, "refused", tally, text=error.message)
        if error.status_code in (401, 403, 404) or error.code == "insufficient_quota":
            why = " ".join(error.message.split())[:200].rstrip(".")
            raise UserError(
                f"judge {self.judge.name} at {self.judge.url} cannot be asked (HTTP {error.status_code}, {why}); mend "
                "the key, the name of the model or the account, and run the same command again"
            ) from None
        return None

    def _ended(
        self, question: Question, status: Status, tally: _Tally, text: str | None = None, usage: Any = None
    ) -> Answer:
        """The answer with what it took. ``usage`` None: no answer came; without counts the estimate is taken."""
        prices, quote = self.judge.prices, self.judge.quote(question)
        tokens_in = getattr(usage, "prompt_tokens", None) or 0
        tokens_out = getattr(usage, "completion_tokens", None) or 0
        lost = tally.lost + (usage is not None and not tokens_in)
        cost = None
        if prices is not None:
            at_most = (quote.at_most or 0.0) / (1 + LOST)  # of one attempt
            cost = prices.cost(tokens_in, tokens_out) + lost * at_most
        return Answer(
            question.key,
            status,
            text=tally.why if text is None else text,
            attempts=tally.attempts,
            tokens_in=tokens_in,
            tokens_out=tokens_out,
            cost=cost,
            seconds=round(time.monotonic() - tally.began, 3),
            judge=self.judge.model,
            repeat=question.repeat,
        )


def _retry_after(headers: Any) -> float | None:
    """Seconds that a server asks to wait, None where it does not say (or gives a date: the usual wait then does)."""
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
        raise UserError('an openai: judge needs the package openai; pip install "danceopd[bench]"') from None
    return openai
