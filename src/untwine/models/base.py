"""What the image transformers over :class:`~untwine.models.layers.block.Block` share."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Self, get_args

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from untwine.contracts import Condition, Output, PredictionKind, Site
from untwine.models.layers.block import Block, Context, FinalLayer, Style
from untwine.models.layers.embeddings import LabelEmbedding, PatchEmbedding, TimestepEmbedding, unpatchify
from untwine.models.layers.official import Dialect, load_translated
from untwine.models.layers.rope import Rope, image_positions, rope_tables
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
    SIZES: ClassVar[Mapping[str, Mapping[str, int]]]
    dialects: ClassVar[tuple[Dialect, ...]] = ()
    """the official code bases whose weights load"""
    _width_divisor = 4
    """of a head's width: rotary positions rotate pairs on two axes"""

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
    def from_official(
        cls, state_dict: Mapping[str, Tensor], config: Mapping[str, Any], *, system: str | None = None
    ) -> Self:
        """The model of the official weights.

        Args:
            state_dict: official names.
            config: the official constructor's arguments.
            system: whose; None tells by the names.

        Raises:
            ValueError: for an unknown argument, or weights that do not fit.
        """
        dialect = cls.dialect_of(state_dict, system)
        model = cls(**dialect.config(config, state_dict))
        load_translated(model, state_dict, dialect)
        return model

    @classmethod
    def infer_official(
        cls, state_dict: Mapping[str, Tensor], given: Mapping[str, Any], *, system: str | None = None
    ) -> dict[str, Any]:
        """The official constructor's arguments, read off the weights where ``given`` is silent."""
        return cls.dialect_of(state_dict, system).infer(state_dict, given, cls.SIZES)

    @classmethod
    def is_official(cls, state_dict: Mapping[str, Tensor], system: str | None = None) -> bool:
        """Whether these are official weights of this network (of one system), by the names that only it has."""
        return any(d.is_of(state_dict) for d in cls.dialects if system in (None, d.system))

    @classmethod
    def dialect_of(cls, state_dict: Mapping[str, Tensor], system: str | None = None) -> Dialect:
        """The code base that official weights come from; the first that is known where none fits.

        Raises:
            ValueError: if ``system`` (or any) has no official weights of this network.
        """
        known = [dialect for dialect in cls.dialects if system in (None, dialect.system)]
        if not known:
            raise ValueError(f"{cls.__name__} has no official weights" + (f" of {system}" if system else ""))
        return next((dialect for dialect in known if dialect.is_of(state_dict)), known[0])

    def _add_trunk(self) -> None:
        """The modules that every backbone of this family has, from its registered config."""
        c = self.config
        for name in ("in_channels", "hidden_size", "depth", "num_heads", "patch_size"):
            if c[name] < 1:
                raise ValueError(f"{name} must be at least 1, got {c[name]}")
        if c.num_classes < 0:
            raise ValueError(f"num_classes must be 0 (unconditional) or more, got {c.num_classes}")
        self._check_width("hidden_size", c.hidden_size, "num_heads", c.num_heads)
        self.predicts = c.get("predicts", self.predicts)
        if self.predicts not in get_args(PredictionKind):
            raise ValueError(f"predicts must be one of {get_args(PredictionKind)}, got {self.predicts!r}")
        self.time_embedder = self._time_embedder()
        self.label_embedder = LabelEmbedding(c.num_classes, c.hidden_size) if c.num_classes else None
        if not c.num_classes:
            self.accepts = frozenset()
        self.blocks = nn.ModuleList(self._block(i) for i in range(c.depth))
        self.final_layer = self._final_layer(self.blocks[-1].hidden_size)  # type: ignore[arg-type]
        self.gradient_checkpointing = False

    def _check_width(self, name: str, width: int, heads_name: str, heads: int) -> None:
        divisor = self._width_divisor * heads
        if width % divisor or width % 4:
            raise ValueError(
                f"{name} must be a multiple of {self._width_divisor} * {heads_name} = {divisor} and of 4 (positions "
                f"take pairs on two axes), got {width}"
            )

    def _time_embedder(self) -> TimestepEmbedding:
        c = self.config
        return TimestepEmbedding(c.hidden_size, scale=c.time_scale, origin=c.time_origin, max_period=c.time_max_period)

    def _block(self, index: int) -> Block:
        return Block(self.config.hidden_size, self.config.num_heads, Style())

    def _final_layer(self, hidden_size: int) -> FinalLayer:
        return FinalLayer(hidden_size, self.num_outputs * self.config.patch_size**2)

    @property
    def num_outputs(self) -> int:
        """Channels that the network predicts."""
        return self.config.in_channels

    def reset_parameters(self) -> None:
        """Draws all parameters anew, as after construction; for models that were built on the meta device."""
        # A parent comes before its children in modules(), and its rule has the last word.
        for module in reversed([m for m in self.modules() if m is not self]):
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()
        self._initialise()

    def _initialise(self) -> None:
        """What a network draws otherwise than its layers do, called last."""

    def _zero_modulations(self) -> None:
        """Every block starts as the identity."""
        for block in self.blocks:
            if block.adaln is not None:
                nn.init.zeros_(block.adaln.weight)  # type: ignore[union-attr,arg-type]
                nn.init.zeros_(block.adaln.bias)  # type: ignore[union-attr,arg-type]

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

        Of matrix products and attention, for N tokens: see :meth:`~untwine.models.layers.block.Block.flops`, under one
        modulated vector, or N where each token has its own.
        """
        return {
            name: self.flops_at(name, self._num_tokens(site.part, num_tokens)) for name, site in self.sites().items()
        }

    def flops_at(self, name: str, num_tokens: int) -> int:
        """Those behind one site, for the length N of the sequence that it is given."""
        site = self.sites()[name]
        vectors = num_tokens if site.part in self.modulated_per_token else 1
        if site.kind == "head":
            return self.final_layer.flops(num_tokens, vectors)
        if site.kind == "encoder":
            return self._state_flops(num_tokens)
        block: Any = self.blocks[site.index]
        return block.flops(num_tokens, vectors)[site.kind]

    def flops(self, sample_shape: tuple[int, ...]) -> int:
        """Floating point operations of one forward pass over one sample (C, H, W); see :meth:`site_flops`."""
        num_tokens = math.prod(sample_shape[1:]) // self.config.patch_size**2
        sites = self.site_flops(num_tokens)
        trunk = sum(sites[name] for name, site in self.sites().items() if site.kind in ("block", "head", "encoder"))
        width, patch = self.config.hidden_size, self.config.in_channels * self.config.patch_size**2
        embedders = sum(2 * num_tokens * patch * self._part_width(part) for part in self.parts)
        return trunk + embedders + 2 * width * (self.time_embedder.frequency_dim + width)

    def _state_flops(self, num_tokens: int) -> int:
        """Of what stands between encoder and decoder."""
        return 0

    def _part_width(self, part: str) -> int:
        block: Any = self.blocks[self.parts[part].start]
        return block.hidden_size

    def _num_tokens(self, part: str, num_tokens: int) -> int:
        """Length of a part's sequence for a sample of ``num_tokens`` patches."""
        return num_tokens

    def null(self, condition: Condition, keys: Iterable[str] | None = None) -> Condition:
        """``condition`` with the named entries (all by default) replaced by what the model has learned as nothing."""
        chosen = self.accepts if keys is None else frozenset(keys)
        if unknown := chosen - self.accepts:
            raise ValueError(f"keys: {sorted(unknown)} have no null here; {self._accepted()}")
        self.check_condition(condition, chosen)
        if condition.labels is None or "labels" not in chosen:
            return condition
        return replace(condition, labels=torch.full_like(condition.labels, self.config.num_classes))

    def check_condition(self, condition: Condition, required: frozenset[str] | None = None) -> None:
        """Raises ValueError for missing (of ``required``, all by default) or unknown entries of ``condition``."""
        given = condition.keys()
        if missing := (self.accepts if required is None else required) - given:
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
        rows, columns = height // p, width // p
        if self.square_only and (rows != columns or rows * columns != self.max_tokens):
            side = math.isqrt(self.max_tokens or 0) * p
            raise ValueError(
                f"x must be {side} x {side}, the grid of this model's stored position table, got {height} x {width}"
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
        time = self._embed_time(t)
        if self.label_embedder is None or condition.labels is None:
            return time, F.silu(time)
        if condition.labels.shape != (batch,):
            raise ValueError(f"condition.labels must be ({batch},), got {tuple(condition.labels.shape)}")
        return time, F.silu(time + self.label_embedder(condition.labels))

    def _embed_time(self, t: Tensor) -> Tensor:
        return self.time_embedder(t)

    def _context(self, x: Tensor, attention_mask: Tensor | None = None, part: str | None = None) -> Context:
        """What the blocks of ``part`` are told of the grid of ``x``."""
        height, width = self._grid(x)
        block: Any = self.blocks[self.parts[part].start if part else 0]
        rope = self._rope(height, width, block.hidden_size // block.num_heads, x.device)
        return Context(rope, mask_of_samples(attention_mask, len(x), block.num_heads, height * width))

    def _grid(self, x: Tensor) -> tuple[int, int]:
        """Rows and columns of patches."""
        return x.shape[2] // self.config.patch_size, x.shape[3] // self.config.patch_size

    def _rope(self, height: int, width: int, head_dim: int, device: torch.device) -> Rope | None:
        return rope_tables(image_positions(height, width, device=device), head_dim)

    def _output(self, x: Tensor, patches: Tensor, features: dict[str, Tensor]) -> Output:
        """The patches (B, N, C p p) as what the backbone returns."""
        sample = unpatchify(patches, self.config.patch_size, (x.shape[2], x.shape[3])).to(x.dtype)
        return Output(sample, features)

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


class SingleStream(Backbone):
    """A backbone of one residual stream: every block sees time and condition."""

    embedder: PatchEmbedding

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        condition: Condition,
        *,
        attention_mask: Tensor | Sequence[Tensor | None] | None = None,
        features: Collection[str] = (),
    ) -> Output:
        """The prediction for ``x`` at time t.

        Args:
            x: (B, C, H, W), H and W divisible by the patch size.
            t: (B,) in [0, 1], 0 = data, or (B, N) per token.
            condition: labels (B,), or nothing when the model has no classes.
            attention_mask: (N, N), (B, N, N) or (B, H, N, N) bool, True = attend, for all blocks; or one a block,
                where None or a missing entry masks nothing.
            features: sites (``blocks.i``) to return.
        """
        self._check_sample(x)
        self._check_features(features)
        time, embedded = self._embed_condition(x, t, condition)
        contexts = self._contexts(x, attention_mask)
        tokens, contexts = self._sequence(x, t, time, condition, contexts)
        tokens, taps = self._run("trunk", tokens, embedded, contexts, features)
        return self._output(x, self.final_layer(tokens[:, : math.prod(self._grid(x))], embedded), taps)

    def _sequence(
        self, x: Tensor, t: Tensor, time: Tensor, condition: Condition, contexts: list[Context]
    ) -> tuple[Tensor, list[Context]]:
        """The tokens that enter the first block, those of the image first, and what the blocks are told of them."""
        return self.embedder(x), contexts

    def _contexts(self, x: Tensor, masks: Tensor | Sequence[Tensor | None] | None) -> list[Context]:
        depth = self.config.depth
        if masks is None or isinstance(masks, Tensor):
            return [self._context(x, masks)] * depth
        if len(masks) > depth:
            raise ValueError(f"attention_mask has {len(masks)} entries for {depth} blocks; give at most one a block")
        shared, tokens, heads = self._context(x), math.prod(self._grid(x)), self.config.num_heads
        padded = (*masks, *[None] * (depth - len(masks)))
        return [replace(shared, mask=mask_of_samples(mask, len(x), heads, tokens)) for mask in padded]


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
