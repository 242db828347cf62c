"""Who may import whom: the contracts of .importlinter hold, can be broken, and what a graph cannot say is read off."""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "abyssal"

pytest.importorskip("importlinter", reason="import-linter is not installed")


def lint(source, cwd):
    """Run the contracts over the package below `source`."""
    program = Path(sys.executable).with_name("lint-imports")
    arguments = [program, "--config", ROOT / ".importlinter", "--no-cache", "--no-logo"]
    environment = {"PYTHONPATH": str(source), "PATH": "", "COLUMNS": "200"}
    return subprocess.run(arguments, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def test_every_contract_is_kept(tmp_path):
    result = lint(ROOT / "src", tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "0 broken" in result.stdout


def test_a_breach_of_each_contract_is_found(tmp_path):
    shutil.copytree(SOURCE, tmp_path / "src" / "abyssal", ignore=shutil.ignore_patterns("__pycache__"))
    breaches = {
        "ops/__init__.py": "import abyssal.config",
        "plan/__init__.py": "def f():\n    import torch",
        "model/__init__.py": "import numpy",
        "data/__init__.py": "import transformers",
        "train/__init__.py": "import abyssal.engine",
    }
    for path, code in breaches.items():
        with (tmp_path / "src" / "abyssal" / path).open("a", encoding="utf-8") as file:
            file.write(f"\n{code}\n")
    result = lint(tmp_path / "src", tmp_path)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "0 kept, 5 broken" in result.stdout
    for breach in (
        "abyssal.ops -> abyssal.config",
        "abyssal.plan -> torch",
        "abyssal.model -> numpy",
        "abyssal.data -> transformers",
        "abyssal.train -> abyssal.engine",
    ):
        assert breach in result.stdout


def test_a_package_without_a_floor_is_found(tmp_path):
    shutil.copytree(SOURCE, tmp_path / "src" / "abyssal", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "src" / "abyssal" / "attic").mkdir()
    (tmp_path / "src" / "abyssal" / "attic" / "__init__.py").touch()
    result = lint(tmp_path / "src", tmp_path)
    assert result.returncode == 1
    assert "attic" in result.stdout


def names_in(tree):
    """Yield every dotted name that a piece of code imports or mentions: `torch.distributed`, `os.environ`, `open`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute | ast.Name):
            yield ast.unparse(node)


def executed_on_import(tree):
    """Yield the statements and expressions that importing a module runs: all but the bodies of functions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from node.args.defaults
            yield from getattr(node, "decorator_list", [])
        elif isinstance(node, ast.If) and ast.unparse(node.test) in ("__name__ == '__main__'", "TYPE_CHECKING"):
            continue
        else:
            yield node
            yield from executed_on_import(node)


def breaches(names, forbidden):
    return [n for n in names if any(n == f or n.startswith(f"{f}.") for f in forbidden)]


FORBIDDEN_IN_THE_MODEL = (
    "torch.distributed",
    "DTensor",
    "world_size",
    "os",
    "pathlib",
    "open",
    "torch.load",
    "torch.save",
    "kv_cache",
)
FORBIDDEN_ON_IMPORT = (
    "os.environ",
    "os.getenv",
    "logging.basicConfig",
    "threading.Thread",
    "torch.cuda.is_available",
    "torch.set_num_threads",
    "torch.set_default_dtype",
    "torch.manual_seed",
)


def modules(folder):
    return sorted(folder.rglob("*.py"))


@pytest.mark.parametrize("path", modules(SOURCE / "model"), ids=lambda path: path.name)
def test_the_model_knows_no_ranks_environment_or_files(path):
    assert breaches(names_in(ast.parse(path.read_text(encoding="utf-8"))), FORBIDDEN_IN_THE_MODEL) == []


def test_importing_a_module_probes_and_sets_nothing():
    found = []
    for path in modules(SOURCE):
        for node in executed_on_import(ast.parse(path.read_text(encoding="utf-8"))):
            found += [(path.name, name) for name in breaches(names_in_node(node), FORBIDDEN_ON_IMPORT)]
    assert found == []


def names_in_node(node):
    """Return the dotted name of one node, not of what stands inside it."""
    return [ast.unparse(node)] if isinstance(node, ast.Attribute | ast.Name) else []


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("import os\nhome = os.environ['HOME']", ["os.environ"]),
        ("class A:\n    home = f(os.getenv('HOME'))", ["os.getenv"]),
        ("def f(x=os.environ): pass", ["os.environ"]),
        ("def f():\n    return os.environ", []),
        ("if __name__ == '__main__':\n    print(os.environ)", []),
    ],
)
def test_the_reading_of_what_an_import_runs(code, found):
    nodes = executed_on_import(ast.parse(code))
    assert [name for node in nodes for name in breaches(names_in_node(node), FORBIDDEN_ON_IMPORT)] == found


@pytest.mark.parametrize(
    "code",
    ["import torch.distributed as dist", "from torch.distributed import fsdp", "x = torch.distributed.get_rank()"],
)
def test_the_reading_of_names(code):
    assert breaches(names_in(ast.parse(code)), FORBIDDEN_IN_THE_MODEL) != []
