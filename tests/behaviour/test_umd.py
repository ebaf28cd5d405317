"""Masked diffusion: its corner cases, its draws, and a run from pre-training to digits by class."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import untwine
from tests.distributed.spawn import run_ranks
from tests.tiny import tiny
from untwine.cli import main
from untwine.contracts import Batch, Condition
from untwine.diffusion.chains import CosineChain
from untwine.diffusion.draws import Draws
from untwine.diffusion.paths import DiscretePath
from untwine.evaluation.probe import ridge_accuracy
from untwine.models.umd import UMD, hidden_pixels, visible_patches
from untwine.pipelines.loading import load
from untwine.testing import check_objective
from untwine.testing.backbones import CHECKS, Subject, check_compile, check_time_is_float32
from untwine.training.metering import read_log
from untwine.training.objectives.masked_diffusion import MaskedDiffusion
from untwine.training.recipe import Recipe
from untwine.training.trainer import Trainer

SMALL = {"in_channels": 1, "hidden_size": 32, "depth": 2, "decoder_depth": 1, "num_heads": 2, "num_positions": 16}
MODEL = {"kind": "umd", **{k: v for k, v in SMALL.items() if k != "in_channels"}, "hides_patches": True}


def umd(**options):
    torch.manual_seed(0)
    model = UMD(**{**SMALL, "num_classes": 4, "hides_patches": True, **options})
    for p in model.parameters():
        nn.init.normal_(p, std=0.1)
    return model


def batch(size=8, start=100):
    x0 = Draws(0).normal("x", (1, 8, 8), range(size))
    return Batch(x0, Condition(labels=torch.arange(size) % 4), torch.arange(start, start + size))


def loss_of(objective, model, given, draws=Draws(5)):  # noqa: B008 - a value
    return objective({"model": model}, given, update="model", step=0, draws=draws)


# The network


@pytest.mark.parametrize("check", [c for c in CHECKS if c is not check_compile], ids=lambda c: c.__name__)
def test_condition_as_token(check):
    if check is not check_time_is_float32:  # the same module in both networks
        check(Subject(lambda: UMD(**{**SMALL, "in_channels": 3, "num_classes": 5, "conditioning": "tokens"})))


@pytest.mark.parametrize("conditioning", ["adaln", "tokens"])
@pytest.mark.parametrize("num_classes", [0, 5])
def test_flops_are_those_that_torch_counts(conditioning, num_classes):
    model = UMD(**{**SMALL, "conditioning": conditioning, "num_classes": num_classes})
    labels = Condition(labels=torch.tensor([0, 4]) if num_classes else None)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(torch.zeros(2, 1, 12, 8), torch.ones(2), labels)
    assert 2 * model.flops((1, 12, 8)) == counter.get_total_flops()


@torch.no_grad()
def test_hidden_patches_are_not_seen():
    """Their pixels change nothing; those of visible patches do. The order of the visible ones does not matter."""
    model, x, t = umd(), torch.randn(2, 1, 8, 12), torch.tensor([0.3, 0.8])
    labels = Condition(labels=torch.tensor([0, 3]))
    visible = visible_patches(torch.rand(2, 24), 0.5)
    hidden = hidden_pixels(visible, (8, 12), 2)
    assert hidden.flatten(1).mean(1).tolist() == [0.5, 0.5]
    out = model(x, t, labels, visible=visible)
    noise = torch.randn_like(x)
    same, other = (model(x + noise * mask, t, labels, visible=visible) for mask in (hidden, 1 - hidden))
    for found in (same, model(x, t, labels, visible=visible.flip(1))):
        torch.testing.assert_close(found.sample, out.sample, rtol=0, atol=1e-5)
        torch.testing.assert_close(found.extra["x0"], out.extra["x0"], rtol=0, atol=1e-5)
    assert (other.sample - out.sample).abs().max() > 1e-2
    everything = torch.arange(24).expand(2, -1)
    torch.testing.assert_close(
        model(x, t, labels, visible=everything).sample, model(x, t, labels).sample, rtol=0, atol=1e-5
    )


@torch.no_grad()
def test_times_per_token_follow_their_patches():
    model, x, labels = umd(), torch.randn(2, 1, 8, 8), Condition(labels=torch.tensor([0, 3]))
    visible = visible_patches(torch.rand(2, 16), 0.5)
    t = torch.tensor([0.3, 0.8])
    out = model(x, t, labels, visible=visible)
    per_token = t[:, None].expand(-1, 16)
    torch.testing.assert_close(model(x, per_token, labels, visible=visible).sample, out.sample, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="where time is a token"):
        umd(conditioning="tokens")(x, per_token, labels)


@torch.no_grad()
def test_representation():
    """Clean and without label by default; the same as a full forward's."""
    model, x = umd(), torch.randn(3, 1, 8, 8)
    null = Condition(labels=torch.full((3,), 4))
    expected = model(x, torch.zeros(3), null).extra["representation"]
    assert expected.shape == (3, 32)
    torch.testing.assert_close(model.represent(x), expected, rtol=0, atol=1e-6)
    assert not torch.allclose(model.represent(x, torch.ones(3)), expected, atol=1e-3)
    assert umd(num_classes=0).represent(x).shape == (3, 32)


