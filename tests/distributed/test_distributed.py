"""Two processes give what one gives: gradients, averages, clipping, checkpoints."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tests.distributed.spawn import run_ranks
from untwine.training import checkpoint
from untwine.training.distributed import Distributed, ParallelConfig, autocast, no_sync, on_main, parallelize
from untwine.training.ema import EMA, ConstantEMA
from untwine.training.locking import FolderInUse, lock
from untwine.training.optim import AdamW, Muon, clip_grad_norm

STEPS, BATCH, WIDTH = 20, 8, 10
ALONE = Distributed(torch.device("cpu"))


class Block(nn.Module):
    fsdp_methods = ("modulate",)

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 3 * WIDTH)
        self.down = nn.Linear(3 * WIDTH, WIDTH)
        self.modulation = nn.Linear(WIDTH, WIDTH)

    def modulate(self, t: Tensor) -> Tensor:
        return self.modulation(t)

    def forward(self, x: Tensor, t: Tensor, modulation: Tensor | None = None) -> Tensor:
        modulation = self.modulation(t) if modulation is None else modulation
        return x + self.down(torch.tanh(self.up(self.norm(x)))) * (1 + modulation)


class Toy(nn.Module):
    """Two parts, as a decoupled backbone has; a scale of one element leaves the second rank of a sharding empty."""

    _no_split_modules = ("Block",)
    fsdp_methods = ("encode", "decode")

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.final = nn.Linear(WIDTH, 3)
        self.scale = nn.Parameter(torch.ones(1))
        self.checkpointed = False

    def enable_gradient_checkpointing(self) -> None:
        self.checkpointed = True

    def encode(self, x: Tensor, t: Tensor) -> Tensor:
        return self.blocks[0](self.embed(x), t)

    def decode(self, x: Tensor, t: Tensor, state: Tensor, modulation: Tensor | None = None) -> Tensor:
        return self.final(self.blocks[1](self.embed(x) + state, t, modulation)) * self.scale

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.decode(x, t, self.encode(x, t))


def toy(processes: Distributed, **plan) -> nn.Module:
    torch.manual_seed(0)
    return parallelize(Toy(), ParallelConfig(**plan), processes)


def data(step: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(BATCH, 3, generator=generator)
    return x, torch.randn(BATCH, WIDTH, generator=generator), x.flip(1)


def full(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for n, t in tensors.items()}


def train(processes: Distributed, strategy: str, optimizer: AdamW | Muon, micro: int = 1, max_norm: float = 0.05):
    """20 steps on the global batch; the weights, the average and the clipped norms, gathered."""
    model = toy(processes, strategy=strategy)
    ema = EMA(ConstantEMA(decay=0.9), model.named_parameters())
    optimizers = optimizer.build(model.named_parameters())
    rows = slice(processes.rank, None, processes.world_size)
    norms = []
    for step in range(STEPS):
        parts = [torch.arange(BATCH)[rows][m::micro] for m in range(micro)]
        for m, part in enumerate(parts):
            x, t, target = (value[part] for value in data(step))
            with no_sync(model, last=m == micro - 1):
                (torch.nn.functional.mse_loss(model(x, t), target) / micro).backward()
        norms.append(clip_grad_norm(model.parameters(), max_norm))
        optimizers.step()
        optimizers.zero_grad()
        ema.update(step + 1, BATCH)
    return full(dict(model.named_parameters())), full(ema.tensors()), torch.stack(norms)


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Global relative L2."""
    assert a.keys() == b.keys()
    return math.sqrt(sum(float((a[n] - b[n]).square().sum()) for n in a) / sum(float(b[n].square().sum()) for n in a))


@pytest.fixture(scope="module")
def alone():
    return train(ALONE, "none", AdamW(lr=1e-2, weight_decay=0.1))


@pytest.mark.parametrize("strategy, micro", [("ddp", 1), ("ddp", 2), ("fsdp", 1), ("fsdp", 2)])
def test_two_processes_train_like_one(strategy, micro, alone):
    first, second = run_ranks(train, 2, strategy, AdamW(lr=1e-2, weight_decay=0.1), micro)
    assert (alone[2] > 0.05).any(), "clipping must have been at work"
    for mine, theirs in zip(first[:2], second[:2]):
        assert distance(mine, theirs) == 0
    for mine, reference in zip(first[:2], alone[:2]):
        assert distance(mine, reference) <= 1e-5
    torch.testing.assert_close(first[2], alone[2], rtol=1e-5, atol=0)


