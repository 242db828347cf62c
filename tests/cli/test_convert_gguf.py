"""`abyssal convert --to gguf`: what it prints, and what it refuses."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader

from abyssal.checkpoint.gguf.write import DTYPES
from abyssal.cli.convert import GgufType

Call = Callable[..., Any]


def test_the_options_are_the_writers_types() -> None:
    assert [str(dtype) for dtype in GgufType] == list(DTYPES)


@pytest.mark.parametrize(("options", "dtype", "number"), [((), "bf16", 32), (("--dtype", "q8_0"), "q8_0", 7)])
def test_a_gguf_file_and_what_it_lacks(
    abyssal: Call, model_folder: Path, options: tuple[str, ...], dtype: str, number: int
) -> None:
    result = abyssal("convert", model_folder, "model.gguf", "--to", "gguf", *options)
    assert (result.code, result.err) == (0, "")
    summary, note, *fallbacks = result.out.splitlines()
    assert re.fullmatch(rf"model\.gguf: [\d.]+ .?B, matrices in {dtype}; [\d.]+ s", summary)
    assert note.startswith("note: without the MTP layers, which llama.cpp's own conversion")
    assert [line[:14] for line in fallbacks] == (["note: in bf16,"] if dtype == "q8_0" else [])
    assert GGUFReader("model.gguf").fields["general.file_type"].contents() == number


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--to", "gguf", "--verify"), "--verify: is not for --to gguf; leave it out"),
        (("--to", "gguf", "--scales-from", "x", "--workers", "2"), "--workers, --scales-from: is not for --to gguf"),
        (("--to", "bf16", "--dtype", "f32"), "--dtype f32: is for --to gguf; leave it out"),
    ],
)
def test_options_of_the_other_formats_are_refused(
    abyssal: Call, model_folder: Path, options: tuple[str, ...], sentence: str
) -> None:
    result = abyssal("convert", model_folder, "out.gguf", *options)
    assert result.code == 2
    assert sentence in result.err
    assert not Path("out.gguf").exists()


def test_what_gguf_cannot_say_is_one_sentence(abyssal: Call, model_folder: Path) -> None:
    fields = json.loads((model_folder / "config.json").read_text())
    fields["rope_scaling"] = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "mscale": 1.0}
    (model_folder / "config.json").write_text(json.dumps(fields))
    result = abyssal("convert", model_folder, "out.gguf", "--to", "gguf")
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith(f"error: {model_folder}: cannot become a GGUF file: rope_scaling: mscale=1.0")
    assert result.err.count("\n") == 1
    abyssal("convert", model_folder.with_name("nowhere"), "out.gguf", "--to", "gguf")
    assert not Path("out.gguf").exists()