def test_positions_are_resized():
    """On a grid of twice the size, a table that is a plane is that plane."""
    table = umd().encoder_positions
    rows, columns = torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")
    with torch.no_grad():
        table.table.weight.copy_((rows + 10 * columns).reshape(-1, 1).expand(-1, 32))
        inner = table(torch.zeros(1, 64, 32), 8, 8).view(8, 8, 32)[1:-1, 1:-1, 0]
    expected = torch.arange(1, 7) / 2 - 0.25
    torch.testing.assert_close(inner, expected[:, None] + 10 * expected[None], rtol=0, atol=1e-5)


def test_bad_input():
    x, t, labels = torch.zeros(1, 1, 8, 8), torch.zeros(1), Condition(labels=torch.zeros(1, dtype=torch.int64))
    visible = torch.arange(4)[None]
    with pytest.raises(ValueError, match="hides_patches = True"):
        umd(hides_patches=False)(x, t, labels, visible=visible)
    with pytest.raises(ValueError, match="give one of them"):
        umd()(x, t, labels, visible=visible, attention_mask=torch.ones(16, 16, dtype=torch.bool))
    with pytest.raises(ValueError, match="num_positions must be a square number, got 12"):
        umd(num_positions=12)
    with pytest.raises(ValueError, match="decoder_depth must be at least 1, got 0"):
        umd(decoder_depth=0)
    with pytest.raises(ValueError, match="leave one of 4 patches visible"):
        visible_patches(torch.rand(1, 4), 0.9)
    with pytest.raises(ValueError, match="mask_ratio must be within"):
        MaskedDiffusion(mask_ratio=1.0)
    with pytest.raises(ValueError, match="clean_ratio must be within"):
        MaskedDiffusion(clean_ratio=1.5)
    with pytest.raises(ValueError, match="hides patches, which needs"):
        loss_of(MaskedDiffusion(), umd(hides_patches=False), batch())
    with pytest.raises(ValueError, match="a umd"):
        loss_of(MaskedDiffusion(), nn.Linear(1, 1), batch())


def test_chain_of_other_lengths():
    """The closed form against the cumulative product of betas that are cut at 0.999."""
    for num in (2, 10, 400):

        def survival(t):
            return np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2

        k = np.arange(num)
        betas = np.minimum(1 - survival((k + 1) / num) / survival(k / num), 0.999)
        path, t = CosineChain(num_timesteps=num), torch.from_numpy((k + 1) / num)
        torch.testing.assert_close(path.at(t).alpha ** 2, torch.from_numpy(np.cumprod(1 - betas)), rtol=1e-9, atol=0)
        assert path.levels(path.snap(t - 0.4 / num)).tolist() == k.tolist()
    assert torch.equal(path.at(torch.zeros(1)).alpha, torch.ones(1))


# The objective


@pytest.mark.parametrize("ratio", [0.0, 0.05, 0.5, 1.0])
def test_contract(ratio):
    objective = MaskedDiffusion(clean_ratio=ratio)
    check_objective(lambda: objective, {"model": umd()}, batch())


def test_mae_is_the_corner_of_clean_samples():
    """All clean: the mean squared error of the hidden patches, which a plain MAE minimises."""
    model, given = umd(), batch()
    loss = loss_of(MaskedDiffusion(clean_ratio=1.0, clean_mask_ratio=0.75), model, given)
    order = Draws(5).uniform("visible", (16,), given.index).argsort(1)
    output = model(given.x0, torch.zeros(8), model.null(given.condition), visible=order[:, :4])
    error = (output.extra["x0"] - given.x0).square()
    patches = F.unfold(error, 2, stride=2).transpose(1, 2)  # (B, N, 4)
    hidden = patches.gather(1, order[:, 4:, None].expand(-1, -1, 4))
    torch.testing.assert_close(loss.total, hidden.mean(), rtol=0, atol=1e-6)
    assert loss.parts.keys() == {"reconstruction"}
    assert loss.per_sample is None


