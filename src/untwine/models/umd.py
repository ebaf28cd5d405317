"""UMD (arXiv 2406.17688): one auto-encoder that reconstructs hidden patches and removes noise from visible ones.

An encoder reads the visible patches with a few class tokens, whose mean is the representation of the image. A shallow
decoder reads that vector and all patches, a learned token in place of the hidden ones, and predicts x0 and the noise.

Differs from the reference (github.com/philippe-eecs/small-vision): tokens besides the image's stand after it, which
attention does not notice; class tokens start at random, since equal ones would stay equal; a new model predicts zero;
the last bias may differ within a patch; on another grid than their own, position tables are resized.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from torch import Tensor, nn

from untwine.contracts import Condition, Output
from untwine.models.base import Backbone, mask_of_samples
from untwine.models.decoupled import Decoupled
from untwine.models.layers.basic import Linear
from untwine.models.layers.block import Block, Context, FinalLayer, Style
from untwine.models.layers.embeddings import LabelEmbedding, PatchEmbedding
from untwine.models.umd_official import DIALECT

Conditioning = Literal["adaln", "tokens"]


def visible_patches(noise: Tensor, ratio: float) -> Tensor:
    """(B, K) the places of the visible patches: the ``K = int(N (1 - ratio))`` of least noise (B, N).

    Raises:
        ValueError: if no patch stays visible.
    """
    count = int(noise.shape[1] * (1 - ratio))
    if not 0 < count <= noise.shape[1]:
        raise ValueError(f"ratio must be within [0, 1) and leave one of {noise.shape[1]} patches visible, got {ratio}")
    return noise.argsort(1)[:, :count]


def hidden_pixels(visible: Tensor, size: tuple[int, int], patch_size: int) -> Tensor:
    """(B, 1, H, W), 1 on the hidden patches of samples of ``size`` and 0 on those at ``visible`` (B, K)."""
    rows, columns = size[0] // patch_size, size[1] // patch_size
    hidden = torch.ones(len(visible), rows * columns, device=visible.device).scatter(1, visible, 0.0)
    return F.interpolate(hidden.view(-1, 1, rows, columns), scale_factor=patch_size, mode="nearest")


@dataclass(frozen=True)
class AffineStyle(Style):
    """Blocks of a vision transformer: LayerNorm with weight and bias, also where it is modulated."""

    norm: Literal["rms", "layer"] = "layer"
    qk_norm: Literal["rms", "layer", "none"] = "none"
    mlp: Literal["swiglu", "gelu"] = "gelu"
    bias: bool = True

    def make_norm(self, hidden_size: int) -> nn.Module:
        return nn.LayerNorm(hidden_size, eps=1e-6)


class TokenBlock(Block):
    """A block that attends to its condition (B, 1, D) as one more token, instead of being modulated by it."""

    def flops(self, num_tokens: int, num_vectors: int) -> dict[str, int]:
        return super().flops(num_tokens + num_vectors, num_vectors)

    def forward(
        self, hidden_states: Tensor, condition: Tensor, context: Context, modulation: Tensor | None = None
    ) -> Tensor:
        both = torch.cat((hidden_states, condition.to(hidden_states.dtype)), 1)
        return super().forward(both, condition, context)[:, : hidden_states.shape[1]]


TransformerBlockRegistry.register(TokenBlock, TransformerBlockMetadata(return_hidden_states_index=0))


def _trunk(width: int) -> nn.Sequential:
    return nn.Sequential(Linear(width, 2 * width), nn.SiLU(), Linear(2 * width, width))


class LevelEmbedding(nn.Module):
    """MLP over ``D / 2`` sines of a level, then as many cosines, of frequencies from 1 to 1 / 10000 (inclusive)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.num_frequencies = hidden_size // 2
        self.trunk = _trunk(hidden_size)

    def forward(self, level: Tensor) -> Tensor:
        """(B,) -> (B, 1, D), or (B, N) -> (B, N, D)."""
        steps = torch.arange(self.num_frequencies, dtype=torch.float32, device=level.device)
        angles = level.float()[..., None] * torch.exp(steps * -(math.log(10000) / (self.num_frequencies - 1)))
        found = self.trunk(torch.cat((angles.sin(), angles.cos()), -1))
        return found[:, None] if level.ndim == 1 else found


