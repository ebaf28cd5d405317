"""Averages of any width after the run, from snapshots of two (Karras et al. 2024, arXiv 2312.02696, section 3.2).

While training, two power-function averages are tracked and saved now and then. Each snapshot weighs the weights of the
past by a known profile ``p(tau) = (g + 1) tau^g / t^(g + 1)`` on [0, t]; the sum of snapshots whose profile comes
closest to a wanted one, in the mean square, is the wanted average, to the accuracy of that fit.

Differs from the reference: the fit is made over the steps themselves, so that it also holds for short runs; its weights
sum to one; it is refused where it misses the wanted profile.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from untwine.training.distributed import on_main
from untwine.training.ema import EMA, PowerEMA

FOLDER = "ema-snapshots"
SIGMAS = (0.05, 0.10)
TOLERANCE = 0.05
"""relative root mean square by which a fitted profile may miss the wanted one"""
MAX_BINS = 8192
"""pieces of a long run over which profiles are compared; a shorter one is compared step by step"""
_FILE = re.compile(r"step-(\d+)\.safetensors")


def save_snapshot(run: Path, step: int, averages: Sequence[EMA]) -> None:
    """Writes ``ema-snapshots/step-N.safetensors``: the averages in float16, as ``<k>.<parameter>``. Collective.

    Raises:
        OSError: where the file system refuses; on every process.
    """
    tensors: dict[str, Tensor] = {}
    for k, average in enumerate(averages):
        for name, value in average.tensors().items():
            full = value.full_tensor() if isinstance(value, DTensor) else value
            fits = full.abs().max() < torch.finfo(torch.float16).max
            tensors[f"{k}.{name}"] = full.to("cpu", torch.float16 if fits else torch.float32)
    about = {"sigma_rel": [average.profile.sigma_rel for average in averages], "step": step}  # type: ignore[attr-defined]
    on_main(lambda: _write(run / FOLDER, step, tensors, about))


def _write(folder: Path, step: int, tensors: dict[str, Tensor], about: dict[str, object]) -> None:
    folder.mkdir(exist_ok=True)
    draft, target = folder / f"step-{step:07d}.tmp", folder / f"step-{step:07d}.safetensors"
    try:
        save_file(tensors, draft, metadata={"untwine": json.dumps(about)})
        os.replace(draft, target)
    except Exception as error:  # safetensors has an error of its own for a full disk
        draft.unlink(missing_ok=True)
        raise OSError(f"snapshot {target} not written: {error}") from error


def reconstruct(run: str | Path, sigma_rel: float, *, step: int | None = None) -> dict[str, Tensor]:
    """The average of the parameters under the power profile of width ``sigma_rel`` at ``step``; float32, on the CPU.

    Args:
        run: a run folder, trained with ``train.ema_snapshots_every``.
        sigma_rel: width relative to the training length up to ``step``, in (0, 0.288).
        step: where the profile ends; default: at the newest snapshot. Later snapshots are not used.

    Raises:
        ValueError: where there are no snapshots, or they do not add up to such a profile.
    """
    target = PowerEMA(sigma_rel=sigma_rel)
    files = {int(m[1]): f for f in sorted((Path(run) / FOLDER).glob("*")) if (m := _FILE.fullmatch(f.name))}
    if not files:
        raise ValueError(f"run: {run} has no EMA snapshots; train with train.ema_snapshots_every")
    step = max(files) if step is None else step
    files = {at: file for at, file in files.items() if at <= step}
    profiles = [(at, PowerEMA(sigma_rel=s).gamma) for at, file in files.items() for s in _sigmas(file)]
    weights, miss = fit(profiles, (step, target.gamma))
    if miss > TOLERANCE:
        raise ValueError(
            f"sigma_rel: {len(files)} snapshots up to step {step} of {run} make the profile of width {sigma_rel} only "
            f"to within {miss:.0%}, more than {TOLERANCE:.0%}; ask for one nearer to {SIGMAS}, or at a step with "
            "a snapshot, or take snapshots more often (train.ema_snapshots_every)"
        )
    return _add_up(list(files.values()), weights)


def fit(profiles: Sequence[tuple[int, float]], target: tuple[int, float]) -> tuple[np.ndarray, float]:
    """Weights with which ``profiles``, pairs (end step, exponent), come closest to ``target``, and how far they stay.

    The distance is the root mean square of the difference, relative to the target's.
    """
    edges = np.linspace(0, target[0], min(target[0], MAX_BINS) + 1)
    columns = np.stack([_shares(edges, *profile) for profile in profiles], axis=1)
    wanted = _shares(edges, *target)
    # A last row, heavier than all others: the weights sum to one, else the average would shrink.
    total = np.full((1, len(profiles)), 1e3 * np.linalg.norm(wanted))
    weights = np.linalg.lstsq(np.vstack([columns, total]), np.append(wanted, total[0, 0]), rcond=None)[0]
    return weights, float(np.linalg.norm(columns @ weights - wanted) / np.linalg.norm(wanted))


def _shares(edges: np.ndarray, end: int, gamma: float) -> np.ndarray:
    """What a power profile weighs between neighbouring ``edges``; with an edge a step, what each step weighs."""
    return np.diff(np.minimum(edges / end, 1) ** (gamma + 1))


def _sigmas(file: Path) -> list[float]:
    try:
        with safe_open(file, framework="pt") as opened:
            return json.loads((opened.metadata() or {})["untwine"])["sigma_rel"]
    except Exception as error:  # whatever a damaged file makes the reader raise
        raise ValueError(f"{file} is no EMA snapshot, or is damaged ({error}); remove it to do without") from error


def _add_up(files: Sequence[Path], weights: np.ndarray) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    left = list(weights)
    for file in files:
        with safe_open(file, framework="pt") as opened:
            here = [left.pop(0) for _ in _sigmas(file)]
            for key in opened.keys():  # noqa: SIM118 - not a mapping
                k, _, name = key.partition(".")
                part = opened.get_tensor(key).float() * here[int(k)]
                total[name] = total[name] + part if name in total else part
    return total