@pytest.mark.parametrize("path", [CosineChain(), DiscretePath()], ids=["cosine", "linear"])
def test_dit_is_the_corner_of_visible_noised_samples(path):
    """Nothing clean, nothing hidden: the mean of the errors of noise and x0."""
    model, given = umd(hides_patches=False), batch()
    objective = MaskedDiffusion(path=path, clean_ratio=0.0, mask_ratio=0.0, conditional=True, label_dropout=0.0)
    loss = loss_of(objective, model, given)
    t = path.snap(Draws(5).uniform("t", (), given.index))
    noise = Draws(5).normal("noise", (1, 8, 8), given.index)
    output = model(path.interpolate(given.x0, noise, t), t, given.condition)
    of_noise, of_x0 = F.mse_loss(output.sample, noise), F.mse_loss(output.extra["x0"], given.x0)
    torch.testing.assert_close(loss.total, (of_noise + of_x0) / 2, rtol=0, atol=1e-6)
    torch.testing.assert_close(loss.parts["noise"], of_noise, rtol=0, atol=1e-6)
    assert torch.equal(loss.t, t)


@pytest.mark.parametrize("ratio", [0.0, 0.05, 0.3, 0.5, 1.0])
def test_clean_samples_are_spread_evenly(ratio):
    objective = MaskedDiffusion(clean_ratio=ratio)
    for start in (0, 37, 10**9):
        for size in (20, 60):
            count = int(objective.is_clean(torch.arange(start, start + size)).sum())
            assert abs(count - ratio * size) < 1 + 1e-9
    assert int(objective.is_clean(torch.arange(0, 600)).sum()) == round(600 * ratio)


def test_parts_make_the_whole():
    """``(1 - r) L1 + r L0``, each a call of its own, noised samples told their labels and clean ones none."""
    model, given, calls = umd(), batch(size=12), []
    model.register_forward_pre_hook(lambda _, args, options: calls.append((*args, options)), with_kwargs=True)
    objective = MaskedDiffusion(clean_ratio=0.25, conditional=True, label_dropout=0.0)
    loss = loss_of(objective, model, given)
    is_clean = objective.is_clean(given.index)
    assert is_clean.sum() == 3
    mixed = 0.75 * (loss.parts["noise"] + loss.parts["x0"]) / 2 + 0.25 * loss.parts["reconstruction"]
    torch.testing.assert_close(loss.total.detach(), mixed)
    (_, t, noised, seen), (x, none, clean, few) = calls
    assert torch.equal(noised.labels, given.condition.labels[~is_clean])
    assert clean.labels.tolist() == [4] * 3
    assert torch.equal(x, given.x0[is_clean])
    assert none.tolist() == [0.0] * 3 and t.min() > 0
    assert (seen["visible"].shape, few["visible"].shape) == ((9, 10), (3, 4))
    calls.clear()
    loss_of(MaskedDiffusion(clean_ratio=0.25), model, given)
    assert calls[0][2].labels.tolist() == [4] * 9


def test_weights_of_samples_count():
    model, given = umd(), batch()
    whole = [loss_of(MaskedDiffusion(), model, given.select(slice(k, k + 1))).total for k in range(8)]
    weight = torch.linspace(0.5, 2, 8)
    weighted = Batch(given.x0, given.condition, given.index, weight=weight)
    loss = loss_of(MaskedDiffusion(), model, weighted)
    torch.testing.assert_close(loss.total, (torch.stack(whole) * weight).mean(), rtol=0, atol=1e-5)


# A run


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """300 steps without labels."""
    folder = tmp_path_factory.mktemp("runs") / "umd"
    Trainer(recipe(**{"train.num_steps": 300, "train.validate_every": 100}), folder).fit()
    return folder


def recipe(**changes):
    plain = {
        "model": MODEL,
        "objective": {"kind": "masked_diffusion", "path": {"kind": "cosine_chain"}},
        "optimizer": {"kind": "adamw", "lr": 2e-3, "betas": [0.9, 0.95]},
        "schedule": {"kind": "cosine", "warmup_steps": 10},
        "sampling": {"solver": {"kind": "ddim", "eta": 1.0, "clip_x0": 1.0}, "num_inference_steps": 10},
        "train.batch_size": 64,
        "train.save_every": 1000,
    }
    return tiny(**{**plain, **changes})


def test_pretraining_learns_both_tasks(pretrained):
    first, last = (read_log(pretrained / "log.jsonl", "validation")[k] for k in (0, -1))
    for part in ("noise", "x0", "reconstruction"):
        assert last[part] < first[part]
    assert last["noise"] < 0.7
    assert last["reconstruction"] < 0.45


