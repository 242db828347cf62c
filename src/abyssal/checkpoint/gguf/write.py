"""A GGUF file of a model directory, for llama.cpp and what is built on it: written as a stream, whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from gguf import GGML_QUANT_VERSION, GGMLQuantizationType, GGUFWriter, LlamaFileType, size_label

from abyssal.checkpoint.gguf.config import ARCHITECTURE, add_config, remarks, unsayable
from abyssal.checkpoint.gguf.tensors import BF16, F32, MOST, Q8_0, GgufTensor, encode, gguf_tensors
from abyssal.checkpoint.gguf.tokenizer import add_tokenizer
from abyssal.checkpoint.hf.read import ModelReader, read_model_directory
from abyssal.config import ModelConfig
from abyssal.errors import ModelDirectoryError, UsageError, nearest
from abyssal.files.atomic import atomic_file
from abyssal.files.faults import check_free_space, os_faults

#: What matrices can be written in, and llama.cpp's number for a file of mostly that.
DTYPES = {
    "f32": (F32, LlamaFileType.ALL_F32),
    "bf16": (BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
#: Values that are converted at a time: 8 MiB of fp32, whatever the size of the model. Larger blocks are slower, as the
#: allocator then asks the system for new memory each time.
BLOCK_VALUES = 1 << 21


def write_gguf(
    source: Path, target: Path, *, dtype: str = "bf16", on_progress: Callable[[int, int], None] | None = None
) -> list[str]:
    """Write the main model of a model directory and its tokenizer as one GGUF file, whole or not at all.

    Tensors are read, converted and written in blocks of rows. Norms, router and selection bias are fp32 in every file.

    Args:
        source: the model directory.
        target: the file to appear; nothing may stand there.
        dtype: what matrices become: f32, bf16 or q8_0 (8 bits, one fp16 scale for 32 values of a row).
        on_progress: called with the bytes of tensors written and to write.

    Returns:
        In what the file is less than the directory, a sentence each.

    Raises:
        UsageError: an unknown `dtype`.
        DataError: the tokenizer is not one that a GGUF file can hold.
        ModelDirectoryError: the directory is not whole or of another architecture, GGUF cannot say its shape, a value
            is not finite or too large, something stands at `target`, or the disk refused.
    """
    if dtype not in DTYPES:
        raise UsageError(f"dtype={dtype}: must be one of {', '.join(DTYPES)}{nearest(dtype, DTYPES)}")
    config, reader = read_model_directory(source)
    if fault := unsayable(config):
        raise ModelDirectoryError(f"{source}: cannot become a GGUF file: {fault}")
    reader.check(allow_missing_mtp=True)
    if target.exists():
        raise ModelDirectoryError(f"{target}: exists, and is not replaced; remove it or choose another path")
    kind, file_type = DTYPES[dtype]
    tensors = list(gguf_tensors(config, kind))
    total = sum(tensor.nbytes for tensor in tensors)
    with os_faults(ModelDirectoryError, target, "write the GGUF file"):
        target.parent.mkdir(parents=True, exist_ok=True)
        check_free_space(target, total, ModelDirectoryError)
        with atomic_file(target) as staging:
            writer = GGUFWriter(staging, ARCHITECTURE)
            try:
                _add_keys(writer, source, config, file_type)
                done = 0
                for written in _write(writer, tensors, reader):
                    done += written
                    if on_progress is not None:
                        on_progress(done, total)
            finally:
                writer.close()
    return [*remarks(config), *_fallbacks(tensors, kind)]


def _add_keys(writer: GGUFWriter, source: Path, config: ModelConfig, file_type: LlamaFileType) -> None:
    writer.add_type("model")
    writer.add_name(source.resolve().name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    add_config(writer, config)
    add_tokenizer(writer, source, config.vocab_size)


def _write(writer: GGUFWriter, tensors: list[GgufTensor], reader: ModelReader) -> Iterator[int]:
    """Write keys, the list of tensors and then the tensors themselves, and yield the bytes of each block."""
    for tensor in tensors:
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, tensor.kind)
    writer.add_size_label(size_label(*writer.get_total_parameter_count()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None  # of an open writer: the one file
    file = writer.fout[0]
    writer.write_padding(file, file.tell())
    # not by the writer's own `write_tensor_data`, which takes a tensor in one piece: all experts of a layer
    for tensor in tensors:
        for block in _blocks(tensor, reader):
            yield file.write(block.data)
        writer.write_padding(file, tensor.nbytes)


def _blocks(tensor: GgufTensor, reader: ModelReader) -> Iterator[np.ndarray]:
    """Yield the bytes of a tensor, some rows at a time."""
    for part in tensor.parts:
        taken = tensor.take(reader.part(part, torch.float32))
        rows = taken.reshape(-1, taken.shape[-1])
        for block in rows.split(max(1, BLOCK_VALUES // rows.shape[1])):
            low, high = (bound.item() for bound in block.aminmax())  # both NaN where any value is
            largest, most = max(high, -low), MOST[tensor.kind]
            if not largest <= most:
                raise ModelDirectoryError(
                    f"{reader.path}: {part} holds {largest:.3g}; {tensor.kind.name} holds no more than {most:.3g}"
                )
            yield encode(block, tensor.kind)


def _fallbacks(tensors: list[GgufTensor], kind: GGMLQuantizationType) -> list[str]:
    """Return which matrices could not be written in `kind`."""
    if kind != Q8_0:
        return []
    names = sorted({tensor.name.split(".")[-2] for tensor in tensors if tensor.kind == BF16})
    return [f"in bf16, as their rows are no multiples of 32: {', '.join(names)}"] if names else []
