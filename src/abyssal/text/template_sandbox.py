"""The jinja2 environment in which a stranger's chat template runs.

A template is a program that came with the weights. Attributes are out of its reach by jinja2's sandbox; what it takes
of time and memory is limited by a meter: passes of loops and calls cost `STEP` units, text and lists a unit an element,
paid before they are made. Features and results are those of transformers' `apply_chat_template`.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from datetime import datetime
from functools import wraps
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes, pass_context
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

#: Units of a loop's pass, a call, a filter; as much as so many characters of text.
STEP = 64
#: Units that a rendering may use, beside `UNITS_PER_INPUT` for each of its input: some seconds, some 100 MB.
BUDGET = 2**26
UNITS_PER_INPUT = 64
#: Between two payments at most one operation goes on, which is linear in text that was paid for.
SECONDS = 10.0
#: Bits of a whole number that a template may compute.
INTEGER_BITS = 4096
#: Where the context of a rendering holds its meter: not a name that a template can spell.
METER = "the meter"

#: Filters that make text of whatever they are given.
TEXT_FILTERS = frozenset(
    (
        *("capitalize", "center", "e", "escape", "forceescape", "format", "indent", "join", "lower", "pprint"),
        *("replace", "safe", "string", "striptags", "title", "tojson", "trim", "truncate", "upper", "urlencode"),
        *("urlize", "wordcount", "wordwrap", "xmlattr"),
    )
)
#: Filters and methods whose result is as long as the product of their arguments, at most.
GROWING = frozenset(
    (
        *("batch", "center", "expandtabs", "indent", "ljust", "rjust", "round", "slice", "to_bytes", "tojson"),
        *("translate", "truncate", "urlize", "wordwrap", "xmlattr", "zfill"),
    )
)
#: Filters that may go over their text once for each of its parts.
QUADRATIC = frozenset(("striptags", "urlize", "wordwrap"))


class TooCostlyError(jinja2.TemplateError):
    """A rendering used up what it may."""


class RefusedError(jinja2.TemplateError):
    """The template called `raise_exception`."""


class Meter:
    """What a rendering may still use."""

    def __init__(self, units: int, seconds: float = SECONDS) -> None:
        """Start the clock."""
        self.left = units
        self._end = time.monotonic() + seconds

    def spend(self, units: int) -> None:
        """Pay for what is about to be made.

        Raises:
            TooCostlyError: it is too much, or took too long.
        """
        self.left -= max(units, 0)
        if self.left < 0 or time.monotonic() > self._end:
            raise TooCostlyError("it takes more time or memory than a chat template may")


def text_units(value: object, limit: int, *, widths: bool = False) -> int:
    """Return about how many characters `str(value)` or its JSON has, counted up to `limit`.

    Nested containers are walked as printing walks them: one that is inside several times counts several times. With
    `widths`, whole numbers count as so many characters.
    """
    total, pending = 0, [value]
    while pending and total <= limit:
        one = pending.pop()
        total += 16
        if isinstance(one, str | bytes):
            total += len(one)
        elif isinstance(one, Mapping):
            pending += [*one.keys(), *one.values()]
        elif isinstance(one, list | tuple | set | frozenset):
            pending += one
        elif isinstance(one, Namespace):
            raise TooCostlyError("it prints a namespace, which has no text; print its attributes")
        elif widths and isinstance(one, int):
            total += abs(one)
    return total


def length(value: object) -> int:
    """Return the number of elements or characters of a container or text, 0 of anything else."""
    return len(value) if isinstance(value, Sized) and not isinstance(value, Undefined | LoopContext) else 0


def check_integer(bits: float) -> None:
    """Refuse to compute a whole number of so many bits."""
    if bits > INTEGER_BITS:
        raise TooCostlyError(f"it computes with whole numbers of more than {INTEGER_BITS} bits")


def format_units(pattern: str | bytes, arguments: Sequence[object], limit: int) -> int:
    """Return the most that formatting can give: every field as wide as all arguments, and all widths it names."""
    text = pattern.decode("latin-1") if isinstance(pattern, bytes) else pattern
    widths = sum(int(digits[:12]) for digits in re.findall(r"\d+", text))
    computed = "*" in text or re.search(r":[^}]*\{", text) is not None  # a width that is an argument
    fields = text.count("%") + text.count("{")
    return len(text) + widths + fields * text_units(arguments, limit, widths=computed)


def growth(name: str, subject: Any, arguments: Sequence[Any], limit: int) -> int:
    """Return the units of what the filter or method `name` makes of its subject."""
    if isinstance(subject, str | bytes):
        if name in ("format", "format_map"):
            return format_units(subject, arguments, limit)
        if name == "replace" and len(arguments) > 1:
            old, new = arguments[:2]
            text, part = (one if isinstance(one, str) else repr(one) for one in (subject, old))
            places = text.count(part)
            return len(subject) + places * length(new)
    if name == "join":
        return text_units(subject, limit) + (length(subject) + 1) * (16 + sum(length(value) for value in arguments))
    units = text_units(subject, limit) if name in TEXT_FILTERS else length(subject)
    if name in QUADRATIC:
        units += units * units // 4096
    if name in GROWING:
        units += 1
        for value in arguments:
            units *= max(1, abs(value) if isinstance(value, int) else length(value))
    return units


class _Generation(Extension):
    """`{% generation %}`: marks what the model writes, for software that trains on it; here it is only a scope."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own declaration

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_text"), [], [], body).set_lineno(line)

    def _text(self, caller: Macro) -> str:
        return caller()


