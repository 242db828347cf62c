"""Renders the templates of this package: each page is one HTML file that needs nothing from outside."""

from __future__ import annotations

from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

from abyssal import __version__
from abyssal.report.numbers import byte_size, duration, short


def render_template(name: str, **values: Any) -> str:
    """Return the page of a template with these values, whose text is escaped; values of type `Markup` are not.

    The templates run no script and say so in their content security policy.
    """
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_resource),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"svg": Markup, "short": short, "duration": duration, "bytes": byte_size, "number": _number}
    style = Markup(_resource("page.css"))
    text = environment.get_template(name).render(style=style, version=__version__, **values)
    # a lone surrogate, from a file's name or a damaged sample, has no UTF-8
    return text.replace("\0", "\ufffd").encode("utf-8", "replace").decode("utf-8")


def _number(value: float, digits: int = 0) -> str:
    """Write a number with thousands separated."""
    return f"{value:,.{digits}f}"


def _resource(name: str) -> str:
    return (resources.files("abyssal.report") / name).read_text(encoding="utf-8")
