"""Backbones under FSDP2 on two gloo processes: outputs and gradients are those of the unsharded model."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from untwine.contracts import Condition
from untwine.models import MODELS
from untwine.models.layers.compile import compile_blocks

WORLD = 2
SINGLE = {"in_channels": 3, "hidden_size": 32, "depth": 3, "num_heads": 4, "num_classes": 5}
SPLIT = {**SINGLE, "depth": 4, "encoder_depth": 2}
OPTIONS = {
    "ddt": SPLIT,
    "ddt_head": {**SPLIT, "decoder_hidden_size": 48, "decoder_num_heads": 3, "patch_size": 2},
    "improved_dit": SINGLE,
    "dit": SINGLE,
    "sit": SINGLE,
    "lightningdit": {**SINGLE, "patch_size": 2},
    "umd": {**SINGLE, "depth": 2, "decoder_depth": 1},
}


def build(name: str) -> Any:
    """The same randomised model on every rank."""
    torch.manual_seed(0)
    model = MODELS[name](**OPTIONS[name])
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model


def shard(model: Any) -> Any:
    """As a trainer does it: each block, then the root, then the methods that the classes name."""
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    mesh = init_device_mesh("cpu", (WORLD,))
    blocks = [m for m in model.modules() if type(m).__name__ in model._no_split_modules]
    for module in (*blocks, model):
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    for module in (*blocks, model):
        for method in module.fsdp_methods:
            register_fsdp_forward_method(module, method)
    return model


def batch() -> tuple[Tensor, Tensor, Condition]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 3, 4, 6, generator=generator)
    return x, torch.rand(4, generator=generator), Condition(labels=torch.arange(4))


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def forward(model: Any) -> Tensor:
    return model(*batch(), features=("blocks.0",)).sample


def split(model: Any) -> Tensor:
    """Encoder and decoder called apart, the state used twice."""
    x, t, condition = batch()
    state = model.encode(x, t, condition)
    return model.decode(x, state).sample + model.decode(0.5 * x, state, retime=t * 0.5).sample


def sampled(model: Any) -> Tensor:
    """A refresh that is reused, without gradients; then a training step, so that nothing stays gathered or cached."""
    x, t, condition = batch()
    with torch.no_grad():
        state = model.modulate(model.encode(x, t, condition))
        reused = model.decode(0.5 * x, state).sample
    return forward(model) + reused


def compile_then_shard(model: Any) -> Any:
    compile_blocks(model, backend="aot_eager")
    return shard(model)


def shard_then_compile(model: Any) -> Any:
    shard(model)
    compile_blocks(model, backend="aot_eager")
    return model


CASES: tuple[tuple[str, Callable[[Any], Any], Callable[[Any], Tensor]], ...] = (
    ("ddt", shard, forward),
    ("ddt", shard, split),
    ("ddt", shard, sampled),
    ("ddt", compile_then_shard, sampled),
    ("ddt", shard_then_compile, sampled),
    ("ddt_head", shard, split),
    ("ddt_head", shard_then_compile, sampled),
    *((name, shard, forward) for name in ("improved_dit", "dit", "sit", "lightningdit", "umd")),
)


def compare(name: str, prepare: Callable[[Any], Any], run: Callable[[Any], Tensor]) -> None:
    """Raises on the first difference between a sharded and a whole model in two steps."""
    plain, sharded = build(name), prepare(build(name))
    assert all(isinstance(p, DTensor) for p in sharded.parameters())
    for _ in range(2):
        expected, got = run(plain), run(sharded)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)
        for out in (expected, got):
            out.square().mean().backward()
    for (key, p), q in zip(plain.named_parameters(), sharded.parameters()):
        assert q.grad is not None, f"{key} has no gradient when sharded"
        torch.testing.assert_close(whole(q.grad), p.grad, rtol=1e-5, atol=1e-7, msg=lambda m, key=key: f"{key}: {m}")


def rank_main(rank: int, port: int) -> None:
    """All cases in one process group, since starting one costs more than running them."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    for name, prepare, run in CASES:
        try:
            compare(name, prepare, run)
        except Exception as error:
            raise AssertionError(f"rank {rank}: {name}, {prepare.__name__}, {run.__name__}: {error}") from error
    dist.barrier()
    dist.destroy_process_group()


def test_sharded_equals_whole() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(rank_main, (port,), nprocs=WORLD)
