"""`abyssal inspect` and `abyssal recipes`."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from abyssal.cli.inspect import describe_schedule
from abyssal.cli.main import main
from abyssal.config import Segment, ValueSchedule, load_recipe, packaged_recipes
from abyssal.report.numbers import byte_size, short


@pytest.fixture
def run(capfd, monkeypatch):
    """Run the command line in this process on a wide terminal: exit code, stdout, stderr."""
    monkeypatch.setenv("COLUMNS", "240")

    def call(*arguments):
        code = main(arguments)
        return code, *capfd.readouterr()

    return call


@pytest.fixture
def model_dir(tmp_path):
    fields = load_recipe("v3_16b").model.to_hf()
    (tmp_path / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    return str(tmp_path)


def test_a_recipe_is_shown_with_the_published_figures(run):
    code, out, err = run("inspect", "v3_671b")
    assert (code, err) == (0, "")
    for figure in (
        "671,026,419,200",
        "37,552,297,472",
        "11,610,068,224",
        "671B parameters, 37.55B activated a token",
        "684.5B with the MTP modules",
        "260.6B FLOPs a token at length 4,096; without MTP 250.5B (attention counted as not causal: 281.2B)",
        "70,272 bytes a token in bfloat16; 287.8 MB for the whole context of 4,096",
        "14.8T tokens in 242,785 steps of 12.58M to 62.91M tokens; sequences of 4,096",
        "0, linear to 0.00022 at 28.1B, constant until 10T, cosine to 2.2e-05 at 14.3T",
        "3072, linear to 15360 at 469B",
    ):
        assert figure in out


def test_json_has_every_figure_exact(run):
    code, out, _ = run("inspect", "v3_671b", "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["name"] == "v3_671b"
    assert facts["parameters"]["release"] == 684_489_845_504
    assert sum(facts["parameters"]["parts"]["main"].values()) == facts["parameters"]["total"] == 671_026_419_200
    assert facts["cache_bytes_per_token"] == 70_272
    assert facts["flops_per_token"]["training_without_mtp"] == pytest.approx(250e9, rel=0.01)
    assert facts["run"]["steps"] == 242_785
    assert facts["run"]["schedule"]["batch_size"]["start"] == 3072


def test_a_model_directory_needs_only_its_config(run, model_dir):
    code, out, _ = run("inspect", model_dir)
    assert code == 0
    assert "15,706,485,888" in out
    assert "steps of" not in out
    assert "weights  no files" in out
    facts = json.loads(run("inspect", model_dir, "--json")[1])
    assert "run" not in facts
    assert facts["parameters"] == json.loads(run("inspect", "v3_16b", "--json")[1])["parameters"]


def test_the_files_of_a_model_directory_are_described(run, model_folder):
    code, out, err = run("inspect", str(model_folder))
    facts = json.loads(run("inspect", str(model_folder), "--json")[1])["weights"]
    held = load_file(model_folder / "model.safetensors")
    assert (code, err) == (0, "")
    assert facts["bytes"] == sum(facts["bytes_by_dtype"].values()) == sum(t.nbytes for t in held.values())
    assert facts["num_tensors"] == len(held)
    assert f"{len(held)} tensors in 1 file: {byte_size(facts['bytes'])} F32" in out
    assert "experts one by one, head own, 1 of 1 MTP modules" in out
    for word in ("missing", "surplus", "no file"):
        assert word not in out


def test_what_is_wrong_with_the_files_is_shown_and_is_no_failure(run, model_folder):
    held = load_file(model_folder / "model.safetensors")
    del held["lm_head.weight"]
    del held["model.layers.2.mlp.experts.4.up_proj.weight"]
    save_file(held | {"model.norm.weight": torch.ones(7), "odd": torch.ones(1)}, model_folder / "model.safetensors")
    (model_folder / "tokenizer.json").unlink()
    code, out, _ = run("inspect", str(model_folder))
    lines = {line.split()[0]: line for line in out.splitlines() if line.strip()}
    assert code == 0
    assert "lm_head.weight" in lines["missing"]
    assert "model.layers.2.mlp.experts.4.up_proj.weight" in lines["missing"]
    assert lines["surplus"].split() == ["surplus", "odd"]
    assert "model.norm.weight is [7] instead of [20]" in lines["shape"]
    assert lines["no"].split() == ["no", "file", "tokenizer.json"]


def test_damaged_files_are_a_failure(run, model_folder):
    file = model_folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    code, out, err = run("inspect", str(model_folder))
    assert (code, out) == (1, "")
    assert "truncated, or not a safetensors file" in err


def test_set_changes_the_recipe(run):
    facts = [
        json.loads(run("inspect", "v3_16b", "--json", *changes)[1])
        for changes in ([], ["--set", "model.vocab_size=204800", "--set", "train.tokens=4096"])
    ]
    plain, changed = (f["parameters"]["parts"]["main"]["embedding"] for f in facts)
    assert changed == 2 * plain
    assert facts[1]["run"]["steps"] == 1


def test_a_run_with_a_time_budget_says_so(run):
    out = run("inspect", "v3_16b", "--set", "train.time_budget_s=480")[1]
    assert "what fits into 480 s on this machine, measured at its start; else 1.33T tokens in 70,466 steps" in out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["demmo"], "error: demmo: no such recipe; nearest: demo"),
        (["gone/model"], "gone/model: cannot read this recipe (No such file or directory)"),
        (["v3_16b", "--set", "model.n_group=3"], "error: v3_16b: model.n_group=3: must divide n_routed_experts=64"),
    ],
)
def test_a_wrong_target_is_a_sentence_and_exit_code_2(run, arguments, sentence):
    code, out, err = run("inspect", *arguments)
    assert (code, out) == (2, "")
    assert sentence in err


def test_a_folder_without_a_config_is_refused(run, tmp_path):
    code, _, err = run("inspect", str(tmp_path))
    assert code == 2
    assert err == f"error: {tmp_path / 'config.json'}: no such file; a model directory needs a config.json\n"


def test_a_model_directory_cannot_be_overridden(run, model_dir):
    code, _, err = run("inspect", model_dir, "--set", "model.n_group=2")
    assert code == 2
    assert "only a recipe can be changed" in err


def test_a_recipes_name_means_the_recipe_whatever_folders_are_there(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    assert run("inspect", "demo")[0] == 0
    assert run("inspect", "./demo")[0] == 2


def test_recipes_lists_every_recipe_with_its_size(run):
    code, out, _ = run("recipes")
    lines = {line.split()[0]: line for line in out.splitlines()[1:]}
    assert code == 0
    assert list(lines) == packaged_recipes()
    assert lines["v3_671b"].split()[1:4] == ["671B", "682.6B", "37.55B"]
    assert "pre-training at 4K on 14.8T tokens" in lines["v3_671b"]


def test_a_schedule_in_words():
    schedule = ValueSchedule(
        start=0.5,
        unit="fraction",
        segments=(
            Segment(until=0.1, shape="linear", to=2),
            Segment(until=0.25),
            Segment(until=0.5, shape="constant", to=1),
            Segment(until=1, shape="cosine", to=0),
        ),
    )
    assert describe_schedule(schedule) == (
        "0.5, linear to 2 at 10% of the run, constant until 25% of the run, 1 until 50% of the run, "
        "cosine to 0 at the end"
    )
    assert describe_schedule(ValueSchedule(start=3)) == "3"


@pytest.mark.parametrize(
    ("value", "text", "size"),
    [
        (0, "0", "0 B"),
        (640, "640", "640 B"),
        (999.9, "999.9", "999.9 B"),
        (999.99, "1K", "1 kB"),
        (70_272, "70.27K", "70.27 kB"),
        (2.5e6, "2.5M", "2.5 MB"),
        (684_489_845_504, "684.5B", "684.5 GB"),
        (14.8e12, "14.8T", "14.8 TB"),
    ],
)
def test_numbers_for_people(value, text, size):
    assert short(value) == text
    assert byte_size(value) == size
