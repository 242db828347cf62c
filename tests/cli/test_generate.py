from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from abyssal.cli.main import main
from abyssal.engine import SamplingParameters, load_model
from engine.oracle import generate_text

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def continuation(model_folder: Path) -> Callable[..., str]:
    """Return what the engine itself makes of a prompt."""
    loaded = load_model(model_folder)

    def text(prompt: str, parameters: SamplingParameters, *, bos: bool = True) -> str:
        return "".join(chunk.text for chunk in generate_text(loaded, loaded.encode_prompt(prompt, bos=bos), parameters))

    return text


def give_input(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="ascii"))


def test_nothing_but_the_text_is_on_standard_output_and_a_summary_on_the_other(
    model_folder: Path, continuation: Callable[..., str], capsys: Capture
) -> None:
    assert (
        main(["generate", str(model_folder), "--prompt", "def f", "--temperature", "0", "--max-new-tokens", "9"]) == 0
    )
    out, err = capsys.readouterr()
    assert out == continuation("def f", SamplingParameters(9, temperature=0))
    summary = r"\d+ prompt tokens in \d+\.\d\d s, 9 new tokens at \d+\.\d tokens/s; ended by its length\n"
    assert re.fullmatch(summary, err)


def test_every_option_reaches_the_sampling(
    model_folder: Path, continuation: Callable[..., str], capsys: Capture
) -> None:
    parameters = SamplingParameters(25, temperature=1.7, top_p=0.8, top_k=40, seed=3)
    text = continuation("x", parameters, bos=False)
    stop = (text[8:10], text[14:15])
    options = (
        "--max-new-tokens 25 --temperature 1.7 --top-p 0.8 --top-k 40 --seed 3 --no-bos --dtype float32 --device cpu"
    )
    stops = [word for string in stop for word in ("--stop", string)]
    assert main(["generate", str(model_folder), "--prompt", "x", *options.split(), *stops]) == 0
    out, err = capsys.readouterr()
    assert out == text[: min(text.index(string) for string in stop)]
    assert err.endswith("ended by a stop string\n")


def test_what_is_not_given_comes_from_the_model_directory(
    model_folder: Path, continuation: Callable[..., str], capsys: Capture
) -> None:
    assert main(["generate", str(model_folder), "--prompt", "x", "--seed", "7"]) == 0
    out, err = capsys.readouterr()
    assert out == continuation("x", SamplingParameters(128, temperature=0.9, seed=7))
    assert out != continuation("x", SamplingParameters(128, seed=7))
    room = 64 - 2
    assert err.startswith(
        f"note: max_new_tokens=128: only {room} tokens fit behind a prompt of 2 (max_position_embeddings=64)\n"
    )


def test_a_dash_reads_the_prompt_from_standard_input_as_utf8(
    model_folder: Path, continuation: Callable[..., str], capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_input(monkeypatch, "# naïve\n".encode())
    assert main(["generate", str(model_folder), "--prompt", "-", "--temperature", "0", "--max-new-tokens", "5"]) == 0
    assert capsys.readouterr().out == continuation("# naïve\n", SamplingParameters(5, temperature=0))


@pytest.mark.parametrize(
    ("options", "code", "sentence"),
    [
        (["--prompt", "x", "--temperature", "-1"], 2, "temperature=-1.0: must be a number of at least 0"),
        (["--prompt", "x", "--top-p", "0"], 2, "top_p=0.0: must be above 0"),
        (["--prompt", "x", "--max-new-tokens", "0"], 2, "max_new_tokens=0: must be a whole number, at least 1"),
        (["--prompt", "x", "--stop", ""], 2, "stop=('',): must be a tuple of strings, none of them empty"),
        (["--prompt", "x", "--dtype", "float16"], 2, "dtype=float16: must be one of auto"),
        (["--prompt", "x", "--device", "tpu"], 2, "device=tpu: must be cpu"),
        (["--prompt", "", "--no-bos"], 2, "prompt: has no tokens"),
        (["--prompt", "x" * 64], 2, "prompt: has 65 tokens"),
        ([], 2, "give a --prompt"),
        (["--prompt", "-"], 1, "standard input: byte 1 is not UTF-8"),
    ],
    ids=lambda value: " ".join(value)[:20] if isinstance(value, list) else None,
)
def test_bad_input_ends_in_one_sentence_and_its_exit_code(
    model_folder: Path, options: list[str], code: int, sentence: str, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_input(monkeypatch, b"a\xff")
    assert main(["generate", str(model_folder), *options]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert sentence in err


def test_a_bad_option_is_refused_before_the_model_is_read(tmp_path: Path, capsys: Capture) -> None:
    assert main(["generate", str(tmp_path / "nothing"), "--prompt", "x", "--top-k", "-2"]) == 2
    assert "top_k=-2" in capsys.readouterr().err


@pytest.mark.parametrize("lost", ["tokenizer.json", "model.safetensors"])
def test_an_incomplete_model_directory_is_a_failure(model_folder: Path, lost: str, capsys: Capture) -> None:
    (model_folder / lost).unlink()
    assert main(["generate", str(model_folder), "--prompt", "x"]) == 1
    assert lost in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "places"),
    [(["--speculate"], 1), (["--drafts", "3"], 3), (["--speculate", "--drafts", "2"], 2)],
    ids=str,
)
def test_speculation_leaves_the_text_alone_and_tells_what_became_of_the_drafts(
    model_folder: Path, continuation: Callable[..., str], capsys: Capture, options: list[str], places: int
) -> None:
    arguments = ["--prompt", "def f", "--temperature", "0", "--max-new-tokens", "20", *options]
    assert main(["generate", str(model_folder), *arguments]) == 0
    out, err = capsys.readouterr()
    assert out == continuation("def f", SamplingParameters(20, temperature=0))
    by_place = rf" \(by place: {', '.join([r'[0-9]+/[0-9]+'] * places)}\)" if places > 1 else ""
    line = rf"speculation: \d+/\d+ drafts accepted, \d+%{by_place}; \d\.\d\d tokens a pass\n"
    assert re.search(line + r"\Z", err)


def test_speculation_without_mtp_modules_is_refused(model_folder: Path, capsys: Capture) -> None:
    from safetensors.torch import load_file, save_file

    file = model_folder / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(file).items() if not name.startswith("model.layers.3.")}
    save_file(kept, file, metadata={"format": "pt"})
    assert main(["generate", str(model_folder), "--prompt", "x", "--speculate"]) == 2
    assert "drafts come from MTP modules, and this model has none" in capsys.readouterr().err