def test_muon_orthogonalises_whole_matrices_when_they_are_sharded():
    start = full(dict(toy(ALONE, strategy="none").named_parameters()))
    reference, *_ = train(ALONE, "none", Muon(lr=1e-3))
    (weights, *_), _ = run_ranks(train, 2, "fsdp", Muon(lr=1e-3))
    travelled = {name: reference[name] - start[name] for name in start}
    error = {name: weights[name] - reference[name] + travelled[name] for name in start}
    # Newton-Schulz runs in bfloat16, whose rounding (2^-8) its five steps amplify; halves of a matrix would be at 0.5.
    assert distance(error, travelled) <= 0.05


def test_methods_beside_forward_gather_their_weights():
    model = toy(ALONE, strategy="none")
    x, t, _ = data(0)
    state = model.encode(x, t)
    expected = model.decode(x, t, state, model.blocks[1].modulate(t))
    for result in run_ranks(methods, 2):
        torch.testing.assert_close(result, expected.detach(), rtol=1e-6, atol=1e-6)


@torch.no_grad()
def methods(processes):
    model = toy(processes, strategy="fsdp")
    x, t, _ = data(0)
    return model.decode(x, t, model.encode(x, t), model.blocks[1].modulate(t))


def test_averaged_weights_of_a_sharded_model_come_and_go():
    for inside, expected, before, after, own, restored in run_ranks(averaged, 2):
        torch.testing.assert_close(inside, expected, rtol=1e-6, atol=1e-6)
        assert torch.equal(before, after)
        assert all(torch.equal(own[n], restored[n]) for n in own)
        assert not torch.allclose(inside, before)


def averaged(processes):
    model = toy(processes, strategy="fsdp")
    ema = EMA(ConstantEMA(decay=0.5), model.named_parameters())
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    ema.update(1, BATCH)
    reference = toy(ALONE, strategy="none")
    reference.load_state_dict(full(ema.tensors()))
    x, t, _ = data(0)
    with torch.no_grad():
        before, own = model(x, t), full(dict(model.named_parameters()))
        with pytest.raises(KeyboardInterrupt), ema.applied(model):
            inside = model(x, t)
            stop = model.final.register_forward_pre_hook(interrupt)  # while the root's weights are gathered
            model(x, t)
        stop.remove()
        return inside, reference(x, t), before, model(x, t), own, full(dict(model.named_parameters()))


def interrupt(*_):
    raise KeyboardInterrupt


def test_mixed_precision_keeps_inputs_and_reduces_in_float32():
    for dtypes, grad in run_ranks(mixed, 2):
        assert dtypes == [torch.float32, torch.bfloat16]
        assert grad == torch.float32


def mixed(processes):
    model = toy(processes, strategy="fsdp", param_dtype="bfloat16")
    seen = []
    model.blocks[1].register_forward_pre_hook(lambda m, args: seen.extend([args[1].dtype, m.up.weight.dtype]))
    model.blocks[1].forward = lambda x, t, modulation=None: x
    with autocast(model, ParallelConfig(param_dtype="bfloat16"), processes.device):
        model.decode(torch.zeros(2, 3, dtype=torch.bfloat16), torch.zeros(2, WIDTH), 0).float().sum().backward()
    return seen, next(p.grad.dtype for p in model.parameters() if p.grad is not None)


def test_a_meta_model_is_sharded_then_filled(tmp_path):
    reference = toy(ALONE, strategy="none")
    path = checkpoint.save(tmp_path, 1, dict(reference.named_parameters()), {}, config={})
    x, t, _ = data(0)
    for output in run_ranks(from_meta, 2, path):
        torch.testing.assert_close(output, reference(x, t).detach(), rtol=1e-6, atol=1e-6)


def from_meta(processes, path):
    with torch.device("meta"):
        model = Toy()
    parallelize(model, ParallelConfig(strategy="fsdp", checkpointing=True), processes)
    assert model.checkpointed
    model.to_empty(device=processes.device)
    checkpoint.load(path, dict(model.named_parameters()))
    x, t, _ = data(0)
    return model(x, t).detach()


def state_of(model: nn.Module, optimizer: AdamW | Muon):
    """Everything a run saves, after two steps."""
    ema = EMA(ConstantEMA(decay=0.5), model.named_parameters())
    optimizers = optimizer.build(model.named_parameters())
    for step in range(2):
        x, t, target = data(step)
        torch.nn.functional.mse_loss(model(x, t), target).backward()
        optimizers.step()
        optimizers.zero_grad()
        ema.update(step + 1, BATCH)
    parts = {"model": dict(model.named_parameters()), "ema.0": ema.tensors(), "optimizer": optimizers.tensors()}
    return {f"{part}.{name}": t for part, tensors in parts.items() for name, t in tensors.items()}


