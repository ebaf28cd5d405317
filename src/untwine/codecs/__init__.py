"""Codecs between samples (pixels, audio, ...) and the normalised latents that the backbone sees."""

from untwine.registry import Registry

codecs = Registry("codec", {"identity": "untwine.codecs.identity:IdentityCodec"})
