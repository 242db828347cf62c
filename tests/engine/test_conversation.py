from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from abyssal.engine import Conversation, LoadedModel, SamplingParameters, load, load_model
from abyssal.errors import UsageError
from abyssal.text.chat_template import ChatTemplate
from abyssal.text.special_tokens import ASSISTANT, BOS, EOS, USER
from engine.oracle import generate_text

Talk = Callable[..., Conversation]


@pytest.fixture
def loaded(model_directory: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> LoadedModel:
    """In float64, where a text does not depend on how it is cut into passes."""
    monkeypatch.setitem(load.DTYPES, "float64", torch.float64)
    return load_model(model_directory(max_position_embeddings=700, num_nextn_predict_layers=2), dtype="float64")


@pytest.fixture
def talk(loaded: LoadedModel, tmp_path: Path) -> Talk:
    template = ChatTemplate.load(tmp_path / "model")

    def start(parameters: SamplingParameters, **options: object) -> Conversation:
        return Conversation(loaded, template, parameters, **options)  # type: ignore[arg-type]

    return start


def answer(conversation: Conversation, question: str) -> str:
    return "".join(chunk.text for chunk in conversation.ask(question)[1])


@pytest.mark.parametrize("drafts", [0, 3])
@pytest.mark.parametrize("temperature", [0.0, 1.1])
def test_each_answer_is_what_the_whole_text_gives_to_a_fresh_cache(
    loaded: LoadedModel, talk: Talk, drafts: int, temperature: float
) -> None:
    parameters = SamplingParameters(12, temperature=temperature, seed=40)
    conversation = talk(parameters, system="Größe x", num_drafts=drafts)
    text, reused, said = f"{BOS}Größe x", [], []
    for turn in range(5):
        question = "".join(random.choices("def f(x): 大é\n", k=turn + 3))
        text += f"{USER}{question}{ASSISTANT}"
        same = SamplingParameters(12, temperature=temperature, seed=40 + turn)
        chunks = list(generate_text(loaded, loaded.tokenizer.encode(text), same))
        wanted = "".join(chunk.text for chunk in chunks)
        assert answer(conversation, question) == wanted
        said.append(len(chunks))
        text += f"{wanted}{EOS}"
        reused.append(conversation.reused_tokens)
    assert reused[0] == 0
    for (before, after), tokens in zip(pairwise(reused), said, strict=False):
        # what drafts takes a prompt in behind the answer's first token, which may be its last
        assert before < after or (drafts and tokens == 1 and before == after)
    assert [message["role"] for message in conversation.messages] == ["system", *["user", "assistant"] * 5]
    if drafts:
        assert conversation.engine.draft_statistics.passes > 0


def test_reset_forgets_all_but_the_system_prompt(talk: Talk) -> None:
    conversation = talk(SamplingParameters(8, temperature=0), system="S")
    first = answer(conversation, "x")
    answer(conversation, "y")
    conversation.reset()
    assert conversation.messages == [{"role": "system", "content": "S"}]
    assert answer(conversation, "x") == first


def test_an_answer_that_is_left_stays_as_far_as_it_was_taken(loaded: LoadedModel, talk: Talk) -> None:
    conversation = talk(SamplingParameters(30, temperature=0))
    _, chunks = conversation.ask("def")
    taken = ""
    while len(taken) < 5:
        taken += next(chunks).text
    assert conversation.messages[-1] == {"role": "assistant", "content": taken}
    text = f"{BOS}{USER}def{ASSISTANT}{taken}{EOS}{USER}x{ASSISTANT}"
    wanted = generate_text(loaded, loaded.tokenizer.encode(text), SamplingParameters(30, temperature=0))
    assert answer(conversation, "x") == "".join(chunk.text for chunk in wanted)


def test_a_question_whose_answer_never_began_is_taken_back(talk: Talk) -> None:
    conversation = talk(SamplingParameters(30, temperature=0))
    _, chunks = conversation.ask("def")
    assert conversation.messages == []
    chunks.close()
    assert conversation.messages == []


def test_a_message_that_does_not_fit_is_refused_and_changes_nothing(talk: Talk) -> None:
    conversation = talk(SamplingParameters(4, temperature=0))
    answer(conversation, "x")
    before = list(conversation.messages)
    with pytest.raises(UsageError, match=r"has \d+ tokens with this message, but the model can attend to 700"):
        conversation.ask("大é" * 350)
    assert conversation.messages == before
    answer(conversation, "y")
    assert len(conversation.messages) == 4
