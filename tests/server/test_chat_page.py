"""The page's files and endpoints, without a browser."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

from abyssal.server.chat_page import FILES, INDEX, MAX_MARKDOWN_LENGTH, TYPES

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "src" / "abyssal" / "server" / "page"


def test_every_file_is_served_with_a_policy_that_bars_foreign_and_inline_code(
    serve: Any, within_seconds: Callable[..., None]
) -> None:
    async def scenario() -> None:
        async with serve(api_keys=("secret",)) as served:
            for path in ("/", *(f"/page/{name}" for name in FILES)):
                answer = await served.http.get(path)
                assert answer.status_code == 200
                policy = dict(part.split(maxsplit=1) for part in answer.headers["content-security-policy"].split("; "))
                assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
                assert {policy[name] for name in ("script-src", "style-src", "connect-src", "img-src")} == {"'self'"}
                assert answer.headers["x-content-type-options"] == "nosniff"
                suffix = Path(path).suffix or ".html"
                assert answer.headers["content-type"].startswith(TYPES[suffix])
            for path in ("/page/app.py", "/page/..%2Fapp.py", "/page/%2Fetc%2Fpasswd", "/page/index.html"):
                assert (await served.http.get(path)).status_code == 404

    within_seconds(scenario())


def test_the_endpoints_behind_the_page_want_the_key(serve: Any, within_seconds: Callable[..., None]) -> None:
    async def scenario() -> None:
        async with serve(api_keys=("secret",), model_name="m") as served:
            assert (await served.http.get("/v1/abyssal/about")).status_code == 401
            assert (await served.http.post("/v1/abyssal/markdown", json={"text": "x"})).status_code == 401
            key = {"authorization": "Bearer secret"}
            about = (await served.http.get("/v1/abyssal/about", headers=key)).json()
            assert about["model"] == "m"
            assert (about["num_experts"], about["first_expert_layer"], about["num_mtp_modules"]) == (6, 1, 1)
            answer = await served.http.post("/v1/abyssal/markdown", json={"text": "**x**<b>"}, headers=key)
            assert answer.json() == {"html": "<p><strong>x</strong>&lt;b&gt;</p>\n"}
            for body in ({"text": "x" * (MAX_MARKDOWN_LENGTH + 1)}, {"text": 3}, {}, {"text": "x", "more": 1}):
                refused = await served.http.post("/v1/abyssal/markdown", json=body, headers=key)
                assert refused.status_code == 400

    within_seconds(scenario())


def test_the_page_names_nothing_from_elsewhere_and_holds_no_inline_code() -> None:
    for name in (INDEX, *FILES):
        text = (PAGE / name).read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"(?:https?:)?//[\w.-]+\.\w+", re.sub(r"^\s*//.*$", "", text, flags=re.M)), name
        assert not re.search(r"\bon\w+=|<style|\sstyle=|javascript:|\beval\(|new Function", text), name
    index = (PAGE / INDEX).read_text(encoding="utf-8")
    assert re.findall(r"<script[^>]*>(.*?)</script>", index) == [""]
    code = "".join((PAGE / name).read_text(encoding="utf-8") for name in FILES if name.endswith(".js"))
    assert re.findall(r"innerHTML = (.*?)\)", code) == ["trusted(html"]
    assert not re.search(r"outerHTML|insertAdjacentHTML|document\.write|DOMParser", code)


def test_every_id_that_the_code_looks_up_is_in_the_page() -> None:
    index = (PAGE / INDEX).read_text(encoding="utf-8")
    ids = re.findall(r'\bid="([\w-]+)"', index)
    assert len(set(ids)) == len(ids)
    code = "".join((PAGE / name).read_text(encoding="utf-8") for name in FILES if name.endswith(".js"))
    wanted = set(re.findall(r'byId\("([\w-]+)"\)', code))
    assert len(wanted) > 30
    assert wanted <= set(ids)


def test_all_files_are_packaged() -> None:
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["abyssal"]
    files = {path for path in PAGE.iterdir() if path.is_file()}
    assert {path.name for path in files} == {INDEX, *FILES}
    assert files <= {path for pattern in patterns for path in (ROOT / "src" / "abyssal").glob(pattern)}
    assert (resources.files("abyssal.server") / "page" / INDEX).is_file()