def test_fewer_drafts_than_one_are_refused(model_folder: Path, capsys: Capture) -> None:
    assert main(["generate", str(model_folder), "--prompt", "x", "--drafts", "0"]) == 2
    assert "drafts=0: must be at least 1" in capsys.readouterr().err


def test_a_suffix_makes_a_gap_that_the_model_fills(model_folder: Path, capsys: Capture) -> None:
    loaded = load_model(model_folder)
    ids = loaded.tokenizer.encode_document
    special = [loaded.tokenizer.encode(name)[0] for name in ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>")]
    prompt = [0, special[0], *ids("def f<｜User｜>"), special[1], *ids("return é"), special[2]]
    parameters = SamplingParameters(12, temperature=0)
    wanted = "".join(chunk.text for chunk in generate_text(loaded, prompt, parameters))
    options = ["--prompt", "def f<｜User｜>", "--suffix", "return é", "--temperature", "0", "--max-new-tokens", "12"]
    assert main(["generate", str(model_folder), *options]) == 0
    out, err = capsys.readouterr()
    assert out == wanted
    assert err.startswith(f"{len(prompt)} prompt tokens")
    assert main(["generate", str(model_folder), *options, "--no-bos"]) == 0
    assert capsys.readouterr().err.startswith(f"{len(prompt) - 1} prompt tokens")


@pytest.mark.parametrize("ending", ["eos", "stop"])
def test_the_middle_ends_where_a_text_does(model_folder: Path, capsys: Capture, ending: str) -> None:
    """At the token that ends documents, which is made of one that comes up, and at a stop string."""
    loaded = load_model(model_folder)
    tokens = [
        chunk.token.id
        for chunk in generate_text(loaded, loaded.encode_gap("a", "b"), SamplingParameters(20, temperature=0))
    ]
    place = next(place for place in range(1, 20) if tokens[place] not in tokens[:place])
    middle = loaded.tokenizer.decode(tokens[:place], skip_special=False)
    options = ["--prompt", "a", "--suffix", "b", "--temperature", "0", "--max-new-tokens", "20"]
    if ending == "eos":
        path = model_folder / "generation_config.json"
        path.write_text(json.dumps({"eos_token_id": tokens[place]}))
    else:
        stop = loaded.tokenizer.decode(tokens[:20])[3:5]
        middle = loaded.tokenizer.decode(tokens[:20])
        middle = middle[: middle.index(stop)]
        options += ["--stop", stop]
    assert main(["generate", str(model_folder), *options]) == 0
    out, err = capsys.readouterr()
    assert out == middle
    assert err.endswith(f"ended by {'the model' + chr(39) + 's end token' if ending == 'eos' else 'a stop string'}\n")


def test_a_suffix_needs_a_tokenizer_that_knows_gaps(model_folder: Path, capsys: Capture) -> None:
    path = model_folder / "tokenizer.json"
    text = path.read_text(encoding="utf-8").replace("<｜fim▁hole｜>", "<｜fim▁pit｜>")
    path.write_text(text, encoding="utf-8")
    assert main(["generate", str(model_folder), "--prompt", "a", "--suffix", "b"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "suffix: this model's tokenizer lacks <｜fim▁hole｜>, so it was not trained to fill a gap" in err
