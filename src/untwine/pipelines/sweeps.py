"""Quality as a function of one setting of the sampler, by a named protocol, at equal noise."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from untwine.config import to_dict
from untwine.data.base import Dataset
from untwine.diffusion.sampling import Sampling
from untwine.evaluation.evaluator import Evaluator
from untwine.evaluation.protocols import Protocol
from untwine.evaluation.references import Reference
from untwine.pipelines.image import ImagePipeline
from untwine.pipelines.series import sample


def sweep(
    pipe: ImagePipeline,
    reference: str | Path | Dataset | Reference,
    setting: str,
    values: Sequence[Any],
    *,
    protocol: str | Protocol,
    seed: int = 0,
    batch_size: int = 64,
    cache: Path | None = None,
    on_value: Callable[[Any, dict[str, float]], None] | None = None,
) -> dict[str, Any]:
    """The metrics of ``protocol`` at each of ``values`` of one field of :class:`Sampling`; image k has one noise.

    Args:
        setting: such as ``num_inference_steps``, ``guidance_scale``, ``refresh_every``.
        cache: folder that keeps the features of the reference.
        on_value: hears each value with its metrics.

    Returns:
        JSON values: ``rows`` with the value, its metrics, seconds and network evaluations an image, and what all share.

    Raises:
        ValueError: for an unknown setting, or a value out of range, before anything is drawn.
    """
    known = [field.name for field in fields(Sampling)]
    if setting not in known:
        raise ValueError(f"setting must be one of {', '.join(known)}, got {setting!r}")
    if not values:
        raise ValueError("values must name at least one value of the setting")
    settings = [pipe.settings(None, None, **{setting: value}) for value in values]
    evaluator = Evaluator(reference, protocol, device=pipe.device, batch_size=batch_size, cache=cache)
    count, rows, report = evaluator.protocol.num_samples, [], {}
    for value, sampling in zip(values, settings):
        started = time.perf_counter()
        samples = sample(pipe, count=count, seed=seed, batch_size=batch_size, sampling=sampling)
        seconds = time.perf_counter() - started
        evaluator.reset()
        evaluator.update(torch.from_numpy(samples.images).permute(0, 3, 1, 2))
        report = evaluator.result().values
        rows.append(
            {
                "value": value,
                **report["metrics"],
                "seconds_per_image": seconds / count,
                "evaluations_per_image": samples.report["network_evaluations"] / count,
            }
        )
        if on_value is not None:
            on_value(value, report["metrics"])
    shared = {name: report[name] for name in ("protocol", "floor", "encoder", "reference", "versions")}
    return {"setting": setting, "sampling": to_dict(pipe.sampling), "origin": pipe.origin, "rows": rows, **shared}
