"""Backbones: ``forward(x, t, condition) -> Output``. One file each."""

from untwine.registry import Registry

MODELS = Registry(
    "model",
    {
        "ddt": "untwine.models.ddt:DDT",
        "improved_dit": "untwine.models.dit:ImprovedDiT",
        "dit": "untwine.models.dit:DiT",
        "sit": "untwine.models.sit:SiT",
        "lightningdit": "untwine.models.lightningdit:LightningDiT",
        "ddt_head": "untwine.models.ddt_head:DDTHead",
        "umd": "untwine.models.umd:UMD",
    },
)
