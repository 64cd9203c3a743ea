"""A page in a real browser, as a reader opens it: the network is forbidden, every request and complaint is kept."""

from __future__ import annotations

import shutil
from pathlib import Path

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


class Page:
    """A page, every request it made, and every complaint in its console."""

    def __init__(self, browser, file: Path, **context) -> None:
        self.page = browser.new_page(**({"viewport": {"width": 1200, "height": 900}} | context))
        self.page.set_default_timeout(60_000)
        self.file, self.requests, self.complaints = file, [], []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.context.set_offline(True)
        self.page.goto(file.as_uri())

    def check(self) -> None:
        """It asked for nothing but itself, and nothing complained."""
        asked = {url.split("#")[0] for url in self.requests if not url.startswith("data:")}
        assert asked == {self.file.as_uri()}
        assert self.complaints == []
