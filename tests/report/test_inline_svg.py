"""A figure inside a page: nothing from outside, ids of its own, colours of the page."""

from abyssal.report.inline_svg import SERIES, inline

FILE = f"""<?xml version="1.0" encoding="utf-8" standalone="no"?>
<svg xmlns:xlink="http://www.w3.org/1999/xlink" xmlns="http://www.w3.org/2000/svg" width="9pt" viewBox="0 0 9 9">
 <metadata><x xmlns="http://example.org/">about</x></metadata>
 <defs><style type="text/css">*{{stroke: red}}</style><clipPath id="p1"><rect x="1.23456" y="2"/></clipPath></defs>
 <g id="figure_1"><path id="m" d="M 1.23456 2 &#10;L 3 4" clip-path="url(#p1)" style="stroke: {SERIES[3]}"/>
 <use xlink:href="#m"/><text>a &lt;b&gt;</text></g>
</svg>"""


def test_ids_are_distinct_between_figures_and_still_found_within_one() -> None:
    svg = inline(FILE, "c7", "")
    for part in ('id="c7-p1"', "url(#c7-p1)", 'href="#c7-m"', 'id="c7-m"'):
        assert part in svg
    assert "figure_1" not in svg


def test_colours_become_variables_and_numbers_short() -> None:
    svg = inline(FILE, "c", "")
    assert 'style="stroke: var(--series-3)"' in svg
    assert 'd="M 1.23 2  L 3 4"' in svg


def test_nothing_names_the_outside_or_styles_the_page() -> None:
    svg = inline(FILE, "c", "loss & more")
    assert "http" not in svg
    assert "<style" not in svg
    assert "a &lt;b&gt;" in svg
    assert 'aria-label="loss &amp; more"' in svg
    assert "width" not in svg