def test_representation_knows_more_than_pixels_seen_through_noise(pretrained):
    """A linear probe of clean pictures beats the same network before training."""
    trained: UMD = load(str(pretrained)).model
    torch.manual_seed(0)
    fresh = UMD(**{k: v for k, v in trained.config.items() if not k.startswith("_")})
    data = recipe().data.build()
    x, y = torch.stack([data.read(k) for k in range(1200)]), torch.from_numpy(data.labels[:1200])
    scores = {}
    for name, model in {"trained": trained, "fresh": fresh}.items():
        with torch.no_grad():
            features = model.represent(x)
        scores[name] = ridge_accuracy(features[:900], y[:900], features[900:], y[900:])
    assert scores["trained"] > scores["fresh"] + 0.1
    assert scores["trained"] > 0.7


def test_ridge_accuracy():
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(400) % 4
    x = F.one_hot(y, 4).float() * 5 + torch.randn(400, 4, generator=generator)
    assert ridge_accuracy(x[:300], y[:300], x[300:], y[300:]) > 0.95
    assert ridge_accuracy(x[:300], y[:300].roll(1), x[300:], y[300:]) < 0.1
    noise = torch.randn(400, 4, generator=generator)
    assert 0.1 < ridge_accuracy(noise[:300], y[:300], noise[300:], y[300:]) < 0.42
    with pytest.raises(ValueError, match="features must be"):
        ridge_accuracy(x, y, x[:, :2], y)
    with pytest.raises(ValueError, match="ridge > 0"):
        ridge_accuracy(x, y[:3], x, y)


def _train(processes, plan, folder):
    Trainer(Recipe.from_dict(plan), folder).fit()


def test_ranks_may_hold_one_kind_of_samples(tmp_path):
    """Two processes with four samples each, of which one in 20 is clean, train and report as one does with eight."""
    objective = {"kind": "masked_diffusion", "clean_ratio": 0.05, "mask_ratio": 0.0, "conditional": True}
    plan = recipe(**{"objective": objective, "train.num_steps": 6, "train.batch_size": 8, "train.log_every": 3})
    _train(None, plan.to_dict(), tmp_path / "one")
    run_ranks(_train, 2, plan.to_dict(), tmp_path / "two")
    alone, joined = (load(str(tmp_path / name), weights="raw").model.state_dict() for name in ("one", "two"))
    for name, value in joined.items():
        torch.testing.assert_close(value, alone[name], rtol=0, atol=2e-4, msg=name)
    one, two = (read_log(tmp_path / name / "log.jsonl", "train") for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        for part in ("loss", "noise", "x0", "reconstruction"):
            assert b[part] == pytest.approx(a[part], rel=1e-3, abs=1e-4)


def test_tuning_for_generation(pretrained, tmp_path, caplog, capsys):
    """From the pre-trained weights, on the command line: all patches, labels, and a better start than from nothing."""
    options = {"conditional": True, "clean_ratio": 0.05, "mask_ratio": 0.0}
    objective = {"kind": "masked_diffusion", "path": {"kind": "cosine_chain"}, **options}
    plan = recipe(**{"objective": objective, "train.num_steps": 20, "train.validate_every": 20})
    (tmp_path / "tune.yaml").write_text(yaml.safe_dump(plan.to_dict()))
    losses = {}
    for name, more in {"tuned": ["--init", str(pretrained)], "scratch": []}.items():
        with caplog.at_level(logging.INFO):
            assert main(["train", str(tmp_path / "tune.yaml"), "--out", str(tmp_path / name), *more]) == 0
        losses[name] = read_log(tmp_path / name / "log.jsonl", "validation")[-1]
    assert losses["tuned"]["noise"] < losses["scratch"]["noise"]
    assert losses["tuned"]["x0"] < losses["scratch"]["x0"]

    assert main(["sample", str(tmp_path / "tuned"), "--count", "4", "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "grid.png").is_file()
    capsys.readouterr()
    found = [untwine.sample(str(tmp_path / "tuned"), count=4, batch_size=size, guidance_scale=2.0) for size in (4, 1)]
    difference = found[0].images.astype(int) - found[1].images.astype(int)
    assert np.abs(difference).max() <= 1  # the noise of each step belongs to the image, whatever its batch
    assert found[0].report["network_evaluations"] == 4 * 10 * 2
    plain = untwine.sample(str(tmp_path / "tuned"), count=4, guidance_scale=1.0)
    assert not np.array_equal(plain.images, found[0].images)


def test_new_label_table_beside_known_weights(tmp_path):
    """A network without classes gives everything but the table and the MLP behind it."""
    source = umd(num_classes=0).state_dict()
    trainer = Trainer(recipe(**{"train.num_steps": 1}), tmp_path, init=source)
    trainer.fit()
    assert trainer.report is not None
    assert {name.partition(".")[0] for name in trainer.report.reinitialised} == {"label_embedder"}
    assert not trainer.report.unused
