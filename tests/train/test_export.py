"""The model card: what the run was and what was measured, without the places of the machine it was on."""

from __future__ import annotations

import re
import tomllib

from abyssal.config import RunConfig
from abyssal.config.parallel import ParallelConfig
from abyssal.train.evaluation import Score
from abyssal.train.export import model_card
from abyssal.train.progress import Progress


def test_the_card_holds_the_recipe_and_the_figures_but_no_place(small_run: RunConfig) -> None:
    config = small_run.model_copy(update={"init_from": "/secret/place"})
    card = model_card(config, Progress(7, 28, 3584), Score(nats=300.0, tokens=120, bytes=411))
    assert "3,584 tokens in 7 steps of 32-token sequences" in card
    assert "1.0531 bits per byte (2.5000 nats a token) on 411 bytes" in card
    block = re.search(r"```toml\n(.*?)```", card, re.DOTALL)
    assert block is not None
    recipe = tomllib.loads(block[1])
    assert recipe["model"]["hidden_size"] == 24
    assert recipe["schedule"]["batch_size"]["start"] == 4
    assert recipe["seed"] == config.seed
    assert "secret" not in card
    assert all(place not in card for place in config.data.corpus)
    whole = {"name": "again", "data": {"corpus": list(config.data.corpus)}}
    again = RunConfig.parse({**recipe, **whole, "data": {**recipe["data"], **whole["data"]}}, "the card")
    assert again.model_dump(exclude={"name"}) == small_run.model_dump(exclude={"name"})


def test_the_card_does_not_say_how_the_run_was_spread_over_ranks(small_run: RunConfig) -> None:
    spread = ParallelConfig(ep_size=2, zero_stage=3, dispatch="node_limited", dispatch_dtype="fp8")
    card = model_card(small_run.model_copy(update={"parallel": spread}), Progress(1, 4, 128), None)
    alone = small_run.model_copy(update={"parallel": ParallelConfig(dispatch_dtype="fp8")})
    assert card == model_card(alone, Progress(1, 4, 128), None)
    assert card != model_card(small_run, Progress(1, 4, 128), None)  # FP8 is no layout: it changes numbers


def test_what_was_not_measured_is_said(small_run: RunConfig) -> None:
    assert "| validation | not measured |" in model_card(small_run, Progress(1, 4, 128), None)
