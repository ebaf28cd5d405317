"""The networks of a run: the model, those that the objective declares, their optimizers and the model's averages."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from untwine.adapters.base import Attached
from untwine.training.checkpoint import Report, load_matching
from untwine.training.distributed import Distributed, autocast, no_sync, parallelize, resolve_strategy
from untwine.training.ema import EMA, PowerEMA
from untwine.training.objectives.base import Objective, Role
from untwine.training.optim import OptimizerSet, clip_grad_norm
from untwine.training.posthoc import SIGMAS
from untwine.training.recipe import Recipe


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Inside, initial weights are a function of ``seed``; torch's global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % 2**63)
        yield


def _moved(module: Any, device: torch.device) -> Any:
    """``module`` on ``device``; left alone where it is there, since tensors without memory cannot be moved."""
    tensors = (*module.parameters(), *module.buffers())
    return module if all(t.device == device for t in tensors) else module.to(device)


class Networks:
    """Builds, parallelises, optimises and averages; :meth:`tensors` is everything that a checkpoint must hold.

    Names in it: ``<network>.<parameter>``, ``objective.<parameter>``, ``ema.<k>.<parameter>``,
    ``tracked.<k>.<parameter>`` and ``optimizer.<network>.<parameter>.<state>``; objective parameters are optimised with
    the model.
    """

    def __init__(
        self,
        recipe: Recipe,
        objective: Objective,
        build_model: Callable[[], nn.Module],
        processes: Distributed,
    ) -> None:
        self.recipe, self.processes = recipe, processes
        self.roles = {"model": Role(), **objective.networks()}
        _check_sources(self.roles, len(recipe.ema))
        self.modules = {
            name: self._build(role.init or self._parametrized(build_model)) for name, role in self.roles.items()
        }
        self.factors = {} if recipe.mup is None else recipe.mup.factors(self.model)
        with seeded(recipe.seed):
            objective.bind(self.model)
        self.objective = _moved(objective, processes.device)
        self.adapter: Attached | None = None
        self._parallelize()
        self.optimizers = {name: self._optimizer(name) for name, role in self.roles.items() if role.trainable}
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.averages = [EMA(profile, trained) for profile in recipe.ema]
        tracked = [PowerEMA(sigma_rel=sigma) for sigma in SIGMAS] if recipe.train.ema_snapshots_every else []
        self.tracked = [EMA(profile, trained) for profile in tracked]
        """for snapshots, see :mod:`untwine.training.posthoc`"""
        self.updates = dict.fromkeys(self.optimizers, 0)
        """optimizer steps made, by network"""

    @property
    def model(self) -> nn.Module:
        return self.modules["model"]

    def _build(self, init: Callable[[], nn.Module]) -> nn.Module:
        with seeded(self.recipe.seed):
            return _moved(init(), self.processes.device)

    def _parametrized(self, build_model: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        """What builds the model under the recipe's parametrization."""
        mup = self.recipe.mup
        return build_model if mup is None else lambda: mup.initialised(build_model())

    def _parallelize(self) -> None:
        plan = self.recipe.train.parallel
        strategy = resolve_strategy(plan, self.model, self.processes)
        for name, module in self.modules.items():
            role = self.roles[name]
            module.requires_grad_(role.trainable).train(role.trainable)
            if name == "model" and self.recipe.adapter is not None:
                self._adapt(module)
            follows = role.source is not None and strategy in ("fsdp", "hsdp")  # a shard is copied from a shard
            if role.trainable or follows:
                parallelize(module, plan, self.processes)
        if list(self.objective.parameters()):
            own = replace(plan, strategy=strategy, checkpointing=False, compile=False, param_dtype="float32")
            parallelize(self.objective, own, self.processes)

    def _adapt(self, model: nn.Module) -> None:
        assert self.recipe.adapter is not None
        if resolve_strategy(self.recipe.train.parallel, model, self.processes) in ("fsdp", "hsdp"):
            raise ValueError("train.parallel.strategy: an adapter is trained with 'ddp' or 'none', not with shards")
        with seeded(self.recipe.seed):
            self.adapter = self.recipe.adapter.build().attach(model)

    def _optimizer(self, network: str) -> OptimizerSet:
        named: dict[str, Tensor] = {f"{network}.{n}": p for n, p in self.modules[network].named_parameters()}
        if network == "model":
            named |= {f"objective.{n}": p for n, p in self.objective.named_parameters()}
            factors = {f"model.{name}": factor for name, factor in self.factors.items()}
            return self.recipe.optimizer.build(named, factors)
        return (self.roles[network].optimizer or self.recipe.optimizer).build(named)

    def tensors(self) -> dict[str, Tensor]:
        """The state of the run by name: the live tensors, to be saved or filled in place."""
        found: dict[str, Tensor] = {}
        for name, module in self.modules.items():
            if self.roles[name].source is None:
                found |= {f"{name}.{key}": value.detach() for key, value in module.state_dict().items()}
        found |= {f"objective.{key}": value.detach() for key, value in self.objective.state_dict().items()}
        for kind, averages in (("ema", self.averages), ("tracked", self.tracked)):
            for k, average in enumerate(averages):
                found |= {f"{kind}.{k}.{key}": value for key, value in average.tensors().items()}
        for name, optimizer in self.optimizers.items():
            found |= {f"optimizer.{name}.{key}": value for key, value in optimizer.tensors().items()}
        return found

    def restored(self, updates: Mapping[str, int]) -> None:
        """Called after :meth:`tensors` were filled from a checkpoint."""
        self.updates.update(updates)
        self._teach()

    def initialise(self, source: str | Mapping[str, Tensor], weights: str) -> Report:
        """The model's own weights (and the averages' start) from elsewhere, where names and shapes agree.

        Args:
            source: a checkpoint, or a state dict.
            weights: of a checkpoint, ``raw`` or ``ema:k``.
        """
        live = {plain_name(n): p.detach() for n, p in self.model.named_parameters() if "lora_" not in n}
        fixed = saved_buffers(self.model)
        if isinstance(source, str):
            prefix = "model." if weights == "raw" else f"ema.{weights.removeprefix('ema:')}."
            wanted = {prefix + name: p for name, p in live.items()} | {f"model.{name}": b for name, b in fixed.items()}
            found = load_matching(source, wanted)
            report = Report(
                *(
                    tuple(n.removeprefix(prefix) for n in names if n.startswith(prefix))
                    for names in (found.kept, found.reinitialised, found.unused)
                )
            )
        else:
            report = _fill(live | fixed, source)
        parameters = dict(self.model.named_parameters())
        for average in (*self.averages, *self.tracked):
            for name, tensor in average.tensors().items():
                tensor.copy_(parameters[name].detach())
        self._teach()
        return report

    @contextmanager
    def micro_batch(self, *, last: bool) -> Iterator[None]:
        """Around forward and backward of one micro-batch: precision, and gradient exchange with the last one only."""
        with ExitStack() as stack:
            for name in self.optimizers:
                stack.enter_context(no_sync(self.modules[name], last))
            stack.enter_context(no_sync(self.objective, last))
            yield

    def forward_precision(self):
        """The autocast context of a model call."""
        return autocast(self.model, self.recipe.train.parallel, self.processes.device)

    def zero_grad(self) -> None:
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()

    def clip(self, network: str) -> Tensor:
        """Clips the gradient of a network; its norm before that, on the device."""
        return clip_grad_norm(self.optimizers[network].parameters, self.recipe.train.clip_norm or math.inf)

    def update(self, network: str, step: int) -> None:
        """Steps one network, then its averages."""
        train = self.recipe.train
        optimizer = self.optimizers[network]
        optimizer.set_lr(self.recipe.schedule.multiplier(step, train.num_steps))
        optimizer.step()
        self.updates[network] += 1
        if network == "model":
            for average in (*self.averages, *self.tracked):
                average.update(self.updates["model"], train.batch_size)
            self._teach()

    @contextmanager
    def averaged(self) -> Iterator[str]:
        """Inside, the model has the weights of its first average, if it has one; yields their name."""
        if not self.averages:
            yield "raw"
            return
        with self.averages[0].applied(self.model):
            yield "ema:0"

    def _teach(self) -> None:
        for name, role in self.roles.items():
            if role.source is not None:
                self.averages[int(role.source.removeprefix("ema:"))].copy_to(self.modules[name])


def _check_sources(roles: Mapping[str, Role], count: int) -> None:
    for name, role in roles.items():
        if role.source is not None and int(role.source.removeprefix("ema:")) >= count:
            raise ValueError(f"ema: the {name} follows {role.source}, and the recipe has {count} averages; add one")


def saved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """What a model keeps beside its parameters, such as drawn frequencies; no average is made of it."""
    kept = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in kept}


def plain_name(name: str) -> str:
    """The name that a parameter had before an adapter wrapped its layer."""
    return name.replace(".base_layer.", ".")


@torch.no_grad()
def _fill(live: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> Report:
    """Copies what has the same name and shape."""
    kept = [name for name, p in live.items() if name in given and given[name].shape == p.shape]
    if not kept:
        raise ValueError(f"init: nothing in it has the name and shape of a parameter, such as {next(iter(live))}")
    for name in kept:
        value, target = given[name].to(live[name].device, live[name].dtype), live[name]
        if isinstance(target, DTensor):
            value = distribute_tensor(value, target.device_mesh, target.placements)
        target.copy_(value)
    missed = tuple(name for name in live if name not in set(kept))
    return Report(tuple(kept), missed, tuple(sorted(set(given) - set(live))))
