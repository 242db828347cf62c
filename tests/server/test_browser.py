"""A conversation in a headless Chromium: what a person sees is what the engine said."""

from __future__ import annotations

import json
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("playwright", reason="playwright is not installed")
pytest.importorskip("fastapi", reason="the extra serve is not installed")

import uvicorn
from fastapi import FastAPI
from playwright import sync_api

from abyssal.engine import Engine, EngineOptions, LoadedModel, Output, Request, SamplingParameters, load_model
from abyssal.server import ServerOptions, create_app
from abyssal.text.chat_template import ChatTemplate

pytestmark = pytest.mark.slow

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ENGINE = EngineOptions(max_running=4, page_tokens=8, num_drafts=1, adapt_drafts=False)
REFUSED = "the server responded with a status of 4"  # in the browser's words, and no fault of a script
QUESTION = "def f(x) <b>?</b>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A Chromium of the system's, else playwright's own."""
    program = next((path for name in NAMES if (path := shutil.which(name))), None)
    with sync_api.sync_playwright() as driver:
        try:
            found = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        except sync_api.Error as error:
            pytest.skip(f"no Chromium can be started: {str(error).splitlines()[0]}")
        yield found
        found.close()


@contextmanager
def listening(app: FastAPI) -> Iterator[str]:
    """Serve an application on a port of its own."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, ws="none", timeout_graceful_shutdown=5))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join()
    app.state.engine.check_integrity()
    assert not app.state.engine.has_work


Open = Callable[..., AbstractContextManager[tuple[Any, FastAPI]]]


@pytest.fixture
def opened(browser: Any, loaded: LoadedModel, template: ChatTemplate) -> Open:
    """Open the page of a server in a window of its own; nothing may be asked of others, and no script may fail."""

    @contextmanager
    def open_page(width: int = 1200, **options: Any) -> Iterator[tuple[Any, FastAPI]]:
        app = create_app(loaded, template=template, options=ServerOptions(**options), engine_options=ENGINE)
        with listening(app) as url, browser.new_context(viewport={"width": width, "height": 800}) as context:
            page = context.new_page()
            page.set_default_timeout(60_000)
            asked: list[str] = []
            wrong: list[str] = []
            page.on("request", lambda request: asked.append(request.url))
            page.on("pageerror", lambda error: wrong.append(str(error)))
            page.on("console", lambda m: wrong.append(m.text) if m.type == "error" and REFUSED not in m.text else None)
            page.goto(url)
            yield page, app
            assert {address for address in asked if not address.startswith(f"{url}/")} == set()
            assert wrong == []

    return open_page


def settings(page: Any, **values: object) -> None:
    page.click("#open-settings")
    for name, value in values.items():
        page.fill(f"#{name}", str(value))
    page.click("#close-settings")


def say(page: Any, text: str, answers: int = 1) -> None:
    """Send a message and wait for so many answers in all to be complete."""
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")
    page.locator(".assistant .actions").nth(answers - 1).wait_for()


def engine_says(directory: Path, template: ChatTemplate, messages: list[dict[str, str]], count: int) -> list[Output]:
    """The oracle: the outputs of an engine with a model of its own, without drafts, server or page."""
    loaded = load_model(directory)
    ids = loaded.tokenizer.encode(template.render(messages, add_generation_prompt=True))
    engine = Engine.of(loaded, EngineOptions(num_drafts=0))
    engine.add(Request(ids, SamplingParameters(count, temperature=0), wants_experts=True))
    outputs: list[Output] = []
    while engine.has_work:
        outputs += engine.step()
    return outputs


def test_a_conversation_its_retry_and_every_token_of_it(opened: Open, directory: Path, template: ChatTemplate) -> None:
    with opened() as (page, _):
        settings(page, temperature=0, max_tokens=13, system="Be brief.")
        say(page, QUESTION)
        assert page.locator(".user .content").inner_text() == QUESTION
        asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}]
        expected = engine_says(directory, template, asked, 13)
        before = page.locator(".assistant .content").inner_html()
        assert before
        page.get_by_role("button", name="Retry").click()
        page.locator(".assistant .actions").wait_for()
        assert page.locator(".assistant").count() == 1
        assert page.locator(".assistant .content").inner_html() == before
        page.get_by_role("button", name="Inspect", exact=True).click()
        assert page.locator(".token").count() == len(expected)
        drafted = 0
        for number, output in enumerate(expected):
            assert output.token is not None
            assert page.locator("#position").inner_text() == f"token {number + 1} of {len(expected)}"
            assert page.locator("#token-id").inner_text() == str(output.token.id)
            shown = page.locator("#probability").inner_text().removesuffix(" %")
            assert float(shown) / 100 == pytest.approx(2.718281828459045**output.token.logprob, rel=0.06)
            for layer, experts in enumerate(output.experts):
                cells = page.locator("#experts div").nth(layer).locator("i")
                marked = {place for place in range(cells.count()) if cells.nth(place).get_attribute("class")}
                assert marked == set(experts)
                assert cells.nth(experts[0]).get_attribute("class") == "first"
            drafted += "MTP" in page.locator("#draft").inner_text()
            page.keyboard.press("ArrowRight")
        assert drafted == page.locator(".token.accepted, .token.rejected").count() > 0
        page.keyboard.press("Escape")
        assert page.locator("#inspector").is_hidden()
        say(page, "x", answers=2)
        assert page.locator("#messages li").count() == 4
        page.click("#new")
        assert page.locator("#messages li").count() == 0


def test_stop_ends_the_answer_here_and_in_the_engine(opened: Open, held: Any) -> None:
    with opened() as (page, app):
        settings(page, temperature=0)
        with held(app.state.engine, steps=10):  # some text, and not its end
            page.fill("#prompt", "x")
            page.click("#send")
            page.locator(".assistant .content p").first.wait_for()
            page.click("#stop")
            page.locator(".assistant .actions", has_text="stopped").wait_for()
        assert page.locator("#send").is_visible()
        while app.state.driver.num_sequences:  # the suite's limit ends this, if the engine goes on
            time.sleep(0.01)


def test_what_an_answer_holds_cannot_run_or_load(opened: Open) -> None:
    text = (
        "**bold** <script>document.title='hacked'</script><img src=x onerror=\"document.title='hacked'\">"
        "[link](javascript:alert(1)) ![picture](http://127.0.0.1:9/track.png)\n\n```\n1 < 2\n```"
    )
    chunk = {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": "stop"}]}
    body = f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n"
    with opened() as (page, _):
        page.route("**/v1/chat/completions", lambda route: route.fulfill(body=body, content_type="text/event-stream"))
        say(page, "x")
        content = page.locator(".assistant .content")
        assert content.locator("strong").inner_text() == "bold"
        assert "1 < 2" in content.locator("pre").inner_text()
        assert "<script>" in content.inner_text()
        assert content.locator("script, img, [onerror], a[href^=javascript]").count() == 0
        assert "hacked" not in page.title()


def test_a_key_is_asked_for_and_forgotten_with_the_tab_while_settings_stay(opened: Open) -> None:
    with opened(api_keys=("secret",)) as (page, _):
        page.locator("#settings[open]").wait_for()
        page.fill("#key", "secret")
        page.fill("#max_tokens", "3")
        page.click("#close-settings")
        page.locator("#model", has_text="model").wait_for()
        say(page, "x")
        assert "secret" not in page.evaluate("() => JSON.stringify({...localStorage})")
        page.reload()
        assert page.locator("#max_tokens").input_value() == "3"


def test_a_fault_is_shown_in_the_servers_words_and_retry_mends_it(opened: Open) -> None:
    with opened() as (page, _):
        settings(page, max_tokens=100_000)
        say(page, "x")
        assert "max_tokens=100000: only" in page.locator(".assistant .fault").inner_text()
        settings(page, max_tokens=2, temperature=0)  # drawn tokens may end the text
        page.get_by_role("button", name="Retry").click()
        page.locator(".assistant .actions", has_text="2 tokens").wait_for()
        assert page.locator(".fault").count() == 0


def test_a_phone_shows_all_of_it_without_scrolling_sideways(opened: Open) -> None:
    with opened(width=360) as (page, _):
        settings(page, max_tokens=20, temperature=0)
        say(page, "a_long_name_" * 30)
        page.get_by_role("button", name="Inspect", exact=True).click()
        assert page.locator("#inspector").bounding_box()["width"] == 360
        assert page.evaluate("() => document.scrollingElement.scrollWidth") == 360


def test_a_fault_below_a_long_conversation_is_in_sight_on_a_phone(opened: Open) -> None:
    with opened(width=360) as (page, _):
        settings(page, max_tokens=2, temperature=0)
        say(page, "line\n" * 40)
        settings(page, max_tokens=100_000)
        say(page, "x", answers=2)
        fault, composer = (page.locator(name).bounding_box() for name in (".assistant .fault", "#composer"))
        assert fault["height"] > 60, "several lines"
        assert fault["y"] + fault["height"] <= composer["y"]