class _PayPerPass(NodeTransformer):
    """Lets every pass of a loop and of a macro pay for itself and its constant text, and `~` for what it joins."""

    def visit_For(self, node: nodes.For) -> nodes.For:  # noqa: N802 - named after the node
        self._visit_body(node)
        if node.test is not None:
            node.test = nodes.And(_payment(STEP), node.test)
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Macro:  # noqa: N802
        self._visit_body(node)
        return node

    visit_CallBlock = visit_Macro  # noqa: N815

    def visit_Concat(self, node: nodes.Concat) -> nodes.Concat:  # noqa: N802
        self.generic_visit(node)
        node.nodes = [nodes.Filter(part, "pay for text", [], [], None, None) for part in node.nodes]
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:  # noqa: N802
        self.generic_visit(node)
        if isinstance(node.arg, nodes.Slice):
            return nodes.Filter(node, "pay for elements", [], [], None, None)
        return node

    def _visit_body(self, node: Any) -> None:
        constant = sum(len(data.data) for part in node.body for data in _constants(part))
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_payment(STEP + constant)))


def _constants(node: nodes.Node) -> Iterator[nodes.TemplateData]:
    """Yield the constant text of a node, without that of loops and macros in it."""
    if isinstance(node, nodes.TemplateData):
        yield node
    elif not isinstance(node, nodes.For | nodes.Macro | nodes.CallBlock):
        for child in node.iter_child_nodes():
            yield from _constants(child)


def _payment(units: int) -> nodes.Filter:
    """Return an expression that pays and is true."""
    return nodes.Filter(nodes.Const(units), "pay", [], [], None, None)


@pass_context
def _pay(context: Context, units: int) -> bool:
    _meter(context).spend(units)
    return True


@pass_context
def _pay_for_text(context: Context, value: Any) -> Any:
    meter = _meter(context)
    meter.spend(text_units(value, meter.left))
    return value


@pass_context
def _pay_for_elements(context: Context, value: Any) -> Any:
    _meter(context).spend(STEP + length(value))
    return value


def _meter(context: Context) -> Meter:
    meter: Meter = context.parent[METER]
    return meter


def _metered(name: str, function: Any) -> Callable[..., Any]:
    """Return a filter or test that pays for its result before it is made."""
    kind = getattr(getattr(function, "jinja_pass_arg", None), "name", None)  # what it wants as its first argument

    @wraps(function)
    def paid(context: Context, subject: Any = None, /, *arguments: Any, **named: Any) -> Any:
        meter = _meter(context)
        if name == "join":
            subject = _counted(context, subject)
        meter.spend(STEP + growth(name, subject, [*arguments, *named.values()], meter.left))
        first: dict[str | None, list[object]] = {
            "context": [context],
            "eval_context": [context.eval_ctx],
            "environment": [context.environment],
        }
        result = function(*first.get(kind, []), subject, *arguments, **named)
        meter.spend(length(result))
        return result

    return pass_context(paid)


def _counted(context: Context, items: Any) -> Any:
    """Return what an iterator yields, each paid for; anything else as it is."""
    return [one for one in items if _pay(context, STEP)] if isinstance(items, Iterator) else items


class TemplateEnvironment(ImmutableSandboxedEnvironment):
    """What transformers gives to chat templates, sandboxed and metered."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        """Set up filters and functions; nothing is folded while compiling, where no meter runs."""
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
            optimized=False,
            finalize=_pay_for_text,
        )
        self.filters["tojson"] = _to_json
        self.filters = {name: _metered(name, filter_) for name, filter_ in self.filters.items()}
        self.filters |= {"pay": _pay, "pay for text": _pay_for_text, "pay for elements": _pay_for_elements}
        self.tests = {name: _metered("", test) for name, test in self.tests.items()}
        del self.globals["lipsum"]  # nonsense of any length
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _PayPerPass().visit(super()._parse(source, name, filename))
        return tree

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Pay for the result, then compute it."""
        meter = _meter(context)
        if isinstance(left, int) and isinstance(right, int):
            bits, other = left.bit_length(), right.bit_length()
            check_integer({"*": bits + other, "**": bits * max(right, 0)}.get(operator, 0))
        elif operator == "%" and isinstance(left, str | bytes):
            meter.spend(format_units(left, right if isinstance(right, tuple) else [right], meter.left))
        elif operator == "*":
            count = right if isinstance(right, int) else left if isinstance(left, int) else 1
            meter.spend(max(length(left), length(right)) * count)
        elif operator == "+":
            meter.spend(length(left) + length(right))
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805 - as in jinja2
        """Pay for a call and, where it is a method of a text or number, for its result; then call."""
        meter = _meter(__context)
        method = getattr(__obj, "__wrapped__", __obj)
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        meter.spend(STEP)
        if name == "join" and isinstance(owner, str | bytes) and args:
            args = (_counted(__context, args[0]), *args[1:])
            meter.spend(growth(name, args[0], [owner], meter.left))
        elif isinstance(owner, str | bytes | int):
            meter.spend(length(owner) + growth(name, owner, [*args, *kwargs.values()], meter.left))
        result = super().call(__context, __obj, *args, **kwargs)
        meter.spend(length(result))
        return result


def _raise_exception(message: object) -> NoReturn:
    raise RefusedError(str(message)[:1000])


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON; jinja2's own filter would write `<` and `&` as escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
