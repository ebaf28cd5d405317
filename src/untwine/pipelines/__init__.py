"""User-facing tasks: thin subclasses of diffusers' ``DiffusionPipeline``."""

from untwine.registry import Registry

PIPELINES = Registry(
    "pipeline",
    {
        "image": "untwine.pipelines.image:ImagePipeline",
        "text_to_image": "untwine.pipelines.text_to_image:TextToImagePipeline",
    },
)
