"""The page of `danceopd ui` in a real browser, where Gradio is installed (the test extra has it not)."""

from __future__ import annotations

from pathlib import Path

import pytest
from browser import BROWSER, FLAGS
from tiny_merge import run, tiny_recipe

pytest.importorskip("gradio", reason="Gradio is not installed (pip install 'danceopd[ui]')")


@pytest.fixture(scope="module")
def address(models: Path, tmp_path_factory: pytest.TempPathFactory):
    from danceopd.cli.ui.page import launch, page

    folder = tmp_path_factory.mktemp("page") / "student"
    run(tiny_recipe(models, folder, steps=1, samples={"every": 1, "count": 1}))
    made = page([folder])
    yield launch(made, None, "127.0.0.1", [folder])
    made.close(verbose=False)


@pytest.fixture(scope="module")
def browser():
    if BROWSER is None:
        pytest.skip("no chromium on this machine")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        yield play.chromium.launch(executable_path=BROWSER, args=FLAGS)


@pytest.mark.parametrize("width", [390, 1280])
def test_a_student_is_tried(browser, address: str, width: int) -> None:
    seen = browser.new_page(viewport={"width": width, "height": 900})
    asked, complaints = [], []
    seen.on("request", lambda request: asked.append(request.url))
    seen.on("pageerror", lambda error: complaints.append(str(error)))
    seen.goto(address)
    prompt = seen.get_by_label("Prompt, or what to change in the source")
    prompt.fill("a red circle")
    seen.get_by_role("button", name="Draw").click()
    labels = "[...document.querySelectorAll('.caption-label')].map(one => one.innerText)"
    seen.wait_for_function(f"{labels}.length == 4", timeout=120_000)
    assert seen.evaluate(labels) == ["student", "generation", "editing", "base"]
    assert seen.evaluate("document.documentElement.scrollWidth <= innerWidth")
    for tab, text in (("Training", "samples, step 1"), ("Card", "Merged from")):
        seen.get_by_role("tab", name=tab).click()
        seen.get_by_text(text).first.wait_for(timeout=60_000)
    seen.get_by_role("tab", name="Try it").click()
    prompt.fill(" ")
    seen.get_by_role("button", name="Draw").click()
    seen.get_by_text("the prompt is empty; write what the image should show").wait_for(timeout=60_000)
    assert not complaints and all(url.startswith((address, "data:", "blob:")) for url in asked)
