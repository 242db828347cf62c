from pathlib import Path

import pytest
from rich.console import Console

from abyssal.config import RunConfig, load_recipe
from abyssal.config.run import DataConfig, SourceConfig, TokenizerConfig
from abyssal.data.batch import windows_by_source
from abyssal.data.prepare import prepare
from abyssal.data.shards import Shards
from abyssal.errors import ConfigError, DataError
from abyssal.text.tokenizer import Tokenizer
from abyssal.train.inputs import Inputs, open_inputs, prepare_inputs


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """Two sources, each of letters that the other lacks."""
    found = {}
    for name, letters in (("low", "abcde "), ("high", "VWXYZ ")):
        found[name] = tmp_path / name
        found[name].mkdir()
        for n in range(60):
            own = "".join(letters[n // 5**place % 5] for place in range(3))
            (found[name] / f"{n}.txt").write_text((letters * 3 + own) * (n % 5 + 3))
    return found


def prepared(run: RunConfig, folder: Path) -> Inputs:
    prepare_inputs(run, folder, Console())
    return open_inputs(run, folder)


def config(folders: dict[str, Path], shares: dict[str, float], **fields) -> DataConfig:
    sources = tuple(SourceConfig(name=name, paths=(str(folders[name]),), weight=shares[name]) for name in shares)
    return DataConfig(sources=sources, split_modulus=5, **fields)


def run_of(small_run: RunConfig, data: DataConfig) -> RunConfig:
    return small_run.model_copy(update={"data": data})


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("abyssal.data.prepare.SHARD_BYTES", (2000, 2000))


def test_sequences_come_from_the_sources_by_weight(folders, small_run, tmp_path: Path) -> None:
    inputs = prepared(run_of(small_run, config(folders, {"low": 3, "high": 1})), tmp_path / "out")
    tokenizer = Tokenizer.load(tmp_path / "out")
    texts = [tokenizer.decode(row.tolist()) for row in inputs.loader.batch(0, 60).tokens]
    low = [bool(set(text) & set("abcde")) for text in texts]
    assert [bool(set(text) & set("VWXYZ")) for text in texts] == [not one for one in low]  # no window of both
    for n in range(1, 61):
        assert abs(sum(low[:n]) - 0.75 * n) < 1


def test_windows_of_a_source_cover_its_tokens_once_an_epoch(folders, small_run, tmp_path: Path) -> None:
    data = config(folders, {"low": 1, "high": 1})
    inputs = prepared(run_of(small_run, data), tmp_path / "out")
    shards = Shards.open(tmp_path / "out", "train")
    windows = windows_by_source(shards, 32)
    assert set(windows) == {"low", "high"}
    assert min(windows.values()) > 5
    rows = inputs.loader.batch(0, 2 * max(windows.values())).tokens.tolist()
    for name, tokens in shards.sources.items():
        stream = shards.tokens[tokens.start : tokens.stop].tolist()
        expected = {tuple(stream[32 * n : 32 * n + 33]) for n in range(windows[name])}
        assert expected <= set(map(tuple, rows))


def test_weights_may_change_without_preparing_again(folders, tmp_path: Path) -> None:
    first = prepare(config(folders, {"low": 3, "high": 1}), TokenizerConfig(), 300, tmp_path / "out", seed=1)
    assert [source.name for source in first.sources] == ["low", "high"]
    assert sum(source.tokens for source in first.sources) == first.splits["train"].tokens
    assert sum(source.shards for source in first.sources) == len(first.splits["train"].shards) > 3
    again = config(folders, {"low": 1, "high": 1}, weights={"high": 7.0})
    assert prepare(again, TokenizerConfig(), 300, tmp_path / "out", seed=1) == first
    assert again.mixture == {"low": 1, "high": 7}
    with pytest.raises(DataError, match="was prepared "):
        prepare(config(folders, {"low": 3}), TokenizerConfig(), 300, tmp_path / "out", seed=1)


@pytest.mark.parametrize(
    ("recipe", "sentence"),
    [
        ('sources = [{name = "a", paths = ["x"], weight = 0}]', r"data\.sources\.0\.weight=0: input should be greater"),
        ('sources = [{name = "a", weight = 1}]', r"data\.sources\.0\.paths: required, but not given"),
        ('sources = [{name = "a", paths = []}]', r"data\.sources\.0\.paths=\[\]: "),
        ('sources = [{name = "a", paths = ["x"]}, {name = "a", paths = ["y"]}]', r"two are named 'a'"),
        ('sources = [{name = "a", paths = ["x"]}]\ncorpus = ["y"]', r"corpus=\['y'\]: must be empty beside data\.sou"),
        (
            'sources = [{name = "code", paths = ["x"]}]\nweights = {cod = 1}',
            r"data\.weights\.cod: .*nearest: code; the",
        ),
        ("weights = {code = 1}", r"data\.weights\.code: no such source; there are: none, since data\.sources is empty"),
        ('sources = [{name = "code", paths = ["x"]}]\nweights = {code = -1}', r"data\.weights\.code=-1: input should"),
    ],
)
def test_faulty_mixture_is_a_sentence(tmp_path: Path, recipe: str, sentence: str) -> None:
    path = tmp_path / "r.toml"
    path.write_text(f'extends = "demo"\nunset = ["data.corpus"]\n[data]\n{recipe}\n')
    with pytest.raises(ConfigError, match=sentence):
        load_recipe(str(path))


def test_source_without_documents_is_named(folders, tmp_path: Path) -> None:
    folders["none"] = tmp_path / "none"
    with pytest.raises(DataError, match=r"^data\.sources\.none\.paths='.*none': no such file or folder"):
        prepare(config(folders, {"low": 1, "none": 1}), TokenizerConfig(), 300, tmp_path / "out", seed=1)
    folders["none"].mkdir()
    with pytest.raises(DataError, match=r"^data\.sources\.none\.paths='.*none': no documents there"):
        prepare(config(folders, {"low": 1, "none": 1}), TokenizerConfig(), 300, tmp_path / "out", seed=1)
    (folders["none"] / "a.txt").touch()
    with pytest.raises(
        DataError, match=r"^data\.sources\.none: none of its documents is left .* weight cannot be kept"
    ):
        prepare(config(folders, {"low": 1, "none": 1}), TokenizerConfig(), 300, tmp_path / "out", seed=1)


def test_source_shorter_than_a_window_is_named(folders, small_run, tmp_path: Path) -> None:
    folders["tiny"] = tmp_path / "tiny"
    folders["tiny"].mkdir()
    for n in range(4):
        (folders["tiny"] / f"{n}.txt").write_text(str(n))
    with pytest.raises(DataError, match=r"data\.sources\.tiny has \d+ training tokens, but train\.sequence_length=32"):
        prepared(run_of(small_run, config(folders, {"low": 1, "tiny": 1})), tmp_path / "out")
