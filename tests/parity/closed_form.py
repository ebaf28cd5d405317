"""The closed-form networks that the cases of the family call, and recorded draws by our names."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from untwine.contracts import Batch, Condition, Output
from untwine.diffusion.draws import Draws
from untwine.diffusion.paths import LinearPath
from untwine.diffusion.sampling import StepInfo
from untwine.diffusion.timesteps import (
    LogitNormalTime,
)
from untwine.models.layers.packing import Packing

AT = StepInfo(0, 0, 1)


class Recorded(Draws):
    """The recorded draws of an official step, by the names of ours."""

    def __init__(self, shared: float = 0.0, **given: Tensor) -> None:
        super().__init__(0)
        self.given, self.coin = given, shared

    def normal(self, name, shape, index, *, device=None):
        return self.given[name]

    uniform = normal

    def shared(self, name, step):
        return self.coin


def alone(at, t):
    """The weight table of one branch."""
    return {"cond": 1.0}


def expand(t: Tensor) -> Tensor:
    return t.view(-1, 1, 1, 1)


def batch_of(x: Tensor, labels: Tensor, **options: Any) -> Batch:
    return Batch(x, Condition(labels=labels), torch.arange(len(x)), **options)


class DiTStub(nn.Module):
    """The closed-form network of the case; t is the original level."""

    predicts, accepts, decoupled = "noise", frozenset({"labels"}), False

    def forward(self, x, t, condition, features=()):
        level = expand(torch.round(t * 1000) - 1)
        return Output(0.97 * x + 0.02 * torch.cos(level / 200), extra={"variance": 0.3 * torch.sin(x + level / 300)})


class FamilyStub(nn.Module):
    """The closed-form network of REPA's and DiffusionBench's cases, with what each setting asks of it.

    Args:
        features: (N, z) of the case; features are then these times the mean of x.
        given: (B, N, z) what all features are instead.
    """

    predicts, decoupled, accepts = "velocity", False, frozenset({"labels"})

    def __init__(self, *, features: Tensor | None = None, given: Tensor | None = None) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(1))
        self.features, self.given, self.config = features, given, SimpleNamespace(patch_size=1)
        self.has_base = False

    def null(self, condition):
        return Condition(labels=torch.full_like(condition.labels, 9))

    def forward(self, x, t, condition, features=()):
        image = self.w * self.image(x, t, condition)
        return self.output(x, image, features)

    def image(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        first, r = expand(t), condition.vectors.get("r")
        if r is not None:
            first = expand(t - r.reshape(len(x)))
        label = condition.labels.view(-1, 1, 1, 1)
        out = (0.7 - 0.4 * first) * x + 0.2 * first**2 * torch.roll(x, 1, -1) + 0.05 * (label % 5 - 2)
        return out if r is None else out + 0.15 * expand(t) * torch.roll(x, 1, 2)

    def output(self, x: Tensor, image: Tensor, features: Any) -> Output:
        taps = {}
        if self.features is not None:
            taps = {site: self.features[None] * x.mean((1, 2, 3))[:, None, None] for site in features}
        elif self.given is not None:
            taps = dict.fromkeys(features, self.given)
        return Output(image, taps, {"base": 0.5 * image + 0.1 * x * x} if self.has_base else {})


def time_of(setting: dict[str, Any]) -> LogitNormalTime:
    mean, std = (float(word) for word in setting["time_dist_type"].split("_")[1:])
    return LogitNormalTime(mean, std, setting.get("time_dist_shift", 1.0))


def path_of(setting: dict[str, Any]) -> LinearPath:
    return LinearPath(sigma_floor=setting.get("t_eps", 0.05))


class PackedStub(FamilyStub):
    """Image and class token in one sample."""

    def __init__(self, image: tuple[int, ...], token: int, **options: Any) -> None:
        super().__init__(**options)
        self.packing = Packing({"image": image, "token": (token,)})

    def pack(self, image: Tensor, token: Tensor) -> Tensor:
        return self.packing.pack({"image": image, "token": token})

    def unpack(self, x: Tensor) -> dict[str, Tensor]:
        return self.packing.unpack(x)

    def forward(self, x, t, condition, features=()):
        image, token = self.unpack(x).values()
        out = super().forward(image, t, condition, features)
        found = (0.6 - 0.3 * t[:, None]) * token + 0.02 * image.mean((1, 2, 3))[:, None]
        return replace(
            out,
            sample=self.pack(out.sample, found),
            extra={name: self.pack(value, found) for name, value in out.extra.items()},
        )
