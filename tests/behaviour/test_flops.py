"""Operations of models that take time, labels and texts as tokens, as torch counts them."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.behaviour.text_encoders import WIDTH, bert
from tests.tiny import tiny
from untwine.acceleration.caching.cache import Cache, CacheConfig
from untwine.acceleration.caching.schedules import Uniform
from untwine.contracts import Condition, Tokens
from untwine.diffusion.draws import Draws
from untwine.diffusion.sampling import Sampling, sample
from untwine.models import MODELS
from untwine.training.planning import plan
from untwine.training.speed import TRAINING, flops

TEXT = 5
SIZES = {"in_channels": 3, "patch_size": 2, "hidden_size": 48, "num_heads": 4, "conditioning": "tokens"}
HEAD = {"depth": 4, "encoder_depth": 2, "decoder_hidden_size": 64, "decoder_num_heads": 4}
NETWORKS = {
    "lightningdit": ("lightningdit", {"depth": 3}),
    "lightningdit of two times": ("lightningdit", {"depth": 3, "second_time": True}),
    "head": ("ddt_head", HEAD),
    "head of two times": ("ddt_head", {**HEAD, "second_time": True, "base_depth": 1}),
    "head with a class token": ("ddt_head", {**HEAD, "class_token_dim": 7}),
}


def build(name: str, *, text: bool):
    kind, own = NETWORKS[name]
    taken = {"num_classes": 0, "text_dim": 16} if text else {"num_classes": 5}
    model = MODELS[kind](**SIZES, **own, **taken).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.05)
    return model


def condition_of(model, batch: int) -> Condition:
    vectors = {"r": torch.zeros(batch, 1, 1)} if "vectors.r" in model.accepts else {}
    if "labels" in model.accepts:
        return Condition(labels=torch.arange(batch), vectors=vectors)
    text = Tokens(torch.zeros(batch, TEXT, 16), torch.arange(TEXT).expand(batch, -1) < 3)
    return Condition(vectors=vectors, tokens={"text": text})


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_flops_are_those_that_torch_counts(name, text):
    model, image = build(name, text=text), (3, 8, 8)
    shape = model.packed_shape(image) if hasattr(model, "packed_shape") else image
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(torch.zeros(2, *shape), torch.ones(2), condition_of(model, 2))
    assert 2 * flops(model, image, TEXT * text) == counter.get_total_flops()


@pytest.mark.parametrize("name", ["lightningdit", "head"])
def test_flops_saved_in_context_are_those_that_were_not_made(name):
    """A cache counts by the sequence that a site is given, tokens of the condition among it."""
    model, settings = build(name, text=False), Sampling(num_inference_steps=6)

    def run():
        condition = Condition(labels=torch.arange(2))
        with FlopCounterMode(display=False) as counted, sdpa_kernel(SDPBackend.MATH):
            sample(model, condition, (3, 8, 8), torch.arange(2), draws=Draws(0), sampling=settings)
        return counted.get_total_flops()

    exact = run()
    assert exact == 2 * 6 * model.flops((3, 8, 8))
    for unit in ("sublayers", "blocks"):
        with Cache(CacheConfig(schedule=Uniform(3), sites=(unit,))).attach(model) as cache:
            assert exact - run() == cache.report()["flops_saved"] > 0, unit


def test_a_plan_counts_the_texts(tmp_path):
    """As many tokens as the recipe says that every text has."""

    def planned(length: int):
        model = {
            "kind": "ddt_head", "conditioning": "tokens", "hidden_size": 32, "decoder_hidden_size": 32, "depth": 2,
            "encoder_depth": 1, "num_heads": 2, "decoder_num_heads": 2, "patch_size": 2, "num_classes": 0,
            "text_dim": WIDTH, "in_channels": 1,
        }  # fmt: skip
        text = {"kind": "text", "encoder": str(bert(tmp_path / "bert")), "max_tokens": length}
        recipe = tiny(model=model, condition=text)
        return recipe.model.build(), plan(recipe, (1, 8, 8))

    for length in (4, 9):
        model, found = planned(length)
        assert found.step_flops == TRAINING * 16 * model.flops((1, 8, 8), length)
    assert planned(9)[1].step_flops > planned(4)[1].step_flops
