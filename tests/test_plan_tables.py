"""The tables of docs/plan.md are those that the plan gives now."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

TOOL = Path(__file__).parents[1] / "tools" / "plan_tables.py"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("plan_tables", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_of_the_page_are_those_of_the_plan(tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["plan_tables.py", "--check"])
    assert tool.main() == 0


def test_stale_table_is_found(tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stale = tmp_path / "plan.md"
    marks = "".join(f"<!-- {name} -->\nold\n<!-- /{name} -->\n" for name in tool.TABLES)
    stale.write_text(marks)
    monkeypatch.setattr(tool, "PAGE", stale)
    monkeypatch.setattr(tool, "TABLES", {"published": lambda: iter(["| new |"])})
    monkeypatch.setattr(sys, "argv", ["plan_tables.py", "--check"])
    assert tool.main() == 1
    monkeypatch.setattr(sys, "argv", ["plan_tables.py"])
    assert tool.main() == 0
    assert "<!-- published -->\n| new |\n<!-- /published -->" in stale.read_text()
