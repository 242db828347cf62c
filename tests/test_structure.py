"""The structure of the source: no import circle, no class name twice, no run of lines twice."""

import ast
import io
import tokenize
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src"
PACKAGE = SOURCE / "abyssal"
#: The longest run of equal lines that may stand twice.
MAX_EQUAL_LINES = 10
#: A class may share its name with another one where its docstring says why, in a paragraph that begins like this.
SAME_NAME = "Same name as"
#: Tokens that are not code.
LAYOUT = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


def source_files(root=PACKAGE):
    return sorted(root.rglob("*.py"))


def module_name(path, root=SOURCE):
    return ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def imports_on_load(tree):
    """Yield the import statements outside functions, those for type checking included."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ImportFrom | ast.Import):
            yield node
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from imports_on_load(node)


def import_graph(sources):
    """Return the modules that each module imports, of {module: code}; a name in a package may be its submodule."""
    graph = {module: set() for module in sources}
    for module, code in sources.items():
        for node in imports_on_load(ast.parse(code)):
            if isinstance(node, ast.Import):
                named = [alias.name for alias in node.names]
            else:
                full = [f"{node.module}.{alias.name}" for alias in node.names]
                named = [name if name in sources else node.module for name in full]
            graph[module].update(name for name in named if name in sources and name != module)
    return graph


def circles(graph):
    """Return the strongly connected components of more than one module, each sorted (Tarjan)."""
    order, lowest, stack, found = {}, {}, [], []

    def visit(module):
        order[module] = lowest[module] = len(order)
        stack.append(module)
        for imported in graph[module]:
            if imported not in order:
                visit(imported)
                lowest[module] = min(lowest[module], lowest[imported])
            elif imported in stack:
                lowest[module] = min(lowest[module], order[imported])
        if lowest[module] == order[module]:
            component = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(component) > 1:
                found.append(tuple(sorted(component)))

    for module in sorted(graph):
        if module not in order:
            visit(module)
    return found


def repeated_class_names(sources):
    """Return {name: modules} of the classes of one name, without those whose docstring says why."""
    modules = defaultdict(list)
    for module, code in sources.items():
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ClassDef) and SAME_NAME not in (ast.get_docstring(node) or ""):
                modules[node.name].append(module)
    return {name: found for name, found in modules.items() if len(found) > 1}


def comparable_lines(code):
    """Return (number, text) of a module's lines that count: no blank ones, comments, imports and docstrings."""
    skipped = set()
    for node in ast.walk(ast.parse(code)):
        is_text = (
            isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        )
        if is_text or isinstance(node, ast.Import | ast.ImportFrom):
            skipped.update(range(node.lineno, node.end_lineno + 1))
    lines = defaultdict(str)
    for token in tokenize.generate_tokens(io.StringIO(code).readline):
        if (
            token.type in (tokenize.NAME, tokenize.NUMBER, tokenize.OP, tokenize.STRING)
            and token.start[0] not in skipped
        ):
            lines[token.start[0]] += f"{token.string} "
    return sorted(lines.items())


def repeated_runs(sources, longest=MAX_EQUAL_LINES):
    """Return a sentence for each place from which more than `longest` lines stand somewhere else as well."""
    lines = {module: comparable_lines(code) for module, code in sources.items()}
    places = defaultdict(list)
    for module, numbered in lines.items():
        texts = [text for _, text in numbered]
        for start in range(len(texts) - longest):
            places[tuple(texts[start : start + longest + 1])].append((module, start))
    found = []
    for copies in places.values():
        for (first, start), (second, other) in pairwise(copies):
            if start and other and lines[first][start - 1][1] == lines[second][other - 1][1]:
                continue  # inside a longer run, which is named at its beginning
            found.append(f"{first}:{lines[first][start][0]} and {second}:{lines[second][other][0]}")
    return found


@pytest.fixture(scope="module")
def sources():
    return {module_name(path): path.read_text(encoding="utf-8") for path in source_files()}


def test_modules_of_a_package_import_each_other_in_one_direction_only(sources):
    assert circles(import_graph(sources)) == []


def test_no_class_name_stands_twice(sources):
    assert repeated_class_names(sources) == {}


def test_no_run_of_more_than_ten_lines_stands_twice(sources):
    assert repeated_runs(sources) == []


def test_circles_are_found_through_type_checking_and_submodules():
    code = {
        "a": "",
        "a.b": "from a.c import x",
        "a.c": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from a import d",
        "a.d": "import a.b",
        "a.e": "from a.b import y\ndef f():\n    import a.f",
        "a.f": "from a.e import z",
    }
    assert circles(import_graph(code)) == [("a.b", "a.c", "a.d")]


def test_classes_of_one_name_are_found_unless_a_docstring_says_why():
    plain = 'class A:\n    "What it is."'
    explained = 'class A:\n    """What it is.\n\n    Same name as x.A, which it wraps.\n    """'
    assert repeated_class_names({"x": plain, "y": plain}) == {"A": ["x", "y"]}
    assert repeated_class_names({"x": plain, "y": explained}) == {}


def test_repeated_runs_are_found_whatever_their_indentation_and_comments():
    run = [f"value{n} = compute({n})" for n in range(11)]
    first = "import x\n" + "\n".join(run)
    second = "def f():\n    # why\n" + "\n\n".join(f"    {line}  # {n}" for n, line in enumerate(run))
    assert repeated_runs({"a": first, "b": second}) == ["a:2 and b:3"]
    assert repeated_runs({"a": first, "b": "\n".join(run[:10])}) == []
    assert repeated_runs({"a": "\n".join([*run, *run])}) == ["a:1 and a:12"]
