"""Write docs/paper-map.md: where each equation of the DeepSeek-V3 report stands in the code.

The places are the marks in comments and docstrings, `eq. 1`, `eq. 1, 3`, `eq. 13-16`, `eq. 24 and 25`. A place is
named by its function or class, not by its line, so that the page changes only when an equation moves. Only the
folders that compute equations count: a mark elsewhere (in a file's layout, in a configuration) merely refers to one.

    python tools/paper_map.py           write the page
    python tools/paper_map.py --check   exit 1 where the page is stale, an equation has no place or a mark no equation
"""

from __future__ import annotations

import argparse
import ast
import io
import os
import re
import sys
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "abyssal"
PAGE = ROOT / "docs" / "paper-map.md"
FOLDERS = ("model", "ops", "train")

EQUATIONS = {
    1: "latent of keys and values, compressed from the hidden state; cached",
    2: "position-free keys, expanded from that latent",
    3: "rotary key, one for all heads; cached",
    4: "key of a head: its position-free part beside the rotary one",
    5: "values, expanded from the same latent",
    6: "latent of the queries",
    7: "position-free queries, expanded from their latent",
    8: "rotary queries, one a head",
    9: "query of a head: its position-free part beside its rotary one",
    10: "attention of a head over what precedes a token",
    11: "the heads' outputs, projected back to the hidden size",
    12: "MoE layer: input, shared experts and gated routed experts added up",
    13: "gate values: affinities of the chosen experts, normalised to sum 1",
    14: "only the top-k experts keep their affinity",
    15: "affinity of a token to an expert: sigmoid of a dot product",
    16: "selection by affinity plus bias; the gate value stays without the bias",
    17: "sequence-wise balance loss",
    18: "share of a sequence's selections that fall to an expert, times the number of experts",
    19: "affinities normalised over all experts",
    20: "mean normalised affinity of an expert over a sequence",
    21: "MTP input: last depth's hidden state and the next token's embedding, projected to one",
    22: "MTP module: one Transformer block over that input",
    23: "MTP prediction through the output head shared with the main model",
    24: "cross-entropy of one MTP depth",
    25: "MTP loss: mean over the depths, weighted by lambda",
}
"""Number and meaning, in our words, of every equation that the code must hold."""

MARK = re.compile(r"\beq\. *(\d+(?:[-–]\d+)?(?:(?:, *| and )\d+(?:[-–]\d+)?)*)")

Places = dict[int, dict[str, list[str]]]
"""For each equation its files (paths below the source folder), and the functions and classes in each."""


class MapError(Exception):
    """A mark names an equation that is not on the list, or an equation has no mark."""


def numbers_in(text: str) -> list[int]:
    """Return the equation numbers that the marks in `text` name, ranges spelt out."""
    numbers: list[int] = []
    for mark in MARK.finditer(text):
        for part in re.split(r", *| and ", mark.group(1)):
            first, *last = (int(number) for number in re.split(r"[-–]", part))
            numbers += range(first, (last[0] if last else first) + 1)
    return numbers


def symbols_in(tree: ast.Module) -> list[tuple[int, int, str]]:
    """Return (first line, last line, dotted name) of each function and class, outer ones first."""
    found: list[tuple[int, int, str]] = []

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            name = prefix
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                name = f"{prefix}.{child.name}".lstrip(".")
                first = min([child.lineno, *(decorator.lineno for decorator in child.decorator_list)])
                found.append((first, child.end_lineno or child.lineno, name))
            visit(child, name)

    visit(tree, "")
    return found


def docstring_lines(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of each bare string statement: docstrings, and those below an assignment."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            # one piece, since a mark may be broken over two lines; its first line places it
            yield node.lineno, re.sub(r"\s+", " ", node.value.value)


def marks_in(code: str) -> Iterator[tuple[int, str]]:
    """Yield (equation, dotted name) for each mark of a file, `""` where it stands outside functions and classes."""
    tree = ast.parse(code)
    symbols = symbols_in(tree)
    comments = (t for t in tokenize.generate_tokens(io.StringIO(code).readline) if t.type == tokenize.COMMENT)
    texts = [*docstring_lines(tree), *((token.start[0], token.string) for token in comments)]
    for line, text in sorted(texts):
        name = next((name for first, last, name in reversed(symbols) if first <= line <= last), "")
        for number in numbers_in(text):
            yield number, name


def find_places(source: Path) -> Places:
    """Return where each equation stands below `source`.

    Raises:
        MapError: a mark names an equation that is not on the list.
    """
    places: Places = {number: {} for number in EQUATIONS}
    for file in sorted(file for folder in FOLDERS for file in (source / folder).rglob("*.py")):
        path = file.relative_to(source).as_posix()
        for number, name in marks_in(file.read_text(encoding="utf-8")):
            if number not in places:
                raise MapError(f"{path}: {name or 'module'}: eq. {number}: the list ends at {max(EQUATIONS)}")
            names = places[number].setdefault(path, [])
            if name and name not in names:
                names.append(name)
    return places


def render(places: Places, source: Path, page: Path) -> str:
    """Return the text of the page, its links relative to the page's folder."""
    prefix = Path(os.path.relpath(source, page.parent)).as_posix()
    rows = []
    for number, meaning in EQUATIONS.items():
        links = [
            f"[{path}]({prefix}/{path}) {', '.join(f'`{name}`' for name in names)}".rstrip()
            for path, names in places[number].items()
        ]
        rows.append(f"| {number} | {meaning} | {'<br>'.join(links)} |")
    return "\n".join(
        [
            "# The report's equations in the code",
            "",
            "Equations of the [DeepSeek-V3 Technical Report](https://arxiv.org/abs/2412.19437), sections 2.1 and 2.2.",
            "Written by `make paper-map` from the marks in comments and docstrings; a test holds it to the code.",
            "",
            "| eq. | what it is | where it stands |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )


def check(places: Places, text: str, page: Path) -> None:
    """Compare with the page as it is.

    Raises:
        MapError: an equation has no place, or the page differs from `text`.
    """
    missing = [str(number) for number, found in places.items() if not found]
    if missing:
        raise MapError(f"no mark in the code for eq. {', '.join(missing)}")
    if not page.is_file() or page.read_text(encoding="utf-8") != text:
        raise MapError(f"{page}: stale; run `make paper-map`")


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or check the page; return the exit code."""
    parser = argparse.ArgumentParser(description="Map the report's equations to the code.")
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    parser.add_argument("--source", type=Path, default=SOURCE, help="folder with the code")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page")
    options = parser.parse_args(arguments)
    try:
        places = find_places(options.source)
        text = render(places, options.source, options.page)
        if options.check:
            check(places, text, options.page)
        else:
            options.page.write_text(text, encoding="utf-8")
    except MapError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
