"""Recipes: inheritance, overrides and refusals; and the packaged ones."""

import pytest

from abyssal.config import load_recipe, packaged_recipes
from abyssal.errors import ConfigError


def write(folder, name, text):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", packaged_recipes())
def test_every_packaged_recipe_is_valid_and_described(name):
    run = load_recipe(name)
    assert run.name == name
    assert run.description
    assert run.optimizer.betas == (0.9, 0.95)


def test_the_packaged_recipes_are_all_there():
    assert packaged_recipes() == ["demo", "v3_16b", "v3_671b", "v3_671b_128k", "v3_671b_32k"]


def test_tables_merge_and_arrays_replace(tmp_path):
    path = write(
        tmp_path,
        "mine.toml",
        """
        extends = "v3_671b"
        [model]
        hidden_size = 320
        [data]
        suffixes = [".c"]
        [schedule.learning_rate]
        segments = [{ until = 5e12, shape = "linear", to = 1e-3 }]
        """,
    )
    mine, base = load_recipe(path), load_recipe("v3_671b")
    assert mine.model == base.model.model_copy(update={"hidden_size": 320})
    assert mine.data.suffixes == (".c",)
    assert len(mine.schedule.learning_rate.segments) == 1
    assert mine.schedule.learning_rate.start == 0.0  # the rest of that table stays
    assert mine.schedule.mtp_weight == base.schedule.mtp_weight


def test_a_recipe_without_a_name_takes_its_file_name_not_its_bases(tmp_path):
    run = load_recipe(write(tmp_path, "wider.toml", 'extends = "demo"\n'))
    assert run.name == "wider"
    assert run.description == ""


def test_unset_removes_an_inherited_field(tmp_path):
    path = write(tmp_path, "plain.toml", 'extends = "v3_671b"\nunset = ["model.q_lora_rank"]\n')
    assert load_recipe("v3_671b").model.q_lora_rank == 1536
    assert load_recipe(path).model.q_lora_rank is None


def test_unset_can_empty_a_table_that_the_recipe_fills_anew(tmp_path):
    path = write(
        tmp_path,
        "anew.toml",
        'extends = "v3_671b"\nunset = ["schedule.mtp_weight"]\n[schedule.mtp_weight]\nstart = 0.25\n',
    )
    mtp_weight = load_recipe(path).schedule.mtp_weight
    assert (mtp_weight.start, mtp_weight.unit, mtp_weight.segments) == (0.25, "tokens", ())


@pytest.mark.parametrize("field", ["model.q_lora_rnk", "model.q_lora_rank.depth", "modle.q_lora_rank"])
def test_unset_of_what_is_not_there_is_refused(field, tmp_path):
    path = write(tmp_path, "plain.toml", f'extends = "v3_671b"\nunset = ["{field}"]\n')
    with pytest.raises(ConfigError, match="does not set that"):
        load_recipe(path)


def test_paths_start_from_the_file_that_names_them(tmp_path, monkeypatch):
    write(tmp_path, "shared/ground.toml", 'extends = "demo"\n[train]\ntokens = 77\n')
    write(tmp_path, "runs/first.toml", 'extends = "../shared/ground.toml"\nseed = 3\n')
    monkeypatch.chdir(tmp_path / "shared")
    run = load_recipe("../runs/first.toml")
    assert (run.train.tokens, run.seed) == (77, 3)


def test_a_circle_is_refused_with_its_path(tmp_path):
    a = write(tmp_path, "a.toml", 'extends = "b.toml"\n')
    b = write(tmp_path, "b.toml", 'extends = "a.toml"\n')
    with pytest.raises(ConfigError) as caught:
        load_recipe(a)
    assert f"{a}: extends itself through {a} -> {b} -> {a}" in str(caught.value)


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("seed=7", lambda run: run.seed == 7),
        ("train.tokens=1_000_000", lambda run: run.train.tokens == 1_000_000),
        ("model.rope_theta=1e6", lambda run: run.model.rope_theta == 1e6),
        ("train.compute_dtype=float64", lambda run: run.train.compute_dtype == "float64"),
        ('data.suffixes=[".c", ".h"]', lambda run: run.data.suffixes == (".c", ".h")),
        ("init_from=../runs/demo/model", lambda run: run.init_from == "../runs/demo/model"),
        (
            "model.rope_scaling={factor=4, original_max_position_embeddings=256}",
            lambda r: r.model.rope_scaling.factor == 4,
        ),
        ("tokenizer.path=a=b.json", lambda run: run.tokenizer.path == "a=b.json"),
    ],
)
def test_set_overrides_one_field(override, read):
    assert read(load_recipe("v3_671b", [override]))


