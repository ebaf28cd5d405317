"""What a run will need: memory, arithmetic and time, before any of it is spent.

Sizes come from a training step made with tensors that have a shape and no memory, so they hold for every backbone,
optimizer and average. Arithmetic comes from the backbone's formula. Time is arithmetic over the device's peak times an
assumed efficiency, which is the one guess here; :mod:`.communication` tells what several devices add to it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from untwine.contracts import Condition, Tokens
from untwine.registry import did_you_mean
from untwine.training.communication import LINKS, Communication, Links, communication
from untwine.training.distributed import Distributed, Strategy, resolve_strategy
from untwine.training.networks import Networks
from untwine.training.recipe import Recipe
from untwine.training.speed import TRAINING, flops, gemm_peak


@dataclass(frozen=True)
class Device:
    """A kind of accelerator, by its makers' figures for dense arithmetic."""

    bfloat16_tflops: float
    float32_tflops: float
    memory_gib: float


DEVICES = {
    "a100": Device(312, 19.5, 80),
    "h100": Device(989, 67, 80),
    "h200": Device(989, 67, 141),
    "b200": Device(2250, 75, 180),
    "l40s": Device(362, 91.6, 48),
    "rtx4090": Device(165, 82.6, 24),
}


@dataclass(frozen=True)
class Plan:
    """The needs of one run; bytes are those of one device."""

    parameters: int
    weights: int
    gradients: int
    optimizer: int
    averages: int
    activations: int
    """kept for the backward pass of one micro-batch"""
    micro_batch: int
    step_flops: int
    """of all devices"""
    step_seconds: float
    num_steps: int
    memory_gib: float | None
    """of one device"""
    communication: Communication | None = None
    """of one step; None for one device"""

    @property
    def memory(self) -> int:
        """Bytes of all of it."""
        return self.weights + self.gradients + self.optimizer + self.averages + self.activations

    @property
    def hours(self) -> float:
        return self.step_seconds * self.num_steps / 3600

    @property
    def fits(self) -> bool | None:
        """None where the memory of the device is not known."""
        return None if self.memory_gib is None else self.memory <= 0.9 * self.memory_gib * 2**30


def plan(
    recipe: Recipe,
    latent_shape: tuple[int, ...],
    *,
    device: str = "cpu",
    count: int = 1,
    efficiency: float = 0.4,
    links: Links | None = None,
) -> Plan:
    """The needs of ``recipe`` on ``count`` devices.

    Args:
        latent_shape: (C, *grid) of what the model sees.
        device: a name in :data:`DEVICES`, or ``cpu``: this machine, whose peak is measured.
        count: devices.
        efficiency: share of the peak that training reaches, in (0, 1]; published 256-token transformers reach 0.12 to
            0.46.
        links: how fast devices send to each other; default: the makers' figures for ``device``.

    Raises:
        ValueError: for an unknown device, a count below 1, an efficiency outside (0, 1], or a batch that does not
            divide over the devices.
    """
    train = recipe.train
    if device not in DEVICES and device != "cpu":
        raise ValueError(f"device: unknown {device!r}{did_you_mean(device, ['cpu', *DEVICES])}")
    if count < 1 or not 0 < efficiency <= 1:
        raise ValueError(f"count must be >= 1 and efficiency within (0, 1], got {count} and {efficiency}")
    if train.batch_size % (count * train.accumulation):
        raise ValueError(
            f"train.batch_size {train.batch_size} does not divide over {count} devices x {train.accumulation} "
            "micro-batches; choose a multiple"
        )
    micro_batch = train.batch_size // (count * train.accumulation)
    sizes = _Sizes(recipe, latent_shape, micro_batch)
    _, shards = _spread(recipe, sizes.model, count)
    work = flops(sizes.model, latent_shape, _text_length(recipe))
    if work is None:
        raise ValueError(f"model: {recipe.model.kind} does not say what a forward pass costs (a method `flops`)")
    # Checkpointing runs every forward pass a second time.
    passes = TRAINING + (1 if train.parallel.checkpointing else 0)
    step_flops = TRAINING * work * train.batch_size
    peak = _peak(device, train.parallel.param_dtype)
    return Plan(
        parameters=sizes.parameters,
        weights=sizes.weights // shards,
        gradients=sizes.weights // shards,
        optimizer=sizes.optimizer // shards,
        averages=sizes.averages // shards,
        activations=sizes.activations,
        micro_batch=micro_batch,
        step_flops=step_flops,
        step_seconds=passes * work * train.batch_size / (peak * efficiency * count),
        num_steps=train.num_steps,
        memory_gib=DEVICES[device].memory_gib if device in DEVICES else None,
        communication=_communication(recipe, sizes, count, links or LINKS.get(device)),
    )


