"""The wide, shallow DDT head: RAE's DiT^DH (arXiv 2510.11690) and its in-context successor of DiffusionBench
(arXiv 2606.24888).

DDT's split over LightningDiT's block: the encoder has a width of its own, and the decoder ("head") is wide, so that it
can diffuse in the high-dimensional space of a representation autoencoder. The head is conditioned on ``silu(s)``,
``s = s_projector(silu(time + h))``. With ``conditioning="tokens"`` the encoder has time and label (or text) as tokens
instead of modulations.

``class_token_dim`` adds a vector that is diffused together with the image (REG): the sample is then the
:class:`~untwine.models.layers.packing.Packing` of both, one token more in encoder and head.

``base_depth`` adds a second, cheaper prediction from the encoder's tokens after that many blocks, returned as
``extra["base"]``: what internal guidance extrapolates from.

Differs from the references (github.com/bytetriper/RAE, github.com/End2End-Diffusion/diffusion-bench): the state that
is cached and extrapolated is ``silu(s)``, of the head's width, in which the modulations are affine; any grid is
accepted where positions are computed; REPA's linear head belongs to the alignment term; MeanFlow's times are t and r
instead of t - r and t.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from math import isqrt
from typing import Literal

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from untwine.contracts import Condition, EncoderState, Output, PredictionKind
from untwine.models.conditioning import LightningBackbone
from untwine.models.ddt_head_official import BENCH_DIALECT, RAE_DIALECT
from untwine.models.decoupled import Decoupled
from untwine.models.layers.basic import Linear, RMSNorm
from untwine.models.layers.block import Block, Context, FinalLayer
from untwine.models.layers.embeddings import PatchEmbedding, unpatchify
from untwine.models.layers.packing import Packing
from untwine.models.layers.rope import Rope, with_unrotated


def _token_embedder(dim: int, hidden_size: int) -> nn.Sequential:
    return nn.Sequential(Linear(dim, hidden_size), RMSNorm(hidden_size))


class DDTHead(LightningBackbone, Decoupled):
    """Velocity predictor whose encoder and head have their own widths.

    Args:
        in_channels: channels C of the sample, also of the velocity.
        hidden_size: width of the encoder, a multiple of ``4 * num_heads``.
        decoder_hidden_size: width of the head, a multiple of ``4 * decoder_num_heads``.
        depth: blocks of encoder and head together.
        encoder_depth: how many of them are the encoder, in [1, depth - 1].
        num_heads, decoder_num_heads: attention heads of both.
        class_token_dim: width of a vector diffused with the image; the sample is then a packing (B, 1, L) of a square
            image and it, and needs ``conditioning="tokens"``. 0 for none.
        base_depth: encoder blocks below the second prediction, in [1, encoder_depth]; 0 for none.
        patch_size, num_classes, conditioning, norm, qk_norm, mlp, use_rope, num_positions, time_features, time_scale,
            time_origin, num_time_tokens, num_label_tokens, text_dim, second_time, predicts: as
            :class:`~untwine.models.lightningdit.LightningDiT`.
    """

    SIZES = {  # noqa: RUF012 - a table, read only
        "S": {
            "hidden_size": 384, "decoder_hidden_size": 2048, "depth": 14, "encoder_depth": 12, "num_heads": 6,
            "decoder_num_heads": 16,
        },
        "XL": {
            "hidden_size": 1152, "decoder_hidden_size": 2048, "depth": 30, "encoder_depth": 28, "num_heads": 16,
            "decoder_num_heads": 16,
        },
    }  # fmt: skip
    dialects = (RAE_DIALECT, BENCH_DIALECT)

    @register_to_config
    def __init__(
        self,
        *,
        in_channels: int = 768,
        hidden_size: int = 1152,
        decoder_hidden_size: int = 2048,
        depth: int = 30,
        encoder_depth: int = 28,
        num_heads: int = 16,
        decoder_num_heads: int = 16,
        patch_size: int = 1,
        num_classes: int = 1000,
        conditioning: Literal["adaln", "tokens"] = "adaln",
        norm: Literal["rms", "layer"] = "rms",
        qk_norm: bool = False,
        mlp: Literal["swiglu", "gelu"] = "swiglu",
        use_rope: bool = True,
        num_positions: int = 0,
        time_features: Literal["sinusoid", "fourier"] = "fourier",
        time_scale: float = 1.0,
        time_origin: float = 0.0,
        num_time_tokens: int = 4,
        num_label_tokens: int = 8,
        text_dim: int = 0,
        second_time: bool = False,
        class_token_dim: int = 0,
        base_depth: int = 0,
        predicts: PredictionKind = "velocity",
    ) -> None:
        super().__init__()
        self._check_width("decoder_hidden_size", decoder_hidden_size, "decoder_num_heads", decoder_num_heads)
        if not 0 <= base_depth <= encoder_depth:
            raise ValueError(f"base_depth must be within [0, encoder_depth = {encoder_depth}], got {base_depth}")
        if class_token_dim and conditioning != "tokens":
            raise ValueError(f"class_token_dim needs conditioning='tokens', got conditioning={conditioning!r}")
        self._add_trunk()
        self.encoder_embedder = PatchEmbedding(in_channels, hidden_size, patch_size)
        self.decoder_embedder = PatchEmbedding(in_channels, decoder_hidden_size, patch_size)
        equal = hidden_size == decoder_hidden_size
        projector = nn.Identity() if equal else Linear(hidden_size, decoder_hidden_size)
        self.state = nn.Sequential(nn.SiLU(), projector, nn.SiLU())
        patch = in_channels * patch_size**2
        self.base_layer = FinalLayer(hidden_size, patch, self._style(modulated=True)) if base_depth else None
        self.class_encoder_embedder = self.class_decoder_embedder = self.class_layer = None
        if class_token_dim:
            self.class_encoder_embedder = _token_embedder(class_token_dim, hidden_size)
            self.class_decoder_embedder = _token_embedder(class_token_dim, decoder_hidden_size)
            self.class_layer = Linear(decoder_hidden_size, class_token_dim)
        self._initialise()

    def _initialise(self) -> None:
        super()._initialise()
        if self.class_layer is not None:
            nn.init.zeros_(self.class_layer.weight)
            nn.init.zeros_(self.class_layer.bias)

    def packing(self, size: int) -> Packing:
        """How an image of ``size`` x ``size`` and the class token make one sample."""
        c = self.config
        return Packing({"image": (c.in_channels, size, size), "token": (c.class_token_dim,)})

    def packed_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of a sample (without the batch) whose image has ``shape`` (C, H, H)."""
        return (1, self.packing(shape[-1]).length) if self.config.class_token_dim else shape

    def pack(self, image: Tensor, token: Tensor) -> Tensor:
        """An image (B, C, H, H) and a class token (B, z) as one sample.

        Raises:
            ValueError: for a token of another width, or an image that is not square.
        """
        if token.shape[-1] != self.config.class_token_dim:
            raise ValueError(
                f"class_token_dim is {self.config.class_token_dim}, but the class tokens have {token.shape[-1]} "
                "numbers; set model.class_token_dim to that"
            )
        if image.shape[-1] != image.shape[-2]:
            raise ValueError(f"image must be square to be packed with a class token, got {tuple(image.shape)}")
        return self.packing(image.shape[-1]).pack({"image": image, "token": token})

    def unpack(self, x: Tensor) -> dict[str, Tensor]:
        """Image (B, C, H, W) and class token (B, z) of a sample; the image alone where there is no token."""
        c = self.config
        if not c.class_token_dim:
            return {"image": x}
        return self.packing(isqrt(max(x.shape[-1] - c.class_token_dim, 0) // c.in_channels)).unpack(x)

    def _check_sample(self, x: Tensor) -> None:
        super()._check_sample(self.unpack(x)["image"])

    def _grid(self, x: Tensor) -> tuple[int, int]:
        return super()._grid(self.unpack(x)["image"])

    def _num_state_tokens(self, x: Tensor) -> int:
        return super()._num_state_tokens(x) + bool(self.config.class_token_dim)

    def _rope(self, height: int, width: int, head_dim: int, device: torch.device) -> Rope | None:
        rope = super()._rope(height, width, head_dim, device)
        if rope is None or not self.config.class_token_dim:
            return rope
        return with_unrotated(rope, 0, before=1)

    def _with_token(self, x: Tensor, tokens: Tensor, embedder: nn.Module | None) -> Tensor:
        """``tokens`` of the image with the class token in front."""
        if embedder is None:
            return tokens
        return torch.cat((embedder(self.unpack(x)["token"])[:, None].to(tokens.dtype), tokens), 1)

    def _decoder_sequence(self, x: Tensor) -> Tensor:
        tokens = self.decoder_embedder(self.unpack(x)["image"])
        return self._with_token(x, tokens, self.class_decoder_embedder)

    def _predict(
        self, x: Tensor, tokens: Tensor, state: EncoderState, modulation: Tensor | None, features: dict[str, Tensor]
    ) -> Output:
        token, condition = None, state.tokens
        if self.class_layer is not None:
            given = self.final_layer.modulation(condition) if modulation is None else modulation
            ready = self.final_layer.modulated(tokens[:, :1], condition[:, :1], given[:, :1])
            token = self.class_layer(ready[:, 0])
            tokens, condition, modulation = tokens[:, 1:], condition[:, 1:], given[:, 1:]
        sample = self._sample(x, self.final_layer(tokens, condition, modulation), token)
        rest = {name: value for name, value in features.items() if name != "base"}
        extra = {"base": self._sample(x, features["base"], token)} if "base" in features else {}
        return Output(sample, rest, extra)

    def _sample(self, x: Tensor, patches: Tensor, token: Tensor | None) -> Tensor:
        """Patches, and the class token where there is one, as a sample of the form of x."""
        height, width = (side * self.config.patch_size for side in self._grid(x))
        image = unpatchify(patches, self.config.patch_size, (height, width)).to(x.dtype)
        return image if token is None else self.pack(image, token.to(x.dtype))

    def _block(self, index: int) -> Block:
        c = self.config
        if index >= c.encoder_depth:
            return Block(c.decoder_hidden_size, c.decoder_num_heads, self._style(modulated=True))
        return Block(c.hidden_size, c.num_heads, self._style(modulated=c.conditioning == "adaln"))

    def _embed_condition(self, x: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        time, embedded = super()._embed_condition(x, t, condition)
        return time, F.silu(embedded)  # RAE applies it twice

    def _encoder_sequence(
        self, x: Tensor, t: Tensor, time: Tensor, condition: Condition, context: Context
    ) -> tuple[Tensor, Context]:
        tokens = self._with_positions(x, self.encoder_embedder(self.unpack(x)["image"]))
        tokens = self._with_token(x, tokens, self.class_encoder_embedder)
        return self._with_condition(tokens, t, time, condition, context)

    def encode(
        self,
        x: Tensor,
        t: Tensor,
        condition: Condition,
        *,
        attention_mask: Tensor | None = None,
        features: Collection[str] = (),
    ) -> EncoderState:
        """As :meth:`~untwine.models.decoupled.Decoupled.encode`; with a ``base_depth`` the state carries its tokens."""
        if self.base_layer is None:
            return super().encode(x, t, condition, attention_mask=attention_mask, features=features)
        site = f"blocks.{self.config.base_depth - 1}"
        asked = {site, *features}
        state = super().encode(x, t, condition, attention_mask=attention_mask, features=asked)
        kept = {name: value for name, value in state.features.items() if name in features}
        time, _ = self._embed_condition(x, t, condition)
        image = slice(int(bool(self.config.class_token_dim)), state.hidden.shape[1])
        tokens = F.silu(time + state.features[site][:, image])
        return replace(state, features={**kept, "base": self.base_layer(tokens, F.silu(tokens))})

    def decode(
        self, x: Tensor, state: EncoderState, *, retime: Tensor | None = None, features: Collection[str] = ()
    ) -> Output:
        """As :meth:`~untwine.models.decoupled.Decoupled.decode`; ``extra["base"]`` is of the step of the state.

        Raises:
            ValueError: also for ``retime`` of a model of two times, whose state knows their difference alone.
        """
        if retime is not None and self.config.second_time:
            raise ValueError("retime: the state of a model with second_time cannot be given another time; encode anew")
        return super().decode(x, state, retime=retime, features=features)

    def _num_tokens(self, part: str, num_tokens: int) -> int:
        prefix = bool(self.config.class_token_dim)
        return num_tokens + prefix + (self.num_condition_tokens if part == "encoder" else 0)

    def _state_flops(self, num_tokens: int) -> int:
        c = self.config
        equal = c.hidden_size == c.decoder_hidden_size
        projector = 0 if equal else 2 * c.hidden_size * c.decoder_hidden_size
        return (num_tokens - self.num_condition_tokens) * projector

    def flops(self, sample_shape: tuple[int, ...], num_text_tokens: int = 0) -> int:
        """As the others of its family, with the class token and the second prediction; of an image or packed sample."""
        c, width = self.config, self.config.hidden_size
        if c.class_token_dim and len(sample_shape) == 2:
            sample_shape = (c.in_channels, (sample_shape[-1] - c.class_token_dim) // c.in_channels, 1)
        found = super().flops(sample_shape, num_text_tokens)
        n = sample_shape[1] * sample_shape[2] // c.patch_size**2
        if self.base_layer is not None:
            found += self.base_layer.flops(n, n) + 2 * width * (self.time_embedder.frequency_dim + width)
        if c.class_token_dim:  # it has its own projections in place of those of a patch
            found += 2 * c.class_token_dim * (width + 2 * c.decoder_hidden_size)
            found -= 2 * c.decoder_hidden_size * self.final_layer.out_features
        return found
