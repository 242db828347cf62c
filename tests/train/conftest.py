"""What every test of the training framework needs."""

from __future__ import annotations

import pytest
import torch

from abyssal.train import loop


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what costs seconds and only states MFU."""
    monkeypatch.setattr(loop, "peak_flops", lambda config, device: 1e12)
