"""Decoupled backbones: an encoder whose state may serve several calls of the decoder (DDT, arXiv 2504.05741)."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from untwine.contracts import Condition, EncoderState, Output, Site
from untwine.models.base import Backbone
from untwine.models.layers.block import Context
from untwine.models.layers.embeddings import PatchEmbedding


class Decoupled(Backbone):
    """What reads ``x_t``, t and the condition (encoder), and what reads ``x_t`` and the encoder's state (decoder).

    A subclass gives the embedders of both and ``state``, the module that makes what the decoder is conditioned on of
    ``time + hidden``. The decoder's modulations are affine in it.
    """

    decoupled = True
    modulated_per_token = frozenset({"decoder"})
    fsdp_methods = ("encode", "decode", "modulate")
    encoder_embedder: PatchEmbedding
    decoder_embedder: PatchEmbedding
    state: nn.Module

    def _add_trunk(self) -> None:
        split, depth = self.config.encoder_depth, self.config.depth
        if not 0 < split < depth:
            raise ValueError(f"encoder_depth must be within [1, depth - 1 = {depth - 1}], got {split}")
        super()._add_trunk()

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
        tokens, context = self._encoder_sequence(x, t, time, condition, self._context(x, attention_mask))
        hidden, taps = self._run("encoder", tokens, embedded, [context] * self.config.encoder_depth, features)
        hidden = hidden[:, : self._num_state_tokens(x)]
        return EncoderState(tokens=self.state(time + hidden), hidden=hidden, t=t, features=taps)

    def _encoder_sequence(
        self, x: Tensor, t: Tensor, time: Tensor, condition: Condition, context: Context
    ) -> tuple[Tensor, Context]:
        """The tokens that enter the encoder, those of the image first, and what its blocks are told of them."""
        return self.encoder_embedder(x), context

    def _num_state_tokens(self, x: Tensor) -> int:
        """Tokens that the decoder reads, which stand first in the encoder's sequence."""
        return math.prod(self._grid(x))

    def _decoder_sequence(self, x: Tensor) -> Tensor:
        return self.decoder_embedder(x)

    def _predict(
        self, x: Tensor, tokens: Tensor, state: EncoderState, modulation: Tensor | None, features: dict[str, Tensor]
    ) -> Output:
        return self._output(x, self.final_layer(tokens, state.tokens, modulation), features)

    def decode(
        self, x: Tensor, state: EncoderState, *, retime: Tensor | None = None, features: Collection[str] = ()
    ) -> Output:
        """The prediction for ``x`` under a state that may come from another step.

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
        tokens = self._decoder_sequence(x)
        if state.tokens.shape != tokens.shape:
            raise ValueError(
                f"state of shape {tuple(state.tokens.shape)} does not belong to an x of {tuple(x.shape)}, which has "
                f"tokens {tuple(tokens.shape)}; encode the same batch and grid"
            )
        *given, last = state.modulations or [None] * (len(self.parts["decoder"]) + 1)
        contexts = [self._context(x, part="decoder")] * len(given)
        tokens, taps = self._run("decoder", tokens, state.tokens, contexts, features, given)
        return self._predict(x, tokens, state, last, {**state.features, **taps})

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