def _communication(recipe: Recipe, sizes: _Sizes, count: int, links: Links | None) -> Communication | None:
    if count == 1:
        return None
    strategy, shards = _spread(recipe, sizes.model, count)
    return communication(
        strategy,
        sizes.trained,
        count=count,
        shards=shards,
        accumulation=recipe.train.accumulation,
        bytes_per_weight=2 if recipe.train.parallel.param_dtype == "bfloat16" else 4,
        links=links,
    )


def _peak(device: str, dtype: str) -> float:
    if device == "cpu":
        return gemm_peak(torch.device("cpu"), getattr(torch, dtype))
    found = DEVICES[device]
    return 1e12 * (found.bfloat16_tflops if dtype == "bfloat16" else found.float32_tflops)


def _spread(recipe: Recipe, model: nn.Module, count: int) -> tuple[Strategy, int]:
    """How the model is spread, and over how many devices one copy of weights, averages and optimizer state is."""
    if count == 1:
        return "none", 1
    processes = Distributed(torch.device("cpu"), world_size=count)
    strategy = resolve_strategy(recipe.train.parallel, model, processes)
    shards = {"fsdp": count, "hsdp": recipe.train.parallel.shard_size or min(count, 8)}.get(strategy, 1)
    if count % shards:
        raise ValueError(f"shard_size must divide the {count} devices, got {shards}")
    return strategy, shards


class _Sizes:
    """Bytes of one training step on one device, nothing sharded."""

    def __init__(self, recipe: Recipe, latent_shape: tuple[int, ...], micro_batch: int) -> None:
        alone = replace(recipe.train.parallel, strategy="none", compile=False)
        recipe = replace(recipe, train=replace(recipe.train, parallel=alone), adapter=None)
        with FakeTensorMode():
            objective = recipe.objective.build()
            networks = Networks(recipe, objective, recipe.model.build, Distributed(torch.device("cpu")))
            self.model = networks.model
            self.activations = _activations(networks, latent_shape, micro_batch)
            for name, optimizer in networks.optimizers.items():
                for p in optimizer.parameters:
                    p.grad = torch.zeros_like(p)
                networks.update(name, 0)
            self.parameters = sum(p.numel() for p in self.model.parameters())
            self.trained = sum(p.numel() for o in networks.optimizers.values() for p in o.parameters)
            self.weights = _bytes(p for module in networks.modules.values() for p in module.parameters())
            self.optimizer = _bytes(t for o in networks.optimizers.values() for t in o.tensors().values())
            self.averages = _bytes(t for average in networks.averages for t in average.tensors().values())


def _activations(networks: Networks, latent_shape: tuple[int, ...], batch: int) -> int:
    """Bytes of the distinct tensors, parameters apart, that a forward pass keeps for the backward pass."""
    model: Any = networks.model
    known = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage.nbytes()
        held.append(tensor)  # or a later storage could take the address of a freed one
        return tensor

    held: list[Tensor] = []
    shape = model.packed_shape(latent_shape) if hasattr(model, "packed_shape") else latent_shape
    x, t = torch.zeros(batch, *shape), torch.zeros(batch)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), networks.forward_precision():
        model(x, t, _condition(networks.recipe, model.accepts, batch))
    return sum(kept.values())


def _text_length(recipe: Recipe) -> int:
    """Tokens of the texts that the model is given."""
    return 0 if recipe.condition is None else recipe.condition.build().max_tokens


def _condition(recipe: Recipe, accepts: Collection[str], batch: int) -> Condition:
    """Of the keys that the model accepts."""
    labels = torch.zeros(batch, dtype=torch.int64) if "labels" in accepts else None
    vectors = {"r": torch.zeros(batch, 1, 1)} if "vectors.r" in accepts else {}
    if "tokens.text" not in accepts:
        return Condition(labels, vectors)
    if recipe.condition is None:
        raise ValueError("recipe.model takes text (text_dim), and the recipe has no condition: {kind: text}")
    shape = batch, _text_length(recipe)
    values = torch.zeros(*shape, recipe.model.options["text_dim"])
    return Condition(labels, vectors, {"text": Tokens(values, torch.ones(shape, dtype=torch.bool))})


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(math.prod(t.shape) * t.element_size() for t in tensors)