class DeepLabelEmbedding(LabelEmbedding):
    """A table of class vectors with an MLP behind it."""

    def __init__(self, num_classes: int, hidden_size: int) -> None:
        super().__init__(num_classes, hidden_size)
        self.trunk = _trunk(hidden_size)

    def forward(self, labels: Tensor) -> Tensor:
        return self.trunk(super().forward(labels))


class LearnedPositions(nn.Module):
    """A learned table of a square grid, bilinearly resized for others."""

    def __init__(self, num_positions: int, hidden_size: int) -> None:
        super().__init__()
        self.side = math.isqrt(num_positions)
        if self.side < 1 or self.side**2 != num_positions:
            raise ValueError(f"num_positions must be a square number, got {num_positions}")
        self.table = nn.Embedding(num_positions, hidden_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal of variance ``1 / num_positions``."""
        nn.init.normal_(self.table.weight, std=1 / self.side)

    def forward(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """(B, N, D) -> (B, N, D) of the same dtype, N = height * width."""
        table = self.table.weight[None]
        if (height, width) != (self.side, self.side):
            square = table.float().transpose(1, 2).unflatten(2, (self.side, self.side))
            table = F.interpolate(square, (height, width), mode="bilinear", align_corners=False)
            table = table.flatten(2).transpose(1, 2)
        return tokens + table.to(tokens.dtype)


class UMD(Backbone):
    """Noise predictor that may see some patches only, and predicts x0 as well: ``Output.extra["x0"]``.

    Args:
        in_channels: channels C of the sample.
        hidden_size: width D, a multiple of 4 and of ``num_heads``.
        depth: blocks of the encoder.
        decoder_depth: blocks of the decoder.
        num_heads: attention heads.
        patch_size: side of a square patch.
        num_classes: 0 for an unconditional model, which accepts no condition.
        num_positions: patches of the learned position tables, a square number; other grids resize the tables.
        num_class_tokens: whose mean after the encoder is the representation.
        conditioning: time and label modulate the blocks ("adaln") or are a token in each ("tokens").
        hides_patches: whether there is a token to decode hidden patches from, which training with masks needs; in a
            network that always sees all patches no gradient would reach it.
        num_timesteps: levels T of the chain; level k is t = (k + 1) / T, and t = 0 a clean sample.
    """

    predicts = "noise"
    SIZES = {  # noqa: RUF012 - a table, read only
        "S": {"hidden_size": 384, "depth": 12, "decoder_depth": 4, "num_heads": 6},
        "B": {"hidden_size": 768, "depth": 12, "decoder_depth": 4, "num_heads": 12},
        "L": {"hidden_size": 1024, "depth": 24, "decoder_depth": 8, "num_heads": 16},
    }
    dialects = (DIALECT,)
    _width_divisor = 1
    _repeated_blocks = ("Block", "TokenBlock")
    _no_split_modules = ("Block", "TokenBlock")
    _skip_layerwise_casting_patterns = ("embedder", "norm", "adaln", "final_layer", "positions")
    fsdp_methods = ("represent",)

    @register_to_config
    def __init__(
        self,
        *,
        in_channels: int = 4,
        hidden_size: int = 768,
        depth: int = 12,
        decoder_depth: int = 4,
        num_heads: int = 12,
        patch_size: int = 2,
        num_classes: int = 1000,
        num_positions: int = 256,
        num_class_tokens: int = 4,
        conditioning: Conditioning = "adaln",
        hides_patches: bool = False,
        num_timesteps: int = 1000,
    ) -> None:
        super().__init__()
        if conditioning not in get_args(Conditioning):
            raise ValueError(f"conditioning must be 'adaln' or 'tokens', got {conditioning!r}")
        for name, value in (
            ("decoder_depth", decoder_depth), ("num_class_tokens", num_class_tokens), ("num_timesteps", num_timesteps),
        ):  # fmt: skip
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self._add_trunk()
        self.blocks.extend(self._block(depth + i) for i in range(decoder_depth))
        if num_classes:
            self.label_embedder = DeepLabelEmbedding(num_classes, hidden_size)
        self.embedder = PatchEmbedding(in_channels, hidden_size, patch_size)
        self.encoder_positions = LearnedPositions(num_positions, hidden_size)
        self.decoder_positions = LearnedPositions(num_positions, hidden_size)
        self.class_tokens = nn.Parameter(torch.empty(num_class_tokens, hidden_size))
        self.mask_token = nn.Parameter(torch.empty(hidden_size)) if hides_patches else None
        self.encoder_norm = self._style.make_norm(hidden_size)
        self._initialise()

    def _initialise(self) -> None:
        """Xavier-uniform linear layers without bias; every block starts as the identity."""
        for layer in self.blocks.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        self._zero_modulations()
        for tokens in (self.class_tokens, self.mask_token):
            if tokens is not None:
                nn.init.normal_(tokens, std=0.02)

    @property
    def _style(self) -> AffineStyle:
        return AffineStyle(modulated=self.config.conditioning == "adaln")

    def _block(self, index: int) -> Block:
        cls = Block if self.config.conditioning == "adaln" else TokenBlock
        return cls(self.config.hidden_size, self.config.num_heads, self._style)

    def _final_layer(self, hidden_size: int) -> FinalLayer:
        return FinalLayer(hidden_size, self.num_outputs * self.config.patch_size**2, self._style)

    def _time_embedder(self) -> Any:
        return LevelEmbedding(self.config.hidden_size)

    def _embed_time(self, t: Tensor) -> Tensor:
        return self.time_embedder(torch.round(t.float() * self.config.num_timesteps))

    @property
    def num_outputs(self) -> int:
        """x0 and the noise."""
        return 2 * self.config.in_channels

    @property
    def parts(self) -> dict[str, range]:
        depth = self.config.depth
        return {"encoder": range(depth), "decoder": range(depth, depth + self.config.decoder_depth)}

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        condition: Condition,
        *,
        visible: Tensor | None = None,
        attention_mask: Tensor | None = None,
        features: Collection[str] = (),
    ) -> Output:
        """The noise in ``x`` at time t; with it ``extra["x0"]`` (B, C, H, W) and ``extra["representation"]`` (B, D).

        Args:
            x: (B, C, H, W), H and W divisible by the patch size.
            t: (B,) in [0, 1], 0 = data, or (B, N) per token where time modulates the blocks.
            condition: labels (B,), or nothing when the model has no classes.
            visible: (B, K) places of the patches that the encoder sees, see :func:`visible_patches`; None = all.
            attention_mask: (N, N), (B, N, N) or (B, H, N, N) bool between patches, True = attend; not with ``visible``.
            features: sites (``blocks.i``) to return: the patches that the block sees, then its class tokens.
        """
        self._check_features(features)
        embedded, tokens, context = self._inputs(x, t, condition, visible, attention_mask)
        grid, count = self._grid(x), self.config.num_class_tokens
        tokens, taps = self._encode(tokens, embedded, visible, context, features)
        representation, tokens = tokens[:, -count:].mean(1, keepdim=True), tokens[:, :-count]
        if self.mask_token is not None:
            hidden = self.mask_token.to(tokens.dtype)
            if visible is None:
                tokens = tokens + 0 * hidden  # a gradient on every process, whatever its share of the batch
            else:
                places = visible[..., None].expand(-1, -1, tokens.shape[-1])
                tokens = hidden.expand(len(x), math.prod(grid), -1).scatter(1, places, tokens)
        sequence = torch.cat((self.decoder_positions(tokens, *grid), representation), 1)
        contexts = [self._beside(context, 1)] * self.config.decoder_depth
        tokens, more = self._run("decoder", sequence, _extended(embedded, 1), contexts, features)
        out = self._output(x, self.final_layer(tokens[:, :-1], embedded), {**taps, **more})
        x0, noise = out.sample.chunk(2, 1)
        return replace(out, sample=noise, extra={"x0": x0, "representation": representation[:, 0]})

    def represent(
        self,
        x: Tensor,
        t: Tensor | None = None,
        condition: Condition | None = None,
        *,
        visible: Tensor | None = None,
    ) -> Tensor:
        """(B, D) the representation of samples, by the encoder alone; clean and without label unless told."""
        if t is None:
            t = torch.zeros(len(x), device=x.device)
        if condition is None:
            zeros = torch.zeros(len(x), dtype=torch.int64, device=x.device)
            condition = self.null(Condition(labels=zeros if self.accepts else None))
        embedded, tokens, context = self._inputs(x, t, condition, visible, None)
        tokens, _ = self._encode(tokens, embedded, visible, context, ())
        return tokens[:, -self.config.num_class_tokens :].mean(1)

    def _inputs(
        self, x: Tensor, t: Tensor, condition: Condition, visible: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Context]:
        """The condition (B, 1 or N, D), the patches with their positions, and what blocks are told of the patches."""
        self._check_sample(x)
        if visible is not None and self.mask_token is None:
            raise ValueError("visible: this model cannot decode hidden patches; build it with hides_patches = True")
        if visible is not None and mask is not None:
            raise ValueError("attention_mask is between all patches, and visible leaves out some; give one of them")
        _, embedded = self._embed_condition(x, t, condition)
        grid = self._grid(x)
        tokens = self.encoder_positions(self.embedder(x), *grid)
        found = mask_of_samples(mask, len(x), self.config.num_heads, math.prod(grid))
        return embedded, tokens, Context(None, found)

    def _embed_condition(self, x: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        if self.config.conditioning == "adaln":
            return super()._embed_condition(x, t, condition)
        self.check_condition(condition)
        labels, batch = condition.labels, len(x)
        if t.shape != (batch,):
            raise ValueError(f"t must be ({batch},) where time is a token, got {tuple(t.shape)}")
        if labels is not None and labels.shape != (batch,):
            raise ValueError(f"condition.labels must be ({batch},), got {tuple(labels.shape)}")
        time = self._embed_time(t)
        return time, time if self.label_embedder is None or labels is None else time + self.label_embedder(labels)

    def _encode(
        self, tokens: Tensor, embedded: Tensor, visible: Tensor | None, context: Context, features: Collection[str]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The visible patches and the class tokens after the encoder (B, K + M, D)."""
        if visible is not None:
            tokens = _rows(tokens, visible)
            embedded = embedded if embedded.shape[1] == 1 else _rows(embedded, visible)
        classes = self.class_tokens.to(tokens.dtype).expand(len(tokens), -1, -1)
        contexts = [self._beside(context, classes.shape[1])] * self.config.depth
        condition = _extended(embedded, classes.shape[1])
        tokens, taps = self._run("encoder", torch.cat((tokens, classes), 1), condition, contexts, features)
        return self.encoder_norm(tokens), taps

    def _beside(self, context: Context, count: int) -> Context:
        """The context of a sequence with so many more tokens, which all see and are seen."""
        count += self.config.conditioning == "tokens"
        mask = context.mask
        return context if mask is None else replace(context, mask=F.pad(mask, (0, count, 0, count), value=True))

    def _num_tokens(self, part: str, num_tokens: int) -> int:
        return num_tokens + (self.config.num_class_tokens if part == "encoder" else 1)

    def site_flops(self, num_tokens: int) -> dict[str, int]:
        return {**super().site_flops(num_tokens), "final_layer": self.final_layer.flops(num_tokens, 1)}

    def flops(self, sample_shape: tuple[int, ...]) -> int:
        """As every backbone's, with its one patch layer and the MLPs of time and label."""
        c = self.config
        num_tokens = math.prod(sample_shape[1:]) // c.patch_size**2
        sites, known = self.site_flops(num_tokens), self.sites()
        trunk = sum(value for name, value in sites.items() if known[name].kind in ("block", "head"))
        mlps = 8 * c.hidden_size**2 * (1 + (c.num_classes > 0))
        return trunk + 2 * num_tokens * c.in_channels * c.patch_size**2 * c.hidden_size + mlps

    def enable_cache(self, config: Any) -> None:
        """As of a decoupled backbone: encoder and decoder are two residual streams."""
        from diffusers.hooks.first_block_cache import FirstBlockCacheConfig
        from diffusers.hooks.mag_cache import MagCacheConfig

        if isinstance(config, FirstBlockCacheConfig | MagCacheConfig) and not self.is_cache_enabled:
            Decoupled.enable_cache(self, config)  # type: ignore[arg-type]
        else:
            super().enable_cache(config)


def _rows(tokens: Tensor, places: Tensor) -> Tensor:
    """(B, K, D): the tokens (B, N, D) at ``places`` (B, K)."""
    return tokens.gather(1, places[..., None].expand(-1, -1, tokens.shape[-1]))


def _extended(condition: Tensor, count: int) -> Tensor:
    """The condition (B, 1 or N, D) with that of ``count`` tokens that stand for no place: the mean over places."""
    if condition.shape[1] == 1:
        return condition
    return torch.cat((condition, condition.mean(1, keepdim=True).expand(-1, count, -1)), 1)
