"""A model cut into stages composes to the whole."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from abyssal.config import ModelConfig
from abyssal.model import Context, RouterStatistics, Stage, Transformer, next_tokens

LENGTHS = (5, 2, 4)
LAYERS = 3
#: Where the main layers are cut: stages may be without layers, at either end or between.
CUTS = [(), (0,), (1,), (2,), (3,), (1, 2), (0, 3), (2, 2), (0, 1, 2, 3)]


def stages_of(cut: tuple[int, ...]) -> list[Stage]:
    bounds = list(pairwise((0, *cut, LAYERS)))
    last = len(bounds) - 1
    return [
        Stage(range(a, b), has_embedding=n == 0, has_head=n == last, has_mtp=n == last)
        for n, (a, b) in enumerate(bounds)
    ]


def objective(model: Transformer, h: Tensor, tokens: Tensor, ctx: Context) -> Tensor:
    """A sum over the logits of the main model and of the MTP modules, each weighted differently."""
    generator = torch.Generator().manual_seed(1)
    outputs = [h, *(further for further, _ in model.predict_further(h, next_tokens(tokens, 2), ctx))]
    total = h.new_zeros(())
    for output in outputs:
        logits = model.logits(output)
        total = total + (logits * torch.randn(logits.shape, dtype=h.dtype, generator=generator)).sum()
    return total


def context() -> Context:
    return replace(Context.packed(LENGTHS), statistics=RouterStatistics(), balance_weight=0.2)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_stages_compose_to_the_whole(
    cut: tuple[int, ...], tied: bool, draw_config: Any, build: Any, draw_tokens: Any
) -> None:
    """Values and every gradient, with autograd cut between the stages, MTP modules and balance loss included."""
    config: ModelConfig = draw_config(
        3, num_nextn_predict_layers=2, first_k_dense_replace=1, tie_word_embeddings=tied, num_hidden_layers=LAYERS
    )
    whole = build(config, 3)
    tokens = draw_tokens(config, sum(LENGTHS), 3)
    ctx = context()
    expected = objective(whole, whole(tokens, ctx), tokens, ctx)
    expected.backward()

    parts, inputs, outputs, contexts = [], [], [], []
    x = tokens
    for stage in stages_of(cut):
        part = Transformer(config, compute_dtype=torch.float64, stage=stage).to(torch.float64)
        part.load_state_dict({name: whole.state_dict()[name] for name in part.state_dict()})
        parts.append(part)
        inputs.append(x if stage.has_embedding else x.detach().requires_grad_())
        contexts.append(context())
        outputs.append(part(inputs[-1], contexts[-1]))
        x = outputs[-1]
    total = objective(parts[-1], outputs[-1], tokens, contexts[-1])
    total.backward()
    for output, following in list(zip(outputs, inputs[1:], strict=False))[::-1]:
        output.backward(following.grad)

    assert torch.equal(total, expected)
    gradients: dict[str, Tensor] = {}
    for part in parts:
        for name, parameter in part.named_parameters():
            if parameter.grad is not None:  # of the embedding two stages may hold a copy
                gradients[name] = gradients[name] + parameter.grad if name in gradients else parameter.grad
    assert gradients.keys() == {name for name, _ in whole.named_parameters()}
    for name, parameter in whole.named_parameters():
        torch.testing.assert_close(
            gradients[name], parameter.grad, rtol=1e-12, atol=1e-12, msg=lambda t, n=name: f"{n}: {t}"
        )
    loads = {layer: load.tolist() for c in contexts for layer, load in c.statistics.expert_load.items()}
    assert loads == {layer: load.tolist() for layer, load in ctx.statistics.expert_load.items()}


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_every_layer_keeps_its_number_and_every_tensor_its_name(cut: tuple[int, ...], draw_config: Any) -> None:
    config = draw_config(4, num_nextn_predict_layers=2, tie_word_embeddings=False)
    with torch.device("meta"):
        whole = Transformer(config)
        parts = [Transformer(config, stage=stage) for stage in stages_of(cut)]
    names = [name for part in parts for name in part.state_dict() if "embed_tokens" not in name]
    assert names == [name for name in whole.state_dict() if "embed_tokens" not in name]
    numbers = [number for part in parts for number, _ in part.model.layers.items()]
    assert numbers == list(range(LAYERS + 2))
    for part in parts:
        for number, block in part.model.layers.items():
            assert part.model.layers[number] is block
            assert all(name in whole.state_dict() for name in block.state_dict(prefix=f"model.layers.{number}."))


@pytest.mark.parametrize(
    ("stage", "names"),
    [
        (Stage(range(1, 1)), set()),
        (Stage(range(1, 1), has_embedding=True), {"model.embed_tokens.weight"}),
        (Stage(range(1, 1), has_head=True), {"model.norm.weight", "lm_head.weight"}),
    ],
    ids=["nothing", "embedding", "head"],
)
def test_a_stage_has_what_it_says(stage: Stage, names: set[str], draw_config: Any) -> None:
    config = draw_config(4, tie_word_embeddings=False)
    assert set(Transformer(config, stage=stage).state_dict()) == names


def test_mtp_modules_and_a_tied_head_bring_the_embedding_along(draw_config: Any) -> None:
    """The module is there to be read, but hidden states still come in."""
    for fields in ({"tie_word_embeddings": True}, {"num_nextn_predict_layers": 1, "tie_word_embeddings": False}):
        config = draw_config(4, **fields)
        model = Transformer(config, stage=Stage(range(2, 3), has_head=True, has_mtp=True)).double()
        assert "model.embed_tokens.weight" in model.state_dict()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(0.1)
        x = torch.randn(4, config.hidden_size, dtype=torch.float64)
        model.compute_dtype = torch.float64
        assert model(x, Context.packed((4,))).shape == x.shape


def test_a_stage_that_cannot_be_is_refused(draw_config: Any) -> None:
    config = draw_config(4)
    with pytest.raises(ValueError, match=r"main layers are 0 \.\. 2"):
        Transformer(config, stage=Stage(range(2, 4)))
    with pytest.raises(ValueError, match="they stand with the head"):
        Transformer(config, stage=Stage(range(3), has_mtp=True))
