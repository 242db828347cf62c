"""Optional packages, which only some corpora need: imported on use, with a sentence where one is missing."""

from __future__ import annotations

import importlib
from typing import Any

from abyssal.errors import DataError


def import_optional(module: str, extra: str, what: str) -> Any:
    """Import and return the module of an optional package.

    Args:
        module: its name.
        extra: the extra of ours that installs it.
        what: what it is needed for, as the sentence begins.

    Raises:
        DataError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise DataError(
            f"{what}: needs the package {package}, which is not installed; pip install 'abyssal[{extra}]'"
        ) from None