def test_the_last_override_holds():
    assert load_recipe("demo", ["seed=7", "seed=8"]).seed == 8


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("train.tokens", "--set train.tokens: must read section.field=value"),
        ("=3", "--set =3: must read section.field=value"),
        ("model.hidden_size.deep=3", "--set model.hidden_size.deep=3: hidden_size is a value, not a section"),
        ("train.tokns=3", "v3_671b: train.tokns: unknown field; nearest: tokens"),
        ("trian.tokens=3", "v3_671b: trian: unknown field; nearest: train"),
        ("train.tokens=many", "v3_671b: train.tokens='many': input should be a valid integer"),
        ("train.tokens=-1", "v3_671b: train.tokens=-1: input should be greater than 0"),
        ("model.n_group=3", "v3_671b: model.n_group=3: must divide n_routed_experts=256; possible: 1, 2, 4, 8"),
        (
            "train.sequence_length=8192",
            "v3_671b: train.sequence_length=8192: must be at most model.max_position_embeddings=4096",
        ),
        ("model.num_nextn_predict_layers=4096", "must be larger than model.num_nextn_predict_layers=4096"),
        ("schedule.batch_size.start=0", "v3_671b: schedule.batch_size: 0 sequences a step: must be at least 1"),
        (
            "schedule.learning_rate.start=-1",
            "v3_671b: schedule.learning_rate.start=-1: input should be greater than or equal",
        ),
        (
            "schedule.learning_rate={start=1,unit='fraction',segments=[{until=1e9}]}",
            "until=1e+09: must be at most 1, since unit is fraction",
        ),
        ("schedule.learning_rate.segments=[{until=0.5,shape='linear'}]", "segments.0.to: required"),
        ("schedule.learning_rate.segments=[{until=0.5},{until=0.5}]", "must be larger than the one before"),
        ("schedule.learning_rate.segments=[{untl=0.5}]", "segments.0.untl: unknown field; nearest: until"),
    ],
)
def test_a_wrong_override_is_one_sentence_with_field_value_and_what_is_allowed(override, sentence):
    with pytest.raises(ConfigError) as caught:
        load_recipe("v3_671b", [override])
    assert sentence in str(caught.value)


def test_an_unknown_recipe_is_refused_with_the_nearest_and_all_names():
    with pytest.raises(ConfigError) as caught:
        load_recipe("v3_617b")
    assert "no such recipe; nearest: v3_671b; there are demo, v3_16b" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("extends = demo", "not valid TOML"),
        ("extends = 3", "extends=3: must be one recipe name or path"),
        ('extends = "demo"\nunset = "seed"', "unset='seed': must be a list of fields"),
        ('extends = "demmo"', "demmo: no such recipe; nearest: demo"),
        ('extends = "gone.toml"', "gone.toml: cannot read this recipe"),
        ('extends = "demo"\nname = "a/b"', "name='a/b': string should match pattern"),
        ("seed = 1", "model: required, but not given"),
    ],
)
def test_a_damaged_recipe_is_refused(text, sentence, tmp_path):
    with pytest.raises(ConfigError) as caught:
        load_recipe(write(tmp_path, "mine.toml", text))
    assert sentence in str(caught.value)


def test_a_recipe_that_is_not_text_is_refused(tmp_path):
    (tmp_path / "mine.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8 text"):
        load_recipe(str(tmp_path / "mine.toml"))


def test_value_where_a_list_belongs_is_shown_as_a_list() -> None:
    with pytest.raises(ConfigError, match=r"""data\.corpus='texts': must be a list, such as \["texts"\]"""):
        load_recipe("demo", ["data.corpus=texts"])
