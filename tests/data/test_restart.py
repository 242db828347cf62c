import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from abyssal.config.run import DataConfig, TokenizerConfig
from abyssal.data import encode
from abyssal.data.manifest import MANIFEST_NAME
from abyssal.data.prepare import UNFINISHED, prepare

pytestmark = pytest.mark.slow

VOCAB = 300
#: Prepares data, and kills itself without a warning as file number sys.argv[3] gets its name.
PROGRAM = """
import os, pathlib, signal, sys
import abyssal.data.prepare as module
from abyssal.config.run import DataConfig, TokenizerConfig
module.SHARD_BYTES = (2000, 2000)
left, real = [int(sys.argv[3])], pathlib.Path.replace
def replace(path, target):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(path, target)
pathlib.Path.replace = replace
config = DataConfig(corpus=(sys.argv[1],), split_modulus=5, fim_rate=0.5)
module.prepare(config, TokenizerConfig(), 300, pathlib.Path(sys.argv[2]), seed=3)
"""


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("abyssal.data.prepare.SHARD_BYTES", (2000, 2000))


def config(corpus: Path, **fields) -> DataConfig:
    return DataConfig(corpus=(str(corpus),), split_modulus=5, **({"fim_rate": 0.5} | fields))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def killed(corpus: Path, out: Path, at: int) -> None:
    program = [sys.executable, "-c", PROGRAM, str(corpus), str(out), str(at)]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    assert subprocess.run(program, env=environment, check=False).returncode == -signal.SIGKILL
    assert not (out / MANIFEST_NAME).exists()


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the shards that are made from now on."""
    names, real = list[str](), encode.write_shard

    def write_shard(stem: Path, *rest):
        names.append(stem.name)
        return real(stem, *rest)

    monkeypatch.setattr(encode, "write_shard", write_shard)
    return names


@pytest.mark.parametrize("at", [1, 3, 9, 14])
def test_killed_preparation_goes_on_and_ends_the_same(corpus: Path, tmp_path: Path, encoded, at: int) -> None:
    prepare(config(corpus), TokenizerConfig(), VOCAB, tmp_path / "whole", seed=3)
    every = encoded.copy()
    killed(corpus, tmp_path / "data", at)
    finished = {path.stem for path in (tmp_path / "data").glob("train-*.json")}
    assert (len(finished) > 0) == (at > 5)
    encoded.clear()
    prepare(config(corpus), TokenizerConfig(), VOCAB, tmp_path / "data", seed=3)
    assert set(encoded) == set(every) - finished
    assert content(tmp_path / "data") == content(tmp_path / "whole")


def test_finished_shard_that_is_damaged_is_made_again(corpus: Path, tmp_path: Path, encoded) -> None:
    killed(corpus, tmp_path / "data", 14)
    path = tmp_path / "data" / "train-00001.tokens.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    prepare(config(corpus), TokenizerConfig(), VOCAB, tmp_path / "data", seed=3)
    assert "train-00001" in encoded
    assert "train-00000" not in encoded
    assert path.read_bytes() == whole


@pytest.mark.parametrize("change", ["seed", "recipe", "document"])
def test_other_inputs_begin_anew(corpus: Path, tmp_path: Path, encoded, change: str) -> None:
    killed(corpus, tmp_path / "data", 14)
    if change == "document":
        (corpus / "new.txt").write_text("one more document")
    fields, seed = ({"fim_rate": 0.2} if change == "recipe" else {}), 4 if change == "seed" else 3
    prepare(config(corpus, **fields), TokenizerConfig(), VOCAB, tmp_path / "data", seed=seed)
    assert "train-00000" in encoded
    prepare(config(corpus, **fields), TokenizerConfig(), VOCAB, tmp_path / "whole", seed=seed)
    assert content(tmp_path / "data") == content(tmp_path / "whole")
    names = {path.name for path in (tmp_path / "data").iterdir()}
    assert not any(".writing-" in name or name == UNFINISHED for name in names)
