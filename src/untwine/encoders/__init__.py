"""Frozen feature networks: extractors of the metrics, targets of REPA, encoders of RAE."""

from untwine.registry import Registry

ENCODERS = Registry(
    "encoder",
    {
        "clip": "untwine.encoders.transformers:CLIP",
        "dinov2": "untwine.encoders.transformers:DINOv2",
        "efflite0": "untwine.encoders.efflite:EfficientNetLite0",
        "inception": "untwine.encoders.inception:InceptionV3",
        "pixels": "untwine.encoders.pixels:Pixels",
        "siglip": "untwine.encoders.transformers:SigLIP",
    },
)
