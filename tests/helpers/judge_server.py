"""A local HTTP server with the OpenAI protocol, whose failures are scripted, for the tests of judges.

An answer depends on the images that were sent: its first number is the red of the last image's corner over 25, the
second its green, so a correct score proves that the correct image arrived. A question has the word `item-N` in its
text; `plan[name]` lists what happens to its requests, in order, then "ok".
"""

from __future__ import annotations

import base64
import json
import re
import socket
import struct
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from typing import Any

from PIL import Image

MODEL = "judge-2025-04-14"
BODIES = {
    "null choice": '{"choices": [null]}',
    "null message": '{"choices": [{"message": null, "finish_reason": "stop"}]}',
    "no message": '{"choices": [{"finish_reason": "stop"}]}',
    "number": '{"choices": [{"message": {"content": 5}}], "usage": [1], "model": ["x"]}',
    "word": '{"choices": "abc"}',
    "deep": "[" * 100_000 + "]" * 100_000,
    "list": "[1, 2]",
}
"""Replies that are JSON and not the protocol."""
USAGES = {
    "usage words": {"prompt_tokens": "many", "completion_tokens": None},
    "usage nan": {"prompt_tokens": float("nan"), "completion_tokens": 5},
    "usage negative": {"prompt_tokens": -(10**9), "completion_tokens": -5},
}


class JudgeServer(ThreadingHTTPServer):
    """`with JudgeServer() as server:` serves in threads; `asked` counts requests, `answered` complete answers."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(
        self, plan: dict[str, list[str]] | None = None, delay: float = 0.0, usage: tuple[int, int] = (1000, 100)
    ) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.plan = {name: list(steps) for name, steps in (plan or {}).items()}
        self.delay, self.usage = delay, usage
        self.asked: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        self.paths: list[str] = []
        self.times: dict[str, list[float]] = {}
        self.out = self.most = 0
        self.guard = threading.Lock()
        self.over = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"

    def __enter__(self) -> JudgeServer:
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.over.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are part of the tests."""


class Handler(BaseHTTPRequestHandler):
    server: JudgeServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_POST(self) -> None:  # noqa: N802 - the library's name
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        content = body["messages"][-1]["content"]
        text = " ".join(part["text"] for part in content if part["type"] == "text")
        name = re.search(r"item-\w+", text)[0]  # type: ignore[index]
        with server.guard:
            server.asked[name] += 1
            server.times.setdefault(name, []).append(time.monotonic())
            server.bodies.append(body)
            server.keys.add(self.headers["Authorization"])
            server.paths.append(self.path)
            step = server.plan[name].pop(0) if server.plan.get(name) else "ok"
            server.out += 1
            server.most = max(server.most, server.out)
        try:
            server.over.wait(server.delay)
            self.answer(step, name, content)
        finally:
            with server.guard:
                server.out -= 1

    def answer(self, step: str, name: str, content: list[dict[str, Any]]) -> None:
        if step == "429":
            return self.send(429, {"error": {"message": "slow down"}}, {"Retry-After": "0.2"})
        if step == "quota":
            return self.send(429, {"error": {"message": "no money left", "code": "insufficient_quota"}})
        if step == "500":
            return self.send(500, {"error": {"message": "oops"}})
        if step == "400":
            return self.send(400, {"error": {"message": "too large"}})
        if step == "long":
            why = "The decoder prompt (length 60025) is longer than the maximum model length of 32768."
            return self.send(400, {"object": "error", "message": why, "type": "BadRequestError", "code": 400})
        if step == "401 with the key":
            return self.send(401, {"error": {"message": "Incorrect API key sk-in-url of user:sk-in-url."}})
        if step == "401":
            return self.send(401, {"error": {"message": "Incorrect API key provided."}})
        if step == "filter400":
            return self.send(400, {"error": {"message": "flagged", "code": "content_filter"}})
        if step == "hang":
            self.server.over.wait(30)
            return None
        if step == "drip":
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", "1000")
            self.end_headers()
            while not self.server.over.wait(0.05):
                self.wfile.write(b" ")
                self.wfile.flush()
            return None
        if step == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            return None
        if step == "nothing":
            return self.send(200, {"id": "x", "object": "chat.completion", "model": MODEL, "choices": []})
        if step in BODIES:
            return self.send(200, BODIES[step])
        text, finish, refusal = self.reply_text(step, content)
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": refusal}
        if step == "parts":
            message["content"] = [{"type": "thinking", "thinking": "[1, 2]"}, {"type": "text", "text": text}]
        reply: dict[str, Any] = {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": MODEL,
            "choices": [{"index": 0, "finish_reason": finish, "message": message}],
            "usage": {
                "prompt_tokens": self.server.usage[0],
                "completion_tokens": self.server.usage[1],
                "total_tokens": sum(self.server.usage),
            },
        }
        if step == "no-usage":
            del reply["usage"]
        if step in USAGES:
            reply["usage"] = USAGES[step]
        if step == "half":  # half a body: valid HTTP, broken JSON
            return self.send(200, json.dumps(reply)[:60])
        with self.server.guard:
            self.server.answered[name] += 1
        return self.send(200, reply)

    def reply_text(self, step: str, content: list[dict[str, Any]]) -> tuple[str | None, str, str | None]:
        """(content, finish reason, refusal) of a complete answer."""
        images = [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
        image = Image.open(BytesIO(base64.b64decode(images[-1].partition(",")[2]))).convert("RGB")
        red, green, _ = image.getpixel((0, 0))  # type: ignore[misc]
        numbers = [red // 25, green // 25]
        right = json.dumps({"score": numbers, "reasoning": "as seen"})
        return {
            "prose": (f"Here is what I think:\n{right}\nI hope this helps.", "stop", None),
            "fence": (f"```json\n{right}\n```", "stop", None),
            "one": (str(numbers[0]), "stop", None),
            "range": (json.dumps({"score": [11, numbers[1]]}), "stop", None),
            "cut": ('{"score": [' + f"{numbers[0]}, ", "length", None),
            "words": ("It looks fairly good to me.", "stop", None),
            "refusal": (None, "stop", "I can't look at this."),
            "filter": ("", "content_filter", None),
            "sorry": ("I'm sorry, but I can't assist with that.", "stop", None),
            "empty": ("", "length", None),
            "draft": (f"The hat is missing. {right} But", "length", None),
            "thought": (f"<think>{right} But", "stop", None),
            "half character": (f'{{"reasoning": "a\ud800\u2028b", "score": {numbers}}}', "stop", None),
            "digits": ('{"score": [' + "9" * 5000 + ", 1]}", "stop", None),
            "brackets": ("[" * 60_000, "stop", None),
        }.get(step, (right, "stop", None))

    def send(self, status: int, body: dict[str, Any] | str, headers: dict[str, str] | None = None) -> None:
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(data)