def saved_on(processes, root, optimizer):
    tensors = state_of(toy(processes, strategy="fsdp"), optimizer)
    checkpoint.save(root, 7, tensors, {"step": 7}, config={"width": WIDTH})
    return full(tensors)


def loaded_on(processes, path, optimizer):
    model = toy(processes, strategy="fsdp")
    tensors = state_of(model, optimizer)
    for t in tensors.values():
        t.detach().zero_()
    assert checkpoint.latest(path.parent) == path
    checkpoint.load(path, tensors)
    return full(tensors)


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("optimizer", [AdamW(), Muon()], ids=["adamw", "muon"])
def test_checkpoints_change_the_number_of_processes(optimizer, tmp_path):
    saved = run_ranks(saved_on, 2, tmp_path / "two", optimizer)[0]
    tensors = {n: torch.full_like(t, 3) for n, t in saved.items()}
    checkpoint.load(tmp_path / "two" / "step-7", tensors)
    assert equal(tensors, saved)
    assert checkpoint.verify(tmp_path / "two" / "step-7")["world_size"] == 2

    path = checkpoint.save(tmp_path / "one", 7, saved, {"step": 7}, config={})
    for loaded in run_ranks(loaded_on, 2, path, optimizer):
        assert equal(loaded, saved)


def test_ranks_agree():
    assert run_ranks(agreements, 2) == [(True, False, 0.5, "OSError: from rank 0")] * 2
    assert ALONE.agree(True)
    assert not ALONE.agree(False)
    assert ALONE.all_reduce_mean(torch.tensor(3.0)) == 3


def agreements(processes):
    mean = float(processes.all_reduce_mean(torch.tensor(float(processes.rank))))
    processes.barrier()
    try:
        on_main(fail)
    except OSError as error:
        return processes.agree(processes.rank == 1), processes.agree(False), mean, f"{type(error).__name__}: {error}"


def fail():
    raise OSError("from rank 0")


def test_a_failed_save_fails_on_every_rank_and_the_next_one_works(tmp_path):
    for message, path, names in run_ranks(save_where_it_cannot, 2, tmp_path):
        assert "disk quota" in message
        assert (path, names) == ("step-2", ["step-2"])


def save_where_it_cannot(processes, root):
    from untwine.training.storage import Storage

    class Full(Storage):
        def write_tensors(self, folder, tensors):
            super().write_tensors(folder, tensors)
            on_main(lambda: (_ for _ in ()).throw(OSError(122, "disk quota exceeded")))

    tensors = dict(toy(processes, strategy="fsdp").named_parameters())
    with pytest.raises(checkpoint.CheckpointNotSaved) as caught:
        checkpoint.save(root, 1, tensors, {}, config={}, storage=Full())
    path = checkpoint.save(root, 2, tensors, {}, config={})
    processes.barrier()
    return str(caught.value), path.name, sorted(p.name for p in root.iterdir())


def test_one_lock_for_all_ranks(tmp_path):
    assert run_ranks(locked, 2, tmp_path) == [True, True]
    assert not list(tmp_path.iterdir())


def locked(processes, root):
    with lock(root):
        processes.barrier()
        refused = False
        try:
            with lock(root):
                pass
        except FolderInUse:
            refused = True
        processes.barrier()
        return refused


@pytest.mark.parametrize(
    "plan, message",
    [
        ({"strategy": "fsdp"}, "strategy 'fsdp' needs a process group: launch with torchrun"),
        ({"checkpointing": True}, "checkpointing: Linear has no enable_gradient_checkpointing"),
    ],
)
def test_impossible_plans(plan, message):
    with pytest.raises(ValueError, match=message):
        parallelize(nn.Linear(2, 2), ParallelConfig(**plan), ALONE)


def test_blocks_that_do_not_exist():
    model = nn.Linear(2, 2)
    model._no_split_modules = ("Missing",)
    with pytest.raises(ValueError, match="Missing"):
        parallelize(model, ParallelConfig(), ALONE)


def test_hybrid_sharding_trains_like_one(alone):
    weights, average, _ = run_ranks(hybrid, 4)[0]
    assert distance(weights, alone[0]) <= 1e-5
    assert distance(average, alone[1]) <= 1e-5


def hybrid(processes):
    return train(
        Distributed(processes.device, processes.rank, 4, local_world_size=2, owns_group=True),
        "hsdp",
        AdamW(lr=1e-2, weight_decay=0.1),
    )
