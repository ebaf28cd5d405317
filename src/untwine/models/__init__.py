"""Backbones: ``forward(x, t, condition) -> Output``. One file each."""

from untwine.registry import Registry

MODELS = Registry(
    "model",
    {
        "ddt": "untwine.models.ddt:DDT",
        "improved_dit": "untwine.models.dit:ImprovedDiT",
    },
)
