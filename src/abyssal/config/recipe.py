"""Recipes: TOML files that inherit from one another and become one `RunConfig`."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from abyssal.config.run import RunConfig
from abyssal.errors import ConfigError, nearest

Table = dict[str, Any]


def packaged_recipes() -> list[str]:
    """Return the names of the recipes inside the package, without `base`, which is only extended."""
    folder = resources.files("abyssal.config") / "recipes"
    names = (file.name.removesuffix(".toml") for file in folder.iterdir() if file.name.endswith(".toml"))
    return sorted(name for name in names if name != "base")


def load_recipe(recipe: str, overrides: Sequence[str] = ()) -> RunConfig:
    """Resolve a recipe name or a path to a .toml file into a `RunConfig`.

    Args:
        recipe: a packaged name (`demo`) or a path (`my/run.toml`).
        overrides: `section.field=value`, the value in TOML (a bare word is taken as a string).

    Raises:
        ConfigError: unknown recipe, circular `extends`, invalid TOML, or any fault of a field.
    """
    table = _resolve(recipe, base=Path(), seen=())
    for override in overrides:
        _apply(table, override)
    table.setdefault("name", Path(recipe).stem)
    return RunConfig.parse(table, source=recipe)


def _resolve(recipe: str, base: Path, seen: tuple[str, ...]) -> Table:
    """Read a recipe and everything it extends; tables merge, arrays and values replace.

    Name and description are a recipe's own: a run that inherited the name would write where its base's run stands.
    """
    text, where, folder = _read(recipe, base)
    if where in seen:
        raise ConfigError(f"{where}: extends itself through {' -> '.join((*seen, where))}")
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{where}: not valid TOML ({error})") from None
    parent = table.pop("extends", None)
    unset = table.pop("unset", [])
    if parent is not None and not isinstance(parent, str):
        raise ConfigError(f"{where}: extends={parent!r}: must be one recipe name or path")
    if not (isinstance(unset, list) and all(isinstance(path, str) for path in unset)):
        raise ConfigError(f'{where}: unset={unset!r}: must be a list of fields, such as ["model.q_lora_rank"]')
    merged = {} if parent is None else _resolve(parent, folder, (*seen, where))
    for own in ("name", "description"):
        merged.pop(own, None)
    for path in unset:
        _remove(merged, path, where)
    return _merge(merged, table)


def _read(recipe: str, base: Path) -> tuple[str, str, Path]:
    """Return a recipe's text, its name for messages, and the folder its own paths start from."""
    if recipe.endswith(".toml") or "/" in recipe:
        path = (base / recipe).resolve()
        try:
            return path.read_text(encoding="utf-8"), str(path), path.parent
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            raise ConfigError(f"{base / recipe}: cannot read this recipe ({reason})") from None
    resource = resources.files("abyssal.config") / "recipes" / f"{recipe}.toml"
    if not resource.is_file():
        known = packaged_recipes()
        hint = nearest(recipe, known)
        raise ConfigError(
            f"{recipe}: no such recipe{hint}; there are {', '.join(known)}, or give a path to a .toml file"
        )
    return resource.read_text(encoding="utf-8"), recipe, base


def _merge(below: Table, above: Table) -> Table:
    """Return `below` overlaid with `above`: tables merge, everything else replaces."""
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _remove(table: Table, path: str, where: str) -> None:
    """Delete the dotted `path` from an inherited table."""
    *sections, field = path.split(".")
    for section in sections:
        inner = table.get(section)
        table = inner if isinstance(inner, dict) else {}
    if field not in table:
        raise ConfigError(f"{where}: unset {path!r}: the recipe it extends does not set that{nearest(field, table)}")
    del table[field]


def _apply(table: Table, override: str) -> None:
    """Set one `section.field=value` in `table`."""
    path, equals, text = override.partition("=")
    if not equals or not path.strip():
        raise ConfigError(f"--set {override}: must read section.field=value, such as train.tokens=1000000")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    *sections, field = path.strip().split(".")
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {override}: {section} is a value, not a section")
    table[field] = value
