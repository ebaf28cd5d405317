"""untwine: diffusion transformers trained, fine-tuned and sampled from one core.

Importing this package imports neither torch nor diffusers; names resolve when they are first used.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
_LAZY = {
    "DDT": "untwine.models.ddt",
    "DDTHead": "untwine.models.ddt_head",
    "DiT": "untwine.models.dit",
    "ImagePipeline": "untwine.pipelines.image",
    "ImprovedDiT": "untwine.models.dit",
    "LightningDiT": "untwine.models.lightningdit",
    "SiT": "untwine.models.sit",
    "TextToImagePipeline": "untwine.pipelines.text_to_image",
    "ModelMixin": "diffusers",  # looked up here when diffusers loads a saved pipeline
    "load": "untwine.pipelines.loading",
    "sample": "untwine.pipelines.series",
    "from_official": "untwine.integrations.official",
    "Trainer": "untwine.training.trainer",
}
__all__ = [
    "DDT",
    "DDTHead",
    "DiT",
    "ImagePipeline",
    "ImprovedDiT",
    "LightningDiT",
    "SiT",
    "TextToImagePipeline",
    "Trainer",
    "__version__",
    "from_official",
    "load",
    "sample",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'untwine' has no attribute {name!r}")
