"""Chat templates give what transformers' `apply_chat_template` gives."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from abyssal.errors import AbyssalError, DataError, UsageError
from abyssal.text.chat_template import ChatTemplate
from abyssal.text.tokenizer import Tokenizer
from abyssal.text.tokenizer_config import write_tokenizer_config

RELEASED = Path(__file__).parents[2] / "../shared/data/deepseek_v3_tokenizer"
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
Oracle = Callable[..., str]

#: Each uses what other models' templates use.
TEMPLATES = {
    "turns, trimmed lines": """{{ bos_token }}
{%- for message in messages %}
    {% if loop.first and message.role == 'system' %}
[S] {{ message['content'] | trim }}
    {% else %}
[{{ message.role | upper }}] {{ message.content }}{{ eos_token if not loop.last }}
    {% endif %}
{% endfor %}
{% if add_generation_prompt %}[ASSISTANT] {% endif %}""",
    "loop controls": """{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.content }};
{%- if loop.index0 > 3 %}{% break %}{% endif %}{% endfor %}""",
    "tojson": """{{ tools | tojson }}{{ messages | tojson(indent=2) }}
{{- {'b': 'é<', 'a': 1.5} | tojson(sort_keys=true) }}
{{- messages[0] | tojson(separators=(',', ':'), ensure_ascii=true) }}""",
    "last question, from behind": """{% set ns = namespace(found=false, last=0) %}
{%- for m in messages[::-1] %}{% set index = messages|length - 1 - loop.index0 %}
{%- if not ns.found and m.role == 'user' %}{% set ns.found = true %}{% set ns.last = index %}{% endif %}{% endfor %}
{{- ns.last }}{% for m in messages[:-1] %}{{ m.content is string }}{{ loop.previtem.role if not loop.first }}
{%- endfor %}""",
    "macros and types": """{% macro kind(value, depth=0) %}{% if value is mapping %}{ {%- for k, v in value|dictsort %}
{{- '  ' * depth }}{{ k }}: {{ kind(v, depth + 1) }}{% if not loop.last %}, {% endif %}{% endfor %}}
{%- elif value is string %}{{ value.split('é')[-1].strip('\\n ') ~ '!' }}{% elif value is iterable %}[
{%- for one in value %}{{ kind(one, depth=depth + 1) }}{% endfor %}]{% elif value is none %}null
{%- else %}{{ value }}{% endif %}{% endmacro %}{{ kind(messages) }}{{ kind(tools) }}""",
    "generation": """{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{% set inner = 1 -%}
{{ m.content }}{{ eos_token }}{% endgeneration %}
{%- else %}{{ m.content }}{{ inner is defined }}{% endif %}{% endfor %}""",
    "refusal": """{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools: ' + m.content|string) }}
{%- endif %}{{ m.content }}{% endfor %}""",
    "filters": """{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | join(' / ') }}
{{- messages | rejectattr('role', 'in', ['user', 'tool']) | list | length }}{{ messages | map(attribute='role') | unique
| sort | join(',') }}{% for role, group in messages | groupby('role') %}{{ role }}={{ group | length }} {% endfor %}
{{- '%s has %d' | format('x', messages | length) }}{{ '%5.2f|%-6s|' % (1.239, 'ab') }}{{ '{:>8}{a}'.format('z', a=3) }}
{{- ', '.join(messages | map(attribute='role')) }}{{ 'a-b'.replace('-', '--') | center(9) }}{{ x | default('none') }}
{{- messages[0].content | string | indent(3, true) }}{{ messages[0].role | replace('s', 'SS') | capitalize }}""",
    "blocks": """{% set body %}{% for m in messages %}<{{ m.role }}>{% endfor %}{% endset %}{{ body | length }}
{{- body }}{% filter upper %}{{ body }}x{% endfilter %}{% macro frame(a) %}({{ a }}{{ caller(2) }}){% endmacro %}
{%- call(n) frame('q') %}{{ n * 'z' }}{% endcall %}{% for m in messages recursive %}{{ m.role }}{{ loop.depth }}
{%- if m.tool_calls %}[{{ loop(m.tool_calls) }}]{% endif %}{% else %}nobody{% endfor %}{{ loop is defined }}
{%- for m in messages if m.content %}{{ loop.index }}/{{ loop.length }}{{ loop.cycle('a', 'b') }} {% endfor %}
{%- with a = 3 %}{{ a ** 3 }}{{ -a // 2 }}{{ [1] + [a] }}{{ a in [3] and not false }}{% endwith %}{{ none }}{{ true }}
{%- autoescape true %}{{ '<' ~ messages[0].role }}{% endautoescape %}{# note #}{% raw %}{{ x }}{% endraw %}
{%- set j = joiner(', ') %}{% for m in messages %}{{ j() }}{{ m.role[1:] }}{% endfor %}{{ range(3) | list }}""",
    "attributes that are not there": """{{ messages[0].gone }}{{ messages[99] is defined }}{{ missing is none }}
{{- messages[0].gone.further }}""",
}
TEXTS = ("", "x", "Größe\n", "  大 <b>&'\"", "</think>a", "<｜User｜>", "%d {0} {{ x }}", "line\n\nline ", "é" * 9)
TOOL = {"type": "function", "function": {"name": "sum_up", "parameters": {"type": "object", "required": ["a", "é"]}}}


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    """transformers' own rendering."""
    reason = "transformers, the oracle, is not installed"
    module = pytest.importorskip("transformers.utils.chat_template_utils", reason=reason)

    def render(template: str, messages: list[Any], **options: Any) -> str:
        text: str = module.render_jinja_template([messages], chat_template=template, **options)[0][0]
        return text

    return render


@pytest.fixture(scope="module")
def released() -> str:
    """DeepSeek-V3's own template."""
    if not RELEASED.exists():
        pytest.skip("DeepSeek-V3's tokenizer_config.json is not beside the project")
    template: str = json.loads((RELEASED / "tokenizer_config.json").read_text(encoding="utf-8"))["chat_template"]
    return template


def tool_call(draw: random.Random) -> dict[str, Any]:
    function = {"name": draw.choice(("f", "sum_up")), "arguments": json.dumps({"a": draw.choice(TEXTS)})}
    return {"type": "function", "role": "call", "content": "", "id": str(draw.randrange(99)), "function": function}


def conversation(draw: random.Random) -> list[dict[str, Any]]:
    """Messages in any order; some roles and fields make no sense."""
    messages: list[dict[str, Any]] = []
    for _ in range(draw.randint(1, 7)):
        role = draw.choice(("system", "user", "user", "assistant", "assistant", "tool"))
        message: dict[str, Any] = {"role": role, "content": draw.choice(TEXTS)}
        if role == "assistant" and draw.random() < 0.4:
            message |= {"content": None, "tool_calls": [tool_call(draw) for _ in range(draw.randint(1, 3))]}
        messages.append(message)
    return messages


def same(oracle: Oracle, source: str, messages: list[Any], **options: Any) -> bool:
    """Compare both renderings; where transformers fails, we have a sentence. Return whether there was a text."""
    try:
        wanted = oracle(source, messages, **SPECIAL, **options)
    except Exception:
        with pytest.raises(AbyssalError):
            ChatTemplate({"default": source}, SPECIAL).render(messages, **options)
        return False
    assert ChatTemplate({"default": source}, SPECIAL).render(messages, **options) == wanted, source
    return True


def options_of(draw: random.Random) -> dict[str, Any]:
    return {"tools": draw.choice((None, [TOOL], [TOOL, {"name": "é"}])), "add_generation_prompt": draw.random() < 0.5}


def test_random_conversations_in_the_released_template(oracle: Oracle, released: str) -> None:
    seed = random.randrange(2**32)
    draw, texts = random.Random(seed), 0
    for _ in range(150):
        texts += same(oracle, released, conversation(draw), **options_of(draw))
    assert texts > 100, seed


def test_the_released_directory_is_read_with_its_tokens(released: str) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2 + 3?"},
        {"role": "assistant", "content": None, "tool_calls": [tool_call(random.Random(0))]},
        {"role": "tool", "content": "5"},
        {"role": "assistant", "content": "5"},
        {"role": "user", "content": "Sure?"},
    ]
    transformers = pytest.importorskip("transformers", reason="transformers, the oracle, is not installed")
    tokenizer = transformers.AutoTokenizer.from_pretrained(RELEASED)
    wanted = tokenizer.apply_chat_template(messages, tools=[TOOL], tokenize=False, add_generation_prompt=True)
    assert ChatTemplate.load(RELEASED).render(messages, tools=[TOOL], add_generation_prompt=True) == wanted
    assert wanted.startswith("<｜begin▁of▁sentence｜>Be brief.<｜User｜>2 + 3?<｜Assistant｜><｜tool▁calls▁begin｜>")


@pytest.mark.parametrize("name", TEMPLATES)
def test_random_conversations_in_templates_of_many_features(oracle: Oracle, name: str) -> None:
    draw, texts = random.Random(random.randrange(2**32)), 0
    for _ in range(25):
        texts += same(oracle, TEMPLATES[name], conversation(draw), **options_of(draw))
    assert texts > 0 or name == "attributes that are not there"


def expression(draw: random.Random, depth: int) -> str:
    """A random expression over `m` (a message), `messages`, `i` (a number) and `t` (a text)."""
    if depth == 0:
        return draw.choice(("m.role", "m['content']", "i", "t", "'a\\n'", "3", "none", "[i, t]", "messages|length"))
    one, two = expression(draw, depth - 1), expression(draw, depth - 1)
    form = draw.choice(
        (
            *(
                "{a} ~ {b}",
                "{a} + {b}",
                "{a} * 2",
                "{a} == {b}",
                "{a} if {b} else t",
                "[{a}, {b}]",
                "(({a}) | string)[1:]",  # of a text: a slice of another constant is nothing once jinja2 folds it
            ),
            *("{a} | string", "{a} | length", "[{a}, {b}] | join('-')", "{a} is string", "{{'k': {a}}}.k"),
            *(
                "{a} % {b}",
                "{a} or {b}",
                "{a} in [{b}]",
                "({a} | string).split('a')",
                "[{a}] | map('string') | list",
                "{a} | tojson",
            ),
        )
    )
    return form.format(a=one, b=two)


def statement(draw: random.Random, depth: int) -> str:
    """A random piece of template."""
    if depth == 0:
        return draw.choice(("text\n", "  ", "\n", f"{{{{ {expression(draw, draw.randint(0, 3))} }}}}"))
    body = "".join(statement(draw, depth - 1) for _ in range(draw.randint(1, 3)))
    minus, value = draw.choice(("", "-")), expression(draw, draw.randint(0, 2))
    form = draw.choice(
        (
            "{{% for m in messages {m}%}}{b}{{% endfor {m}%}}",
            "{{%{m} for i in range(3) if i != {v} %}}{b}{{{{ loop.index }}}}{{% else %}}0{{% endfor %}}",
            "{{%{m} if {v} %}}\n{b}{{% else %}}{b}{{% endif {m}%}}",
            "{{% set t %}}{b}{{% endset %}}",
            "{{% set ns.t = {v} %}}{b}{{{{ ns.t }}}}",
            "{{% macro f(i, t='q') %}}{b}{{% endmacro %}}{{{{ f({v}) }}}}",
            "{{% filter trim %}}{b}{{% endfilter %}}",
            "{{% generation {m}%}}{b}{{%{m} endgeneration %}}",
        )
    )
    return form.format(b=body, v=value, m=minus)


def test_random_templates(oracle: Oracle) -> None:
    """Every construct that is rewritten or metered, nested at random; those that fail must fail for both."""
    draw, texts = random.Random(random.randrange(2**32)), 0
    opening = "{% set ns = namespace(t='') %}{% set m = messages[0] %}{% set i = 2 %}{% set t = 'tt' %}"
    while texts < 50:  # of about three times as many
        source = opening + "".join(statement(draw, draw.randint(0, 3)) for _ in range(3))
        texts += same(oracle, source, conversation(draw))


def test_the_date_is_todays(oracle: Oracle) -> None:
    source, messages = "{{ strftime_now('%d %B %Y') }}", [{"role": "user"}]
    before = oracle(source, messages)
    found = ChatTemplate({"default": source}, SPECIAL).render(messages)
    assert found in (before, oracle(source, messages))  # at midnight, either


# Where templates come from


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that transformers opens."""
    tokenizer = Tokenizer.train(["What is 2 + 3?"], 270)
    tokenizer.save(tmp_path / "tokenizer.json")
    write_tokenizer_config(tmp_path, tokenizer, max_length=77)
    return tmp_path


def change(folder: Path, **fields: Any) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def apply(folder: Path, **options: Any) -> str:
    """Render with transformers."""
    transformers = pytest.importorskip("transformers", reason="transformers, the oracle, is not installed")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text: str = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False, **options)
    return text


NAMED = [
    {"name": "default", "template": "D{{ bos_token }}{{ image_token }}"},
    {"name": "tool_use", "template": "T{{ tools|length }}"},
    {"name": "rag", "template": "R{% for d in documents %}{{ d.text }}{% endfor %}"},
]


@pytest.mark.parametrize("files", [(), ("chat_template",), ("chat_template", "additional_chat_templates/rag")])
@pytest.mark.parametrize("field", [None, "one: {{ pad_token }}", NAMED])
def test_templates_are_found_where_transformers_finds_them(folder: Path, files: tuple[str, ...], field: Any) -> None:
    change(folder, chat_template=field, image_token="<image>", sep_token={"content": "<sep>", "__type": "AddedToken"})
    for name in files:
        path = folder / f"{name}.jinja"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"file {path.stem}: {{{{ eos_token }}}}{{{{ sep_token }}}}\n\n", encoding="utf-8")
    messages = [{"role": "user", "content": "x"}]
    if field is None and not files:
        with pytest.raises(DataError, match=r"has no chat template .* it can continue text"):
            ChatTemplate.load(folder)
        return
    template = ChatTemplate.load(folder)
    documents = [{"title": "t", "text": "é"}]
    assert template.render(messages) == apply(folder)
    assert template.render(messages, tools=[TOOL]) == apply(folder, tools=[TOOL])
    if field is NAMED and not files:
        theirs = apply(folder, chat_template="rag", documents=documents)
        assert template.render(messages, name="rag", documents=documents) == theirs == "Ré"
        with pytest.raises(
            UsageError, match="has no chat template 'rage'; it has default, rag, tool_use; nearest: rag"
        ):
            template.render(messages, name="rage")


def test_variables_reach_the_template(oracle: Oracle) -> None:
    source = "{{ enable_thinking }}{{ bos_token }}"
    options = {"enable_thinking": False, "bos_token": "other"}
    assert ChatTemplate({"default": source}, SPECIAL).render([{"role": "user"}], **options) == "Falseother"


# What is wrong


@pytest.mark.parametrize(
    ("field", "sentence"),
    [
        ("{% for %}", "the chat template 'default' is not valid in line 1: Expected an expression"),
        ("a\n{% foo %}", "is not valid in line 2: Encountered unknown tag 'foo'"),
        (7, "chat_template: must be a string, or a list of objects with a name and a template"),
        ([{"name": "default"}], "chat_template: must be a string, or a list"),
        ("x" * 1_100_000, "has 1,100,000 characters; too many"),
    ],
    ids=str,
)
def test_what_is_no_template_is_named(folder: Path, field: Any, sentence: str) -> None:
    change(folder, chat_template=field)
    with pytest.raises(DataError) as caught:
        ChatTemplate.load(folder)
    assert sentence in str(caught.value)
    assert str(folder / "tokenizer_config.json") in str(caught.value)


def test_files_that_cannot_be_read_are_named(folder: Path) -> None:
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(DataError, match="a chat template cannot be read"):
        ChatTemplate.load(folder)
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer_config\.json: cannot be read as JSON"):
        ChatTemplate.load(folder)


@pytest.mark.parametrize(
    ("messages", "sentence"),
    [
        ([], "messages: must be a list with at least one message"),
        ("hello", "messages: must be a list"),
        (["hello"], r"messages\[0\]: must be an object with a role"),
        ([{"role": "user", "content": "x"}, {"content": "x"}], r"messages\[1\]\.role=None: must be a string"),
    ],
)
def test_what_is_no_conversation_is_refused(messages: Any, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        ChatTemplate({"default": "x"}, {}).render(messages)


def test_a_refusal_of_the_template_is_passed_on() -> None:
    template = ChatTemplate({"default": "{{ raise_exception('roles must alternate') }}"}, {}, "here")
    with pytest.raises(UsageError, match=r"^here: the chat template refuses these messages: roles must alternate$"):
        template.render([{"role": "user"}])


def test_a_fault_of_the_template_tells_its_line() -> None:
    template = ChatTemplate({"default": "a\n{{ messages[0].content + 'x' }}"}, {}, "here")
    with pytest.raises(DataError, match=r"^here: the chat template fails in line 2 with these messages \(TypeError: "):
        template.render([{"role": "user", "content": None}])
