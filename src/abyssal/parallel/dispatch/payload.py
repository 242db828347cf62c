"""What a row is sent as.

Legend: S rows, D hidden, C = ceil(D / 128).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from abyssal.ops.row_fp8 import dequantise_rows, quantise_rows


class PlainPayload:
    """Rows as they are. A payload encodes rows [S, D] into what is sent, a row each, and decodes what is received."""

    def encode(self, rows: Tensor) -> Tensor:
        """Return them."""
        return rows

    def decode(self, payload: Tensor) -> Tensor:
        """Return them."""
        return payload


@dataclass(frozen=True)
class Fp8Payload:
    """A byte a value, and one for the scale of each 128, a power of two. Paper: §3.3.2, §3.3.3."""

    width: int  # D
    dtype: torch.dtype  # of the rows

    def encode(self, rows: Tensor) -> Tensor:
        """Return [S, D + C] bytes, values and then scales."""
        fp8, scale = quantise_rows(rows, power_of_two=True)
        return torch.cat([fp8.view(torch.uint8), scale.to(torch.float8_e8m0fnu).view(torch.uint8)], 1)

    def decode(self, payload: Tensor) -> Tensor:
        """Return values times scales, rounded to the rows' dtype: [S, D]."""
        fp8, scale = payload[:, : self.width], payload[:, self.width :]
        return dequantise_rows(fp8.view(torch.float8_e4m3fn), scale.view(torch.float8_e8m0fnu), self.dtype)


Payload = PlainPayload | Fp8Payload
