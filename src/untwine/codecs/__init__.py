"""Codecs between samples (pixels, audio, ...) and the normalised latents that the backbone sees."""

from untwine.models import MODELS
from untwine.registry import Registry

CODECS = Registry(
    "codec",
    {
        "identity": "untwine.codecs.identity:IdentityCodec",
        "rae": "untwine.codecs.rae:RAECodec",
        "vae": "untwine.codecs.vae:VAECodec",
    },
)
AUTOENCODERS = Registry("autoencoder", {"rae": "untwine.codecs.rae_model:RAE"})
"""codecs that are trained here, under the objective ``reconstruction``"""
TRAINED = Registry("model", {}, others=(AUTOENCODERS, MODELS))
"""what a recipe can train"""
