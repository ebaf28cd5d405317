"""Optimizers resume bit for bit, also before their first step; schedules and clipping do what they say."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from untwine.training.optim import (
    OPTIMIZERS,
    SCHEDULES,
    AdamW,
    ConstantSchedule,
    CosineSchedule,
    LinearSchedule,
    Muon,
    OptimizerConfig,
    Schedule,
    clip_grad_norm,
)


def network() -> nn.Module:
    torch.manual_seed(0)
    block = nn.ModuleDict({"norm": nn.LayerNorm(6), "mlp": nn.Linear(6, 6)})
    return nn.ModuleDict({"embed": nn.Linear(4, 6), "blocks": nn.ModuleList([block]), "final": nn.Linear(6, 4)})


def backward(model: nn.Module, step: int) -> None:
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
    block = model["blocks"][0]
    hidden = model["embed"](x)
    (model["final"](hidden + torch.tanh(block["mlp"](block["norm"](hidden)))) - x.flip(1)).square().mean().backward()


def run(config: OptimizerConfig, steps: range, resumed: tuple | None = None):
    """Weights and optimizer state after ``steps``, from scratch or from what an earlier run returned."""
    model = network()
    optimizer = config.build(model.named_parameters())
    if resumed:
        with torch.no_grad():
            for mine, saved in zip((dict(model.named_parameters()), optimizer.tensors()), resumed):
                assert mine.keys() == saved.keys()
                for name, value in saved.items():
                    mine[name].copy_(value)
    for step in steps:
        optimizer.set_lr(CosineSchedule(warmup_steps=3).multiplier(step, 10))
        backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
    return tuple(
        {n: t.detach().clone() for n, t in tensors.items()}
        for tensors in (dict(model.named_parameters()), optimizer.tensors())
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("stop", [0, 1, 5])
def test_resume_is_bitwise(name, stop):
    config = OPTIMIZERS[name]()
    whole, parts = run(config, range(10)), run(config, range(stop, 10), resumed=run(config, range(stop)))
    for a, b in zip(whole, parts):
        assert all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_is_flat_named_and_float32_from_the_start(name):
    before, after = (run(OPTIMIZERS[name](), range(steps))[1] for steps in (0, 2))
    assert before.keys() == after.keys()
    parameters = dict(network().named_parameters())
    assert {key.rpartition(".")[0] for key in before} == parameters.keys()
    assert not any(t.any() for t in before.values())
    assert all(t.dtype == torch.float32 for t in after.values())


def test_adamw_is_torch_adamw():
    """Against torch's own, which creates its state at the first step."""
    model, reference = network(), network()
    ours = AdamW(lr=1e-2, betas=(0.8, 0.95), weight_decay=0.1, decay_vectors=True).build(model.named_parameters())
    theirs = torch.optim.AdamW(reference.parameters(), lr=1e-2, betas=(0.8, 0.95), weight_decay=0.1)
    for step in range(5):
        for network_, optimizer in ((model, ours), (reference, theirs)):
            backward(network_, step)
            optimizer.step()
            optimizer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), reference.parameters()))


def test_vectors_do_not_decay_unless_asked():
    for decay_vectors, factor in ((False, 1.0), (True, 0.95)):
        model = network()
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        optimizer = AdamW(lr=0.5, weight_decay=0.1, decay_vectors=decay_vectors).build(model.named_parameters())
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        for name, p in model.named_parameters():
            torch.testing.assert_close(p.detach(), before[name] * (0.95 if p.ndim > 1 else factor))


def test_muon_takes_the_matrices_of_blocks_and_leaves_the_rest():
    state = run(Muon(), range(1))[1]
    assert {key for key in state if key.endswith("momentum_buffer")} == {"blocks.0.mlp.weight.momentum_buffer"}
    assert "embed.weight.exp_avg" in state
    assert "blocks.0.norm.weight.exp_avg" in state


