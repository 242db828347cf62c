"""What stands beside the weights: config.json for the new format, and everything else as it was."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from abyssal.checkpoint.convert.manifest import MANIFEST
from abyssal.checkpoint.convert.plan import Conversion
from abyssal.checkpoint.hf.files import CONFIG
from abyssal.config import ModelConfig
from abyssal.config.quantization import BlockFP8

WEIGHTS = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack", ".gguf", ".onnx")


def files_to_copy(source: Path) -> tuple[list[Path], list[str]]:
    """Return the files of a model directory to copy, and the names of what is left out.

    Copied are tokenizer, generation_config.json, chat template, model card, licence and code: every file that is
    neither hidden nor weights nor written anew. Left out are folders and weights in other formats; of safetensors and
    hidden files nobody is told.
    """
    copied, left = [], []
    for path in sorted(source.iterdir()):
        if path.name.startswith(".") or path.name in (CONFIG, MANIFEST):
            continue
        if path.is_dir():
            left.append(f"{path.name}/")
        elif not path.name.endswith(WEIGHTS):
            copied.append(path)
        elif not path.name.endswith((".safetensors", ".index.json")):
            left.append(path.name)
    return copied, left


def copy_side_files(files: list[Path], folder: Path) -> None:
    """Copy the files into `folder`.

    Raises:
        OSError: the disk refused.
    """
    for path in files:
        shutil.copyfile(path, folder / path.name)


def converted_config(
    fields: Mapping[str, Any], config: ModelConfig, conversion: Conversion, scheme: BlockFP8 | None
) -> dict[str, Any]:
    """Return the config.json of the output: the input's fields, those of the number format changed.

    Keys that some engine needs and the input left out are added (`ModelConfig.to_hf`); those of RoPE only where the
    input does not have them in transformers' newer spelling.

    Args:
        fields: the input's config.json.
        config: the shape of the output, with the MTP modules that it holds.
        conversion: what was asked for.
        scheme: of the FP8 weights that keep their scales, if there are such.
    """
    dtype = "float32" if conversion.to == "fp32" else "bfloat16"
    changed = {key: dtype for key in ("dtype", "torch_dtype") if key in fields}
    # groups as they are: `to_hf` writes all of them as one, which would not go with the input's own of the two fields
    added = config.to_hf(dtype) | {"n_group": config.n_group, "topk_group": config.topk_group}
    if "rope_parameters" in fields:
        del added["rope_scaling"], added["rope_theta"]
    result = added | dict(fields) | changed | {"num_nextn_predict_layers": config.num_nextn_predict_layers}
    result.pop("quantization_config", None)
    if conversion.to == "fp8":
        made = BlockFP8(scale_fmt="ue8m0" if conversion.power_of_two else None)
        result["quantization_config"] = (scheme or made).to_hf()
    return result
