"""What a hostile template tries, and the sentence in which it ends."""

from __future__ import annotations

import tracemalloc

import pytest

from abyssal.errors import DataError
from abyssal.text import chat_template
from abyssal.text.chat_template import ChatTemplate

MESSAGES = [{"role": "user", "content": "hello"}]
GROW = "{% set ns = namespace(x='aaaaaaaa', l=[]) %}{% for i in range(99) %}"
COSTLY = {
    "loops in loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a loop's filter": "{% for i in range(99999) if false %}{% endfor %}" * 99,
    "a loop's constant text": "{% for i in range(9999) %}" + "x" * 9999 + "{% endfor %}",
    "a macro that calls itself twice": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(60) }}",
    "a recursive loop": "{% for n in [50] recursive %}{% if n %}{{ loop([n - 1, n - 1]) }}{% endif %}{% endfor %}",
    "text times number": "{{ 'a' * 9999999999 }}",
    "number times list": "{{ (9999999999 * [1]) | length }}",
    "powers": "{{ 9 ** 99 ** 99 }}",
    "repeated squares": "{% set ns = namespace(n=9) %}{% for i in range(99) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "ljust": "{{ 'x'.ljust(9999999999) }}",
    "zfill": "{{ 'x'.zfill(9999999999) }}",
    "expandtabs": "{{ '\\t'.expandtabs(9999999999) }}",
    "center": "{{ 'x' | center(9999999999) }}",
    "center through map": "{{ ['x'] | map('center', 9999999999) | list }}",
    "center while compiling": "{% autoescape 'x' | center(9999999999) %}{% endautoescape %}",
    "indent": "{{ 'x\\ny' | indent(9999999999) }}",
    "round": "{{ 1.5 | round(9999999999, 'ceil') }}",
    "batch": "{{ [1] | batch(9999999999, 0) | list }}",
    "slice": "{{ [1] | slice(9999999999) | list }}",
    "to_bytes": "{{ (1).to_bytes(9999999999, 'big') }}",
    "printf's width": "{{ '%9999999999d' % 1 }}",
    "printf's width as argument": "{{ '%*d' % (9999999999, 1) }}",
    "format filter": "{{ '%9999999999d' | format(1) }}",
    "format's width": "{{ '{:>9999999999}'.format(1) }}",
    "format's width as argument": "{{ '{:>{w}}'.format(1, w=9999999999) }}",
    "format_map": "{{ '{a:>9999999999}'.format_map({'a': 1}) }}",
    "join's separator": "{{ range(99999) | join('x' * 99999) }}",
    "join as a method": "{{ ('x' * 99999).join(range(99999) | map('string')) }}",
    "replace": "{{ ('a' * 99999).replace('a', 'b' * 99999) }}",
    "replace filter": "{{ ('a' * 99999) | replace('a', 'b' * 99999) }}",
    "doubled by ~": GROW + "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "doubled by +": GROW + "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "doubled by printing": GROW + "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}{% endfor %}",
    "doubled lists, as JSON": GROW + "{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l | tojson }}",
    "doubled lists, printed": GROW + "{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l }}",
    "doubled objects, joined": GROW + "{% set ns.l = {'a': ns.l, 'b': ns.l} %}{% endfor %}{{ [ns.l] | join }}",
    "copies by slicing": "{% set x = 'x' * 999999 %}{% set ns = namespace(l=[]) %}{% for i in range(9999) %}"
    "{% set ns.l = ns.l + [x[1:]] %}{% endfor %}",
    "tags stripped": "{{ ('<!--' * 99999) | striptags }}",
}
FORBIDDEN = {
    "class": ("{{ ''.__class__.__mro__ }}", "access to attribute '__class__' of 'str' object is unsafe"),
    "subscript": ("{{ ''['__class__'].x }}", "access to attribute '__class__' of 'str' object is unsafe"),
    "globals": ("{{ cycler.__init__.__globals__ }}", "access to attribute '__init__'"),
    "raise_exception's globals": ("{{ raise_exception.__globals__.x }}", "access to attribute '__globals__'"),
    "format": ("{{ '{0.__class__.__mro__}'.format(1) }}", "unsafe"),
    "append": ("{{ messages.append(1) }}", "access to attribute 'append' of 'list' object is unsafe"),
    "update": ("{{ messages[0].update({'role': 1}) }}", "access to attribute 'update' of 'dict' object is unsafe"),
    "another template": ("{% include 'tokenizer.json' %}", "no loader"),
    "nonsense": ("{{ lipsum(99999) }}", "'lipsum' is undefined"),
    "a namespace": ("{{ namespace(a=1) }}", "it prints a namespace"),
    "endless recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "a long range": ("{{ range(100001) | list }}", "Range too big"),
}


@pytest.mark.parametrize("name", COSTLY)
def test_a_costly_template_is_stopped_before_it_costs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "BUDGET", 2**21)  # a part, for the sake of the test's time
    monkeypatch.setattr(chat_template, "UNITS_PER_INPUT", 0)
    template = ChatTemplate({"default": COSTLY[name]}, {}, "here")
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=r"^here: the chat template fails in line 1 with these messages \(it "):
            template.render(MESSAGES)
        assert tracemalloc.get_traced_memory()[1] < 2**27
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", FORBIDDEN)
def test_what_is_out_of_reach_ends_in_a_sentence(name: str) -> None:
    source, sentence = FORBIDDEN[name]
    with pytest.raises(DataError) as caught:
        ChatTemplate({"default": source}, {}, "here").render(MESSAGES)
    assert sentence in str(caught.value)
    assert MESSAGES == [{"role": "user", "content": "hello"}]


def test_unsafe_attributes_print_nothing() -> None:
    source = "{{ ''.__class__ is defined }}{{ ''|attr('__class__') }}{{ self._TemplateReference__context }}"
    assert ChatTemplate({"default": source}, {}).render(MESSAGES) == "False"


@pytest.mark.parametrize("source", ["(" * 4000 + "1" + ")" * 4000, "-" * 9000 + "1", "[" * 4000])
def test_deep_nesting_does_not_break_the_compiler(source: str) -> None:
    with pytest.raises(DataError, match="here: the chat template 'default'"):
        ChatTemplate({"default": "{{ " + source + " }}"}, {}, "here")


def test_time_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from abyssal.text import template_sandbox

    clock = iter(range(0, 10**6, 3))
    monkeypatch.setattr(template_sandbox.time, "monotonic", lambda: next(clock))
    template = ChatTemplate({"default": "{% for i in range(99) %}{% endfor %}"}, {}, "here")
    with pytest.raises(DataError, match="more time or memory than a chat template may"):
        template.render(MESSAGES)


def test_a_long_conversation_is_not_costly() -> None:
    """Two million characters in a thousand messages, gone through several times."""
    source = (
        "{% set ns = namespace(s='') %}{% for m in messages %}{% set ns.s = ns.s ~ m.content[:9] %}{% endfor %}"
        "{{ ns.s }}{% for m in messages[::-1] %}{{ '<' + m.role + '>' + m.content.split('</think>')[-1] | trim }}"
        "{% endfor %}{{ messages | tojson | length }}"
    )
    messages = [{"role": "user", "content": "word " * 400}] * 1000
    text = ChatTemplate({"default": source}, {}).render(messages)
    assert text.count("<user>word") == 1000
