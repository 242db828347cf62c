"""A file of requests through one engine: as many at a time as it runs, each answered once."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from abyssal.engine.batch_input import BatchLine
from abyssal.engine.engine import Engine
from abyssal.engine.request import Output, Request
from abyssal.errors import AbyssalError, ModelDirectoryError

SAMPLED_BYTES = 2**16  # of either end of a file of weights


@dataclass(frozen=True)
class BatchResult:
    """What became of a line: a text, or the sentence that says why there is none."""

    line: BatchLine
    num_prompt_tokens: int = 0
    num_new_tokens: int = 0
    text: str = ""
    finish_reason: str | None = None
    error: str | None = None

    def record(self) -> dict[str, Any]:
        """Return the fields of the answer in the output."""
        if self.error is not None:
            return {"error": self.error}
        usage = {"prompt_tokens": self.num_prompt_tokens, "completion_tokens": self.num_new_tokens}
        return {"text": self.text, "finish_reason": self.finish_reason, "usage": usage}


@dataclass
class _OpenLine:
    """A line under way."""

    line: BatchLine
    num_prompt_tokens: int
    parts: list[str] = field(default_factory=list)
    num_new_tokens: int = 0

    def take(self, output: Output) -> BatchResult | None:
        """Add an output, and return the answer with the last one."""
        self.num_new_tokens += output.token is not None
        self.parts.append(output.text)
        if output.error is not None:
            return BatchResult(self.line, error=str(output.error))
        if output.finish_reason is None:
            return None
        counts = (self.num_prompt_tokens, self.num_new_tokens)
        return BatchResult(self.line, *counts, "".join(self.parts), output.finish_reason)


def run_batch(
    engine: Engine,
    lines: Iterable[BatchLine],
    request_of: Callable[[BatchLine], Request],
    count_tokens: Callable[[int], None] = lambda _: None,
) -> Iterator[BatchResult]:
    """Yield the answers as they become ready; lines are taken only as fast as the engine has room for them.

    Args:
        engine: without other work.
        lines: one that cannot be asked, such as a prompt that is too long, is answered with the error.
        request_of: what to ask for a line.
        count_tokens: told after every step how many tokens it made.
    """
    waiting = iter(lines)
    texts: dict[int, _OpenLine] = {}
    most = 2 * engine.options.max_running  # so many that none of its places is empty for a step
    while True:
        while len(texts) < most and (line := next(waiting, None)) is not None:
            try:
                request = request_of(line)
                texts[engine.add(request)] = _OpenLine(line, len(request.prompt_ids))
            except AbyssalError as error:
                yield BatchResult(line, error=str(error))
        if not texts:
            return
        outputs = engine.step()
        count_tokens(sum(output.token is not None for output in outputs))
        for output in outputs:
            answer = texts[output.request_id].take(output)
            if answer is not None:
                del texts[output.request_id]
                yield answer


def model_digest(folder: Path) -> str:
    """Return a digest that tells model directories apart: their small files, and samples of their weights.

    Raises:
        ModelDirectoryError: a file cannot be read.
    """
    digest = hashlib.sha256()
    paths = sorted(path for path in folder.glob("*") if path.suffix in (".json", ".jinja", ".safetensors"))
    try:
        for path in paths:
            with path.open("rb") as file:
                size = path.stat().st_size
                digest.update(f"{path.name} {size}\n".encode())
                digest.update(file.read(SAMPLED_BYTES))
                file.seek(max(size - SAMPLED_BYTES, 0), os.SEEK_SET)
                digest.update(file.read(SAMPLED_BYTES))
    except OSError as error:
        raise ModelDirectoryError(f"{folder}: cannot be read ({error.strerror})") from None
    return digest.hexdigest()
