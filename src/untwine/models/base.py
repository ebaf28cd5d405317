"""What the image transformers over :class:`~untwine.models.layers.block.Block` share."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from untwine.contracts import Condition, PredictionKind, Site
from untwine.models.layers.block import Block, Context, FinalLayer
from untwine.models.layers.embeddings import LabelEmbedding, TimestepEmbedding
from untwine.models.layers.official import infer_config, load_translated, translate_config
from untwine.models.layers.rope import image_positions, rope_tables
from untwine.registry import did_you_mean


class Backbone(ModelMixin, ConfigMixin, PeftAdapterMixin, CacheMixin):
    """A stack of modulated blocks conditioned on time and, unless ``num_classes`` is 0, on class labels."""

    _supports_gradient_checkpointing = True
    _repeated_blocks = ("Block",)
    _no_split_modules = ("Block",)
    _skip_layerwise_casting_patterns = ("embedder", "norm", "adaln", "final_layer")

    accepts: frozenset[str] = frozenset({"labels"})
    """condition keys that are required; no others are accepted"""
    predicts: PredictionKind = "velocity"
    decoupled = False
    square_only = False
    max_tokens: int | None = None
    modulated_per_token: frozenset[str] = frozenset()
    """parts whose condition differs from token to token"""
    fsdp_methods: tuple[str, ...] = ()
    """methods beside ``forward`` to pass to ``register_fsdp_forward_method``"""
    attached: Sequence[Any] = ()
    """what listens to the sampling steps, see :mod:`untwine.acceleration.base`; no part of the weights or the config"""
    _scale_in_float32 = False
    SIZES: ClassVar[Mapping[str, Mapping[str, int]]]
    _official_prefixes: ClassVar[Mapping[str, str]]
    _official_arguments: ClassVar[Collection[str]]

    config: Any
    _gradient_checkpointing_func: Any
    blocks: nn.ModuleList

    @classmethod
    def from_size(cls, name: str, **overrides: Any) -> Self:
        """A new model of a published size (a key of ``SIZES``), with any constructor argument overridden."""
        if name not in cls.SIZES:
            raise ValueError(f"name: unknown size {name!r}{did_you_mean(name, list(cls.SIZES))}")
        return cls(**{**cls.SIZES[name], **overrides})

    @classmethod
    def from_official(cls, state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> Self:
        """The model of the official weights; ``config`` holds the official constructor's arguments.

        Raises:
            ValueError: for an unknown argument, or weights that do not fit.
        """
        model = cls(**translate_config(config, cls._official_arguments))
        load_translated(model, state_dict, cls._official_prefixes)
        return model

    @classmethod
    def infer_official(cls, state_dict: Mapping[str, Tensor], given: Mapping[str, Any]) -> dict[str, Any]:
        """The official constructor's arguments, read off the weights where ``given`` is silent."""
        return infer_config(state_dict, given, cls.SIZES)

    @classmethod
    def is_official(cls, state_dict: Mapping[str, Tensor]) -> bool:
        """Whether every embedder of the official network is among the weights."""
        return all(any(name.startswith(prefix) for name in state_dict) for prefix in cls._official_prefixes)

    def _add_trunk(self) -> None:
        """The modules that every backbone of this family has, from its registered config."""
        c = self.config
        for name in ("in_channels", "hidden_size", "depth", "num_heads", "patch_size"):
            if c[name] < 1:
                raise ValueError(f"{name} must be at least 1, got {c[name]}")
        if c.num_classes < 0:
            raise ValueError(f"num_classes must be 0 (unconditional) or more, got {c.num_classes}")
        if c.hidden_size % (4 * c.num_heads):
            raise ValueError(
                f"hidden_size must be a multiple of 4 * num_heads = {4 * c.num_heads} (rotary positions rotate pairs "
                f"on two axes), got {c.hidden_size}"
            )
        self.time_embedder = TimestepEmbedding(
            c.hidden_size, scale=c.time_scale, origin=c.time_origin, max_period=c.time_max_period
        )
        self.label_embedder = LabelEmbedding(c.num_classes, c.hidden_size) if c.num_classes else None
        if not c.num_classes:
            self.accepts = frozenset()
        self.blocks = nn.ModuleList(
            Block(c.hidden_size, c.num_heads, scale_in_float32=self._scale_in_float32) for _ in range(c.depth)
        )
        self.final_layer = FinalLayer(c.hidden_size, c.in_channels * c.patch_size**2)
        self.gradient_checkpointing = False

    def reset_parameters(self) -> None:
        """Draws all parameters anew, as after construction; for models that were built on the meta device."""
        # A parent comes before its children in modules(), and its rule has the last word.
        for module in reversed([m for m in self.modules() if m is not self]):
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()

    @property
    def parts(self) -> dict[str, range]:
        """Block indices of each residual stream."""
        return {"trunk": range(len(self.blocks))}

    def sites(self) -> dict[str, Site]:
        """Every place that can be tapped, cached, pruned, quantized or adapted, by module path."""
        found: dict[str, Site] = {}
        for part, indices in self.parts.items():
            for i in indices:
                found[f"blocks.{i}"] = Site("block", part, i)
                found[f"blocks.{i}.attn"] = Site("attention", part, i)
                found[f"blocks.{i}.mlp"] = Site("mlp", part, i)
        return {**found, "final_layer": Site("head", list(self.parts)[-1], 0)}

    def site_flops(self, num_tokens: int) -> dict[str, int]:
        """Floating point operations behind each site for one sample, multiply and add counted as two.

        Of matrix products and attention, for N tokens of width d and a SwiGLU of width f: attention makes
        ``8 N d^2 + 4 N^2 d``, the MLP ``6 N d f``, a block both and its modulation of ``12 d^2`` per modulated vector:
        1, or N where each token has its own.
        """
        n, width = num_tokens, self.config.hidden_size
        attention = 8 * n * width**2 + 4 * n**2 * width
        mlp = 6 * n * width * int(8 * width / 3)
        found: dict[str, int] = {}
        for name, site in self.sites().items():
            vectors = n if site.part in self.modulated_per_token else 1
            block = attention + mlp + 12 * vectors * width**2
            final = 4 * vectors * width**2 + self._patch_flops(n)
            costs = {"attention": attention, "mlp": mlp, "block": block, "head": final}
            found[name] = costs.get(site.kind, 0)
        return found

    def flops(self, sample_shape: tuple[int, ...]) -> int:
        """Floating point operations of one forward pass over one sample (C, H, W); see :meth:`site_flops`."""
        num_tokens = math.prod(sample_shape[1:]) // self.config.patch_size**2
        sites, width = self.site_flops(num_tokens), self.config.hidden_size
        trunk = sum(sites[name] for name, site in self.sites().items() if site.kind in ("block", "head"))
        time_mlp = 2 * width * (self.time_embedder.frequency_dim + width)
        return trunk + len(self.parts) * self._patch_flops(num_tokens) + time_mlp

    def _patch_flops(self, num_tokens: int) -> int:
        """Of the projection of the tokens to patches, or back."""
        return 2 * num_tokens * self.config.hidden_size * self.config.in_channels * self.config.patch_size**2

    def null(self, condition: Condition, keys: Iterable[str] | None = None) -> Condition:
        """``condition`` with the named entries (all by default) replaced by what the model has learned as nothing."""
        chosen = self.accepts if keys is None else frozenset(keys)
        if unknown := chosen - self.accepts:
            raise ValueError(f"keys: {sorted(unknown)} have no null here; {self._accepted()}")
        self.check_condition(condition)
        if condition.labels is None or "labels" not in chosen:
            return condition
        return replace(condition, labels=torch.full_like(condition.labels, self.config.num_classes))

    def check_condition(self, condition: Condition) -> None:
        """Raises ValueError for missing or unknown entries of ``condition``."""
        given = condition.keys()
        if missing := self.accepts - given:
            raise ValueError(f"condition lacks {sorted(missing)}; {self._accepted()}")
        if unknown := given - self.accepts:
            raise ValueError(f"condition has {sorted(unknown)}, which this model ignores; {self._accepted()}")

    def _accepted(self) -> str:
        return f"this {type(self).__name__} accepts {sorted(self.accepts) or 'no condition'}"

    def _check_sample(self, x: Tensor) -> None:
        channels, p = self.config.in_channels, self.config.patch_size
        if x.ndim != 4 or x.shape[1] != channels:
            raise ValueError(f"x must be (B, {channels}, H, W), got {tuple(x.shape)}")
        height, width = x.shape[2:]
        if height % p or width % p:
            near_height, near_width = (max(1, round(size / p)) * p for size in (height, width))
            raise ValueError(
                f"x of size {height} x {width} does not divide into patches of {p} x {p}; "
                f"the nearest valid size is {near_height} x {near_width}"
            )

    def _check_features(self, features: Iterable[str], part: str | None = None) -> None:
        known = [f"blocks.{i}" for name, indices in self.parts.items() if part in (None, name) for i in indices]
        for name in features:
            if name not in known:
                raise ValueError(f"features: unknown site {name!r}{did_you_mean(name, known)}")

    def _embed_condition(self, x: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        """The time embedding and ``silu(time + label)``, both (B, M, D)."""
        self.check_condition(condition)
        batch = len(x)
        tokens = x.shape[2] * x.shape[3] // self.config.patch_size**2
        if t.shape not in ((batch,), (batch, tokens)):
            raise ValueError(f"t must be ({batch},) or ({batch}, {tokens}), got {tuple(t.shape)}")
        time = self.time_embedder(t)
        if self.label_embedder is None or condition.labels is None:
            return time, F.silu(time)
        if condition.labels.shape != (batch,):
            raise ValueError(f"condition.labels must be ({batch},), got {tuple(condition.labels.shape)}")
        return time, F.silu(time + self.label_embedder(condition.labels))

    def _context(self, x: Tensor, attention_mask: Tensor | None = None) -> Context:
        """What the blocks are told of the grid of ``x``."""
        height, width = (size // self.config.patch_size for size in x.shape[2:])
        positions = image_positions(height, width, device=x.device)
        rope = rope_tables(positions, self.config.hidden_size // self.config.num_heads)
        return Context(rope, mask_of_samples(attention_mask, len(x), self.config.num_heads, height * width))

    def _run(
        self,
        part: str,
        x: Tensor,
        condition: Tensor,
        contexts: Sequence[Context],
        features: Collection[str],
        modulations: Sequence[Tensor | None] = (),
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Tokens after the blocks of ``part``, and the outputs of those named in ``features``."""
        taps: dict[str, Tensor] = {}
        for position, i in enumerate(self.parts[part]):
            given = modulations[position] if modulations else None
            arguments = (x, condition, contexts[position], given)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(self.blocks[i], *arguments)
            else:
                x = self.blocks[i](*arguments)
            if f"blocks.{i}" in features:
                taps[f"blocks.{i}"] = x
        return x, taps


def mask_of_samples(mask: Tensor | None, batch: int, heads: int, tokens: int) -> Tensor | None:
    """A mask (N, N), (B, N, N) or (1 or B, 1 or H, N, N) as attention takes it, in four dimensions.

    Always four: a square mask of as many rows as there are samples would pass for a padding mask.

    Raises:
        ValueError: for another shape or dtype.
    """
    if mask is None:
        return None
    n = tokens
    full = mask.ndim == 4 and mask.shape[0] in (1, batch) and mask.shape[1] in (1, heads) and mask.shape[2:] == (n, n)
    if mask.dtype != torch.bool or not (full or mask.shape in ((n, n), (batch, n, n))):
        raise ValueError(
            f"attention_mask must be bool of shape ({n}, {n}), ({batch}, {n}, {n}) or ({batch}, {heads}, {n}, {n}), "
            f"True = attend, got {mask.dtype} {tuple(mask.shape)}"
        )
    return mask if full else mask.reshape(-1, 1, n, n)
