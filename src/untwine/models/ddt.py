"""Decoupled Diffusion Transformer (arXiv 2504.05741): a large condition encoder, a small velocity decoder.

The encoder reads ``x_t``, t and the label and yields one state per token, ``silu(time + h)``. The decoder embeds
``x_t`` afresh and is modulated, token by token, by that state alone: it never sees t or the label. The state changes
slowly along a trajectory, so most sampling steps can reuse it and run the decoder only.

Differs from the reference (github.com/MCG-NJU/DDT): data is at t = 0 and noise at t = 1, so the velocity has the
other sign (:meth:`DDT.from_official` moves both into the weights and the config); a head's width must be divisible by
4; t may also be given per token.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from untwine.contracts import Condition, EncoderState, Output, Site
from untwine.models.base import Backbone
from untwine.models.layers.embeddings import PatchEmbedding, unpatchify
from untwine.models.layers.official import ARGUMENTS, PREFIXES


class DDT(Backbone):
    """Class-conditional velocity predictor with a reusable encoder state.

    Args:
        in_channels: channels C of the sample, also of the velocity.
        hidden_size: width D, a multiple of ``4 * num_heads``.
        depth: encoder and decoder blocks together.
        encoder_depth: how many of them are the encoder, in [1, depth - 1].
        num_heads: attention heads.
        patch_size: side of a square patch.
        num_classes: 0 for an unconditional model, which accepts no condition.
        time_scale, time_origin: the time embedding is of ``time_scale * (t - time_origin)``.
        time_max_period: longest period of the time embedding.
    """

    decoupled = True
    modulated_per_token = frozenset({"decoder"})
    fsdp_methods = ("encode", "decode", "modulate")
    SIZES = {  # noqa: RUF012 - a table, read only
        "B": {"hidden_size": 768, "depth": 12, "encoder_depth": 8, "num_heads": 12},
        "L": {"hidden_size": 1024, "depth": 24, "encoder_depth": 20, "num_heads": 16},
        "XL": {"hidden_size": 1152, "depth": 28, "encoder_depth": 22, "num_heads": 16},
    }
    _official_arguments = tuple(ARGUMENTS)
    _official_prefixes = {**PREFIXES, "s_embedder.": "encoder_embedder.", "x_embedder.": "decoder_embedder."}  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        *,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        encoder_depth: int = 22,
        num_heads: int = 16,
        patch_size: int = 2,
        num_classes: int = 1000,
        time_scale: float = 1.0,
        time_origin: float = 0.0,
        time_max_period: float = 10.0,
    ) -> None:
        super().__init__()
        if not 0 < encoder_depth < depth:
            raise ValueError(f"encoder_depth must be within [1, depth - 1 = {depth - 1}], got {encoder_depth}")
        self._add_trunk()
        self.encoder_embedder = PatchEmbedding(in_channels, hidden_size, patch_size)
        self.decoder_embedder = PatchEmbedding(in_channels, hidden_size, patch_size)
        self.state = nn.SiLU()

    @property
    def parts(self) -> dict[str, range]:
        """Block indices of the encoder and of the decoder: two residual streams."""
        split, depth = self.config.encoder_depth, self.config.depth
        return {"encoder": range(split), "decoder": range(split, depth)}

    def sites(self) -> dict[str, Site]:
        """As every backbone, and ``state``: what the decoder is conditioned on."""
        return {**super().sites(), "state": Site("encoder", "encoder", 0)}

    def encode(
        self,
        x: Tensor,
        t: Tensor,
        condition: Condition,
        *,
        attention_mask: Tensor | None = None,
        features: Collection[str] = (),
    ) -> EncoderState:
        """The state of ``x`` at time t, valid for several decoder calls.

        Args:
            x: (B, C, H, W), H and W divisible by the patch size.
            t: (B,) in [0, 1], 0 = data, or (B, N) per token.
            condition: labels (B,), or nothing when the model has no classes.
            attention_mask: (N, N), (B, N, N) or (B, H, N, N) bool, True = attend; the decoder never masks.
            features: encoder sites (``blocks.i``) to carry along in the state.
        """
        self._check_sample(x)
        self._check_features(features, "encoder")
        time, embedded = self._embed_condition(x, t, condition)
        contexts = [self._context(x, attention_mask)] * self.config.encoder_depth
        hidden, taps = self._run("encoder", self.encoder_embedder(x), embedded, contexts, features)
        return EncoderState(tokens=self.state(time + hidden), hidden=hidden, t=t, features=taps)

    def decode(
        self, x: Tensor, state: EncoderState, *, retime: Tensor | None = None, features: Collection[str] = ()
    ) -> Output:
        """The velocity of ``x`` under a state that may come from another step.

        Args:
            x: (B, C, H, W), of the grid that the state was computed on.
            state: from :meth:`encode`; its modulations are used where :meth:`modulate` filled them.
            retime: time to mix into the state anew; None keeps the time (and label) of the state.
            features: decoder sites to return beside those that the state carries.
        """
        self._check_sample(x)
        self._check_features(features, "decoder")
        if retime is not None:
            tokens = self.state(self.time_embedder(retime) + state.hidden)
            state = replace(state, tokens=tokens, t=retime, modulations=None)
        tokens = self.decoder_embedder(x)
        if state.tokens.shape != tokens.shape:
            raise ValueError(
                f"state of shape {tuple(state.tokens.shape)} does not belong to an x of {tuple(x.shape)}, which has "
                f"tokens {tuple(tokens.shape)}; encode the same batch and grid"
            )
        *given, last = state.modulations or [None] * (len(self.parts["decoder"]) + 1)
        contexts = [self._context(x)] * len(given)
        tokens, taps = self._run("decoder", tokens, state.tokens, contexts, features, given)
        patches = self.final_layer(tokens, state.tokens, last)
        sample = unpatchify(patches, self.config.patch_size, (x.shape[2], x.shape[3])).to(x.dtype)
        return Output(sample, {**state.features, **taps})

    @torch.no_grad()
    def modulate(self, state: EncoderState) -> Any:
        """``state`` with the decoder's modulations: (B, N, 6D) a block and (B, N, 2D) for the final layer.

        They depend on the state alone, so a state that serves several steps need not have them computed in each. The
        result is bitwise the same; the memory is :meth:`modulation_bytes`.
        """
        blocks: Any = self.blocks
        given = [blocks[i].modulation(state.tokens) for i in self.parts["decoder"]]
        return replace(state, modulations=(*given, self.final_layer.modulation(state.tokens)))

    def modulation_bytes(self, state: EncoderState) -> int:
        """What :meth:`modulate` adds to ``state``, for a caller with a memory budget."""
        return (6 * len(self.parts["decoder"]) + 2) * state.tokens.nbytes

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        condition: Condition,
        *,
        state: EncoderState | None = None,
        retime: bool = False,
        attention_mask: Tensor | None = None,
        features: Collection[str] = (),
    ) -> Output:
        """``decode(x, encode(x, t, condition))``.

        With a given ``state`` the encoder does not run and t, condition and mask change nothing: the decoder sees x
        and the time and label of the state. ``retime=True`` gives the state the time t.

        Args:
            features: sites (``blocks.i``) to return; those of the encoder come from the state when it is given.
        """
        self._check_features(features)
        encoder_sites = {f"blocks.{i}" for i in self.parts["encoder"]}.intersection(features)
        if state is None:
            state = self.encode(x, t, condition, attention_mask=attention_mask, features=encoder_sites)
            retime = False
        elif lost := encoder_sites - state.features.keys():
            raise ValueError(f"features: {sorted(lost)} belong to the encoder, and the given state does not carry them")
        decoder_sites = [name for name in features if name not in encoder_sites]
        return self.decode(x, state, retime=t if retime else None, features=decoder_sites)

    def enable_cache(self, config: Any) -> None:
        """As in diffusers, with the encoder and the decoder as the two residual streams that they are.

        Raises:
            ValueError: for a method of diffusers that takes all blocks for one stream, or if neither part has the two
                blocks that first-block caching needs.
        """
        from diffusers.hooks.first_block_cache import FirstBlockCacheConfig, apply_first_block_cache
        from diffusers.hooks.hooks import HookRegistry
        from diffusers.hooks.mag_cache import MagCacheConfig

        if isinstance(config, MagCacheConfig):
            raise ValueError("config: MagCache takes all blocks for one residual stream; use FirstBlockCacheConfig")
        if not isinstance(config, FirstBlockCacheConfig) or self.is_cache_enabled:
            return super().enable_cache(config)
        streams = [self.blocks[part.start : part.stop] for part in self.parts.values() if len(part) > 1]
        if not streams:
            raise ValueError("config: first-block caching needs an encoder or a decoder of at least two blocks")
        for stream in streams:
            holder = nn.Module()
            holder.blocks = stream
            apply_first_block_cache(holder, config)
        HookRegistry.check_if_exists_or_initialize(self).invalidate_child_registries_cache()
        self._cache_config = config
