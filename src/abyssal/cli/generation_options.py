"""The options of the commands that let a model write."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    Path, typer.Argument(metavar="MODEL_DIR", help="A folder with config.json, safetensors and tokenizer.json.")
]
Temperature = Annotated[
    float | None,
    typer.Option(help="Divides the logits; 0 takes the likeliest token.", show_default="the model's, else 0.6"),
]
TopP = Annotated[
    float | None,
    typer.Option(help="Keep the likeliest tokens that reach this probability.", show_default="the model's, else 0.95"),
]
TopK = Annotated[
    int | None, typer.Option(help="Keep so many of the likeliest tokens; 0: all.", show_default="the model's, else 0")
]
Stop = Annotated[list[str] | None, typer.Option(help="End before this text; may be repeated.")]
DType = Annotated[str, typer.Option(help="auto (bfloat16 where the files hold 16 bits), float32 or bfloat16.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:<index>.")]
Threads = Annotated[int | None, typer.Option(help="Threads of torch on the CPU.", show_default="torch's choice")]
Speculate = Annotated[bool, typer.Option("--speculate", help="Let the MTP modules draft; the text stays the same.")]
Drafts = Annotated[
    int | None,
    typer.Option(help="Tokens to draft a pass; implies --speculate.", show_default="the number of MTP modules"),
]
