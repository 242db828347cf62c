"""A tiny random model behind the application, in this process, with OpenAI's client before it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
import torch
from fastapi import FastAPI

from abyssal.checkpoint.hf import write_model_directory
from abyssal.config import ModelConfig
from abyssal.engine import Engine, EngineOptions, LoadedModel, Output, Request, SamplingParameters, load_model
from abyssal.model import Transformer, initialise
from abyssal.server import ServerOptions, create_app
from abyssal.text.chat_template import ChatTemplate
from abyssal.text.tokenizer import Tokenizer
from abyssal.text.tokenizer_config import write_tokenizer_config

POSITIONS = 800
ENGINE = EngineOptions(max_running=4, page_tokens=8, num_drafts=1, adapt_drafts=False)


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory of random numbers with one MTP module, its vocabulary wider than the tokenizer's."""
    tokenizer = Tokenizer.train(["def f(x):\n    return x * x\n"] * 3, 290)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size + 3,
        hidden_size=20,
        intermediate_size=33,
        moe_intermediate_size=9,
        num_hidden_layers=3,
        num_nextn_predict_layers=1,
        num_attention_heads=3,
        q_lora_rank=11,
        kv_lora_rank=13,
        qk_nope_head_dim=7,
        qk_rope_head_dim=4,
        v_head_dim=5,
        n_routed_experts=6,
        n_shared_experts=2,
        num_experts_per_tok=2,
        n_group=3,
        topk_group=2,
        first_k_dense_replace=1,
        max_position_embeddings=POSITIONS,
        initializer_range=0.2,
    )

    def tokenizer_files(staging: Path) -> None:
        tokenizer.save(staging / "tokenizer.json")
        write_tokenizer_config(staging, tokenizer, POSITIONS)

    folder = tmp_path_factory.mktemp("served") / "model"
    weights = initialise(Transformer(config), 5).state_dict()
    card = "A model of random numbers.\n"
    write_model_directory(
        folder, config, weights, dtype=torch.float32, tokenizer_files=tokenizer_files, card=card, generation=None
    )
    return folder


@pytest.fixture(scope="session")
def loaded(directory: Path) -> LoadedModel:
    return load_model(directory)


@pytest.fixture(scope="session")
def template(directory: Path) -> ChatTemplate:
    return ChatTemplate.load(directory)


@dataclass
class Served:
    """A running application and its clients."""

    app: FastAPI
    openai: Any
    http: Any


Serve = Callable[..., AbstractAsyncContextManager[Served]]


@pytest.fixture
def serve(loaded: LoadedModel, template: ChatTemplate) -> Serve:
    """Serve the model; when the block ends, nothing may be left of any request."""

    @asynccontextmanager
    async def serving(
        chat_template: ChatTemplate | None = template, engine: EngineOptions = ENGINE, key: str = "none", **options: Any
    ) -> AsyncIterator[Served]:
        chosen = ServerOptions(**options)
        app = create_app(loaded, template=chat_template, options=chosen, engine_options=engine)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://server") as http,
            openai.AsyncOpenAI(base_url="http://server/v1", api_key=key, http_client=http, max_retries=0) as client,
        ):
            yield Served(app, client, http)
            assert await app.state.driver.drain(30)
        app.state.engine.check_integrity()
        assert not app.state.engine.has_work
        assert app.state.engine.statistics().num_pages_used == 0

    return serving


@pytest.fixture
def alone(loaded: LoadedModel) -> Callable[..., list[str]]:
    """The oracle: the texts of a prompt from the engine itself, without drafts and without a server."""

    def texts(prompt: str | list[int], parameters: SamplingParameters, count: int = 1) -> list[str]:
        engine = Engine.of(loaded, EngineOptions(num_drafts=0))
        ids = loaded.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        engine.add(Request(ids, parameters, count))
        texts = [""] * count
        while engine.has_work:
            for output in engine.step():
                texts[output.index] += output.text
        return texts

    return texts


@pytest.fixture
def held() -> Callable[..., AbstractContextManager[None]]:
    """Let an engine make only so many further steps within the block, so that what runs lasts as long as is needed."""

    @contextmanager
    def hold(engine: Engine, steps: int = 0) -> Iterator[None]:
        go, step, left = threading.Event(), engine.step, steps

        def held_step() -> list[Output]:
            nonlocal left
            left -= 1
            if left < 0:
                go.wait()
            return step()

        engine.step = held_step
        try:
            yield
        finally:
            engine.step = step
            go.set()

    return hold


@pytest.fixture
def within_seconds() -> Callable[[Coroutine[Any, Any, None]], None]:
    """Run a scenario; one that hangs is a failure."""

    def run(scenario: Coroutine[Any, Any, None]) -> None:
        asyncio.run(asyncio.wait_for(scenario, 60))

    return run
