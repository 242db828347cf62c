"""Markdown of a model to HTML that is safe inside a page, whatever the model wrote."""

from __future__ import annotations

from functools import cache

import nh3
from markdown_it import MarkdownIt

#: What may stand in the result; everything else is removed, its text stays. No images: loading one would tell
#: somebody's server what was said. No class, style or id: the page's own are not to be imitated.
TAGS = frozenset(
    {
        *("p", "br", "hr", "h1", "h2", "h3", "h4", "h5", "h6", "blockquote", "pre", "code", "em", "strong", "s"),
        *("ul", "ol", "li", "table", "thead", "tbody", "tr", "th", "td", "a"),
    }
)
ATTRIBUTES = {"a": {"href", "title"}, "ol": {"start"}}
SCHEMES = frozenset({"http", "https", "mailto"})


@cache
def _parser() -> MarkdownIt:
    # raw HTML is shown as text; nesting has a limit of its own
    return MarkdownIt("commonmark", {"html": False, "breaks": True}).enable(["table", "strikethrough"]).disable("image")


def render_markdown(text: str) -> str:
    """Return CommonMark, with tables and strikethrough, as HTML without anything that runs or loads.

    Links open apart and tell nobody where they stood.
    """
    return nh3.clean(
        _parser().render(text),
        tags=set(TAGS),
        attributes=ATTRIBUTES,
        url_schemes=set(SCHEMES),
        link_rel="noopener noreferrer nofollow",
        set_tag_attribute_values={"a": {"target": "_blank"}},
    )
