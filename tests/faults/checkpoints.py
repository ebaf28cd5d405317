"""Small checkpoints whose content is a function of their step."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from untwine.training.checkpoint import load, read_state, save

CONFIG = {"width": 4}


def tensors(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    odd = torch.tensor([float("nan"), float("inf"), -0.0, 1e-40])
    return {
        "model.w": torch.randn(3, 4, generator=generator).T,
        "model.half": torch.randn(5, generator=generator).bfloat16(),
        "model.odd": odd,
        "optimizer.w.step": torch.tensor(float(seed)),
        "rng": torch.randint(0, 256, (7,), dtype=torch.uint8, generator=generator),
        "count": torch.tensor(2**60 + seed),
        "flag": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
    }


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Bit for bit, so that a NaN equals itself and 0 differs from -0."""
    return all(a[n].numel() == 0 or torch.equal(bits(a[n]), bits(b[n])) for n in a)


def bits(t: Tensor) -> Tensor:
    return t.contiguous().reshape(-1).view(torch.uint8)


def put(root: Path, step: int, **kwargs) -> Path:
    return save(root, step, tensors(step), {"step": step}, config=CONFIG, **kwargs)


def blank() -> dict[str, Tensor]:
    return {name: torch.zeros_like(t) for name, t in tensors(0).items()}


def check_loads(path: Path) -> int:
    """The step of the checkpoint, after everything in it was compared with what was saved at that step."""
    step = read_state(path)["step"]
    filled = blank()
    load(path, filled)
    assert same(filled, tensors(step))
    return step
