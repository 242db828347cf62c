"""The end of every run: a model directory that other tools open."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import tomli_w
import torch
from torch.distributed import ProcessGroup

from abyssal.checkpoint.hf import write_model_directory
from abyssal.config import RunConfig
from abyssal.config.parallel import ParallelConfig
from abyssal.model import Transformer
from abyssal.plan import count_parameters
from abyssal.text.tokenizer import Tokenizer
from abyssal.text.tokenizer_config import write_tokenizer_config
from abyssal.train.evaluation import Score
from abyssal.train.progress import Progress

#: What the model card leaves out of the recipe: places on the machine that the run was on, and its spread over ranks,
#: which may change on the way and changes no number but in the last digits.
LEFT_OUT: Any = {
    "init_from": True,
    "tokenizer": {"path"},
    "data": {"corpus", "sources", "folder"},
    "parallel": ParallelConfig.model_fields.keys() - {"dispatch_dtype"},
}


def export_model(
    path: Path,
    model: Transformer,
    config: RunConfig,
    progress: Progress,
    *,
    tokenizer: Path,
    score: Score | None,
    group: ProcessGroup | None = None,
) -> None:
    """Write the weights, in the run's compute dtype, as a Hugging Face `deepseek_v3` directory.

    Args:
        tokenizer: the folder whose tokenizer goes along.
        score: the last validation, for the model card.
        group: the ranks that hold the model and call this together; none for this process alone.
    """

    def write_tokenizer(folder: Path) -> None:
        shutil.copyfile(tokenizer / "tokenizer.json", folder / "tokenizer.json")
        write_tokenizer_config(folder, Tokenizer.load(tokenizer), config.model.max_position_embeddings)

    dtype = torch.float32 if model.compute_dtype == torch.float64 else model.compute_dtype
    write_model_directory(
        path,
        config.model,
        model.state_dict(),
        dtype=dtype,
        tokenizer_files=write_tokenizer,
        card=model_card(config, progress, score),
        group=group,
    )


def model_card(config: RunConfig, progress: Progress, score: Score | None) -> str:
    """Return the README.md of a model directory: what it is, how it was made, what was measured, and the recipe."""
    count = count_parameters(config.model)
    recipe = tomli_w.dumps(config.model_dump(exclude_none=True, exclude=LEFT_OUT))
    measured = (
        "not measured"
        if score is None
        else f"{score.bits_per_byte:.4f} bits per byte ({score.loss:.4f} nats a token) on {score.bytes:,} bytes of "
        "validation documents"
    )
    return f"""---
library_name: abyssal
pipeline_tag: text-generation
---
# {config.name}

{config.description}

| | |
|---|---|
| architecture | DeepSeek-V3 (`deepseek_v3`): MLA, DeepSeekMoE, {config.model.num_nextn_predict_layers} MTP module(s) |
| parameters | {count.total:,}, of which {count.activated:,} activated a token |
| trained on | {progress.tokens:,} tokens in {progress.step:,} steps of {config.train.sequence_length}-token sequences |
| validation | {measured} |
| compute dtype | {config.train.compute_dtype} |
| seed | {config.seed} |

Made with Abyssal. The output is what so small a model learned in that time: it may be wrong, and it repeats its data.

## Recipe

As it was resolved for the run, without the places of its data and its layout over ranks.

```toml
{recipe}```
"""
