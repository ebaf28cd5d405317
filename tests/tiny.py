"""Tiny recipes that train in a second."""

from __future__ import annotations

from typing import Any

from tests.objectives import register
from untwine.training.recipe import Recipe


def tiny(**changes: Any) -> Recipe:
    """A DDT of width 32 and 3 blocks on digits; ``changes`` are ``{"train.num_steps": 4}``-like, nested by dots."""
    register()
    data: dict[str, Any] = {
        "name": "tiny",
        "seed": 3,
        "data": {"kind": "digits"},
        "model": {"kind": "ddt", "hidden_size": 32, "depth": 3, "encoder_depth": 2, "num_heads": 2},
        "objective": {"kind": "flow_matching"},
        "optimizer": {"kind": "adamw", "lr": 1e-3},
        "schedule": {"kind": "cosine", "warmup_steps": 2},
        "ema": [{"kind": "constant", "decay": 0.9}, {"kind": "power", "sigma_rel": 0.1}],
        "train": {
            "num_steps": 8,
            "batch_size": 16,
            "validation": 60,
            "log_every": 4,
            "validate_every": 100,
            "save_every": 3,
        },
    }
    for path, value in changes.items():
        *parents, last = path.split(".")
        place = data
        for parent in parents:
            place = place[parent]
        place[last] = value
    return Recipe.from_dict(data)
