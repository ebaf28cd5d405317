"""Codecs between samples (pixels, audio, ...) and the normalised latents that the backbone sees."""

from untwine.registry import Registry

CODECS = Registry(
    "codec",
    {
        "identity": "untwine.codecs.identity:IdentityCodec",
        "vae": "untwine.codecs.vae:VAECodec",
    },
)
