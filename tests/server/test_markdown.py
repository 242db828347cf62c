"""What a model writes reaches the page as text and a few harmless elements, whatever it is."""

from __future__ import annotations

import random
from html.parser import HTMLParser
from urllib.parse import urlsplit

import pytest

pytest.importorskip("nh3", reason="the extra serve is not installed")

from abyssal.server.markdown import ATTRIBUTES, TAGS, render_markdown


class Elements(HTMLParser):
    """Every element of a piece of HTML with its attributes, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_common_markdown_becomes_its_elements() -> None:
    text = "# T\n\n**b** *e* ~~s~~ `c<d`\n\n3. x\n4. y\n\n> q\n\n```py\nif a < b: pass\n```\n\n"
    text += "|a|b|\n|-|-|\n|1|2|\n\none\ntwo"
    found = Elements(render_markdown(text))
    tags = [tag for tag, _ in found.elements]
    for tag in ("h1", "strong", "em", "s", "code", "ol", "li", "blockquote", "pre", "table", "th", "td", "br"):
        assert tag in tags
    assert ("ol", {"start": "3"}) in found.elements
    assert "if a < b: pass" in found.text
    assert "c<d" in found.text


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script>",
        "<img src=x onerror=alert(1)>",
        "![x](http://example.org/track.png)",
        "![x](data:image/png;base64,AAAA)",
        "[x](javascript:alert(1)) [y](JaVaScRiPt:alert(1)) [z](data:text/html,x) [v](vbscript:x)",
        "<a href='javascript:alert(1)'>x</a>",
        "<javascript:alert(1)>",
        "<div style='position:fixed' id=send class=user>x</div>",
        "<iframe src=//example.org></iframe><form action=//example.org><input></form>",
        "[x](http://example.org 'a\" onmouseover=\"alert(1)')",
        '```"><script>alert(1)</script>\nx\n```',
        "<svg><a xlink:href=javascript:alert(1)>x</a></svg><math><mtext></mtext></math>",
        "&lt;script&gt;alert(1)&lt;/script&gt;",
    ],
)
def test_nothing_that_runs_or_loads_gets_through(text: str) -> None:
    check(render_markdown(text))


def check(html: str) -> None:
    for tag, attributes in Elements(html).elements:
        assert tag in TAGS, html
        assert set(attributes) <= ATTRIBUTES.get(tag, set()) | ({"rel", "target"} if tag == "a" else set()), html
        if tag == "a":
            assert urlsplit(attributes.get("href") or "").scheme in ("http", "https", "mailto", ""), html
            assert attributes["rel"] == "noopener noreferrer nofollow"
            assert attributes["target"] == "_blank"


def test_random_mixtures_of_marks_are_harmless_too() -> None:
    parts = (
        *(
            "<",
            ">",
            "script",
            "](",
            "[",
            "javascript:",
            "!",
            "`",
            "```",
            "\n",
            "    ",
            "|",
            "-",
            "*",
            "&#x6a;",
            '"',
            "'",
        ),
        *("<!--", "-->", "<![CDATA[", "onerror=", "<b", "</", "http://a", "\x00", "\ud800", "é", "# ", "> ", "\\"),
    )
    draw = random.Random(random.randrange(2**32))
    for _ in range(400):
        text = "".join(draw.choices(parts, k=draw.randint(1, 30))).encode("utf-8", "replace").decode()
        check(render_markdown(text))


def test_deep_nesting_comes_to_an_end() -> None:
    for text in ("> " * 3000 + "x", "[" * 5000, "*" * 5000 + "x", "- " * 2000 + "x", "`" * 5000):
        check(render_markdown(text))
