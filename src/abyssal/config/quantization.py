"""The one quantisation of weights that is read and written: FP8 with a scale a block, as released."""

from __future__ import annotations

from typing import Any, Literal, Self

from abyssal.config.frozen import Frozen
from abyssal.errors import ConfigError


class BlockFP8(Frozen):
    """The `quantization_config` of a config.json: e4m3 weights with a scale for each block of 128 x 128.

    Which tensors are FP8 is told by the files themselves.
    """

    quant_method: Literal["fp8"] = "fp8"
    fmt: Literal["e4m3"] = "e4m3"
    weight_block_size: tuple[Literal[128], Literal[128]] = (128, 128)
    #: How activations are quantised in somebody's FP8 product; the weights are the same.
    activation_scheme: str = "dynamic"
    #: `ue8m0` where every scale is a power of two, as in V3.1.
    scale_fmt: Literal["float", "ue8m0"] | None = None

    @property
    def power_of_two(self) -> bool:
        """Whether every scale is a power of two."""
        return self.scale_fmt == "ue8m0"

    @classmethod
    def from_hf(cls, values: dict[str, Any], source: str = "config") -> Self | None:
        """Return what the fields of a config.json say of quantisation, none where they say nothing.

        Lists of the layers that are not FP8 (`modules_to_not_convert`, `ignored_layers`) are passed over.

        Raises:
            ConfigError: another quantisation, or another size of blocks.
        """
        stored = values.get("quantization_config")
        if stored is None:
            return None
        if not isinstance(stored, dict):
            raise ConfigError(f"{source}: quantization_config={stored!r}: must be an object")
        method = stored.get("quant_method")
        if method != "fp8":
            raise ConfigError(
                f"{source}: quantization_config.quant_method={method!r}: only 'fp8' with blocks of 128 x 128 is read; "
                "use a bf16 or FP8 copy of this model"
            )
        lists = {"modules_to_not_convert", "ignored_layers", "dequantize"}
        fields = {"weight_block_size": None} | {name: value for name, value in stored.items() if name not in lists}
        return cls.parse(fields, f"{source}: quantization_config")

    def to_hf(self) -> dict[str, Any]:
        """Return the `quantization_config` of a config.json, as released."""
        return self.model_dump(mode="json", exclude_none=True)