def test_muon_moves_all_directions_alike():
    """The update is orthogonal up to the spread of Newton-Schulz, with the root mean square 0.2 lr of AdamW's."""
    before, after = (run(Muon(lr=1e-2), range(steps))[0]["blocks.0.mlp.weight"] for steps in (0, 1))
    update = (after - before) * 3 / 1e-2  # the warm-up's first step has a third of the rate
    singular = torch.linalg.svdvals(update)[:4] / (0.2 * math.sqrt(6))  # four outputs: the gradient has rank 4
    assert (singular > 0.6).all()
    assert (singular < 1.3).all()


def test_learning_rates_scale_from_their_own_base():
    optimizer = Muon(lr=1e-2, rest=AdamW(lr=1e-3)).build(network().named_parameters())
    for multiplier in (0.5, 0.0, 1.0):
        optimizer.set_lr(multiplier)
        assert optimizer.lr == pytest.approx((1e-2 * multiplier, 1e-3 * multiplier))


def test_frozen_parameters_have_no_state():
    model = network()
    model["embed"].requires_grad_(False)
    state = AdamW().build(model.named_parameters()).tensors()
    assert not [key for key in state if key.startswith("embed")]
    assert "final.weight.exp_avg" in state


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: AdamW(lr=-1.0), "lr must be finite and >= 0, got -1.0"),
        (lambda: AdamW(lr=math.nan), "lr must be finite"),
        (lambda: AdamW(betas=(0.9, 1.0)), r"betas must be within \[0, 1\)"),
        (lambda: Muon(momentum=1.0), r"momentum must be within \[0, 1\)"),
        (lambda: AdamW().build({}), "no parameter that requires a gradient"),
        (lambda: AdamW().build(network().bfloat16().named_parameters()), r"must be float32.*torch.bfloat16"),
        (lambda: Muon().build(nn.Linear(2, 2).named_parameters()), "no 2-D parameter matches .*use adamw"),
        (lambda: CosineSchedule(warmup_steps=-1), "warmup_steps must be >= 0, got -1"),
        (lambda: LinearSchedule(final=2.0), r"final must be within \[0, 1\], got 2.0"),
        (lambda: clip_grad_norm([], 0.0), "max_norm must be > 0"),
    ],
)
def test_bad_values(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_warm_up_and_end(name):
    schedule = SCHEDULES[name](warmup_steps=4)
    assert isinstance(schedule, Schedule)
    assert [schedule.multiplier(step, 20) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert schedule.multiplier(4, 20) == 1
    values = [schedule.multiplier(step, 20) for step in range(4, 40)]
    assert values == sorted(values, reverse=True)
    assert values[-1] == values[16] == pytest.approx(1.0 if name == "constant" else 0.0)


def test_schedules_in_the_middle():
    assert ConstantSchedule().multiplier(0, 1) == 1
    assert LinearSchedule(final=0.5).multiplier(5, 10) == pytest.approx(0.75)
    assert CosineSchedule(final=0.1).multiplier(5, 10) == pytest.approx(0.55)
    assert CosineSchedule().multiplier(1, 4) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert 0 <= LinearSchedule(warmup_steps=5).multiplier(7, 5) <= 1


def test_clipping():
    a, b, idle = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    a.grad, b.grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    assert clip_grad_norm([a, b, idle]) == 5
    assert a.grad.tolist() == [3, 0]
    assert clip_grad_norm([a, b, idle], 1.0) == 5
    torch.testing.assert_close(torch.cat([a.grad, b.grad]), torch.tensor([0.6, 0, 0, 0.8]))
    assert idle.grad is None
    assert clip_grad_norm([a, b], 10.0) == pytest.approx(1)
    torch.testing.assert_close(torch.cat([a.grad, b.grad]), torch.tensor([0.6, 0, 0, 0.8]))
    a.grad = torch.tensor([math.inf, 0])
    assert clip_grad_norm([a, b], 1.0) == math.inf
