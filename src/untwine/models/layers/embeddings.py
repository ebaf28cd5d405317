"""Patches, time and labels as tokens."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from untwine.contracts import Condition
from untwine.models.layers.basic import Linear, RMSNorm


def patchify(x: Tensor, patch_size: int) -> Tensor:
    """(B, C, H, W) -> (B, N, C * p * p) in the order of ``F.unfold``: channel, patch row, patch column."""
    batch, channels, height, width = x.shape
    p = patch_size
    x = x.reshape(batch, channels, height // p, p, width // p, p)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(batch, (height // p) * (width // p), channels * p * p)


def unpatchify(tokens: Tensor, patch_size: int, size: tuple[int, int]) -> Tensor:
    """The inverse of :func:`patchify` for samples of ``size`` (H, W)."""
    rows, columns, p = size[0] // patch_size, size[1] // patch_size, patch_size
    x = tokens.reshape(tokens.shape[0], rows, columns, -1, p, p)
    return x.permute(0, 3, 1, 4, 2, 5).reshape(tokens.shape[0], -1, *size)


class PatchEmbedding(nn.Module):
    """Non-overlapping patches projected to the model width."""

    def __init__(self, in_channels: int, hidden_size: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = Linear(in_channels * patch_size**2, hidden_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform weight, bias 0."""
        nn.init.xavier_uniform_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, N, D)."""
        return self.proj(patchify(x, self.patch_size))


def sinusoid(t: Tensor, dim: int, *, max_period: float) -> Tensor:
    """(...,) -> (..., dim) float32: ``dim // 2`` cosines, as many sines, and a zero when ``dim`` is odd.

    The frequencies fall geometrically from 1 to ``1 / max_period`` (exclusive).
    """
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t.float()[..., None] * torch.exp(-math.log(max_period) * steps / half)
    return nn.functional.pad(torch.cat((angles.cos(), angles.sin()), -1), (0, dim % 2))


class TimestepEmbedding(nn.Module):
    """MLP over the sinusoid of ``time_scale * (t - time_origin)``.

    The argument and the sinusoid are a float32 island. With origin 1 the argument is minus the time of a model trained
    with data at t = 1: the cosines agree, the sines change sign, and a converter negates their weights.
    """

    def __init__(
        self, hidden_size: int, *, scale: float, origin: float, max_period: float, frequency_dim: int = 256
    ) -> None:
        super().__init__()
        self.scale, self.origin, self.max_period, self.frequency_dim = scale, origin, max_period, frequency_dim
        self.mlp = nn.Sequential(Linear(frequency_dim, hidden_size), nn.SiLU(), Linear(hidden_size, hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal weights of deviation 0.02; the biases keep the default of a linear layer."""
        for layer in self.mlp:
            if isinstance(layer, Linear):
                nn.init.normal_(layer.weight, std=0.02)

    def forward(self, t: Tensor) -> Tensor:
        """(B,) -> (B, 1, D), or (B, N) -> (B, N, D): one time per sample or per token."""
        time = self.scale * (t.float() - self.origin)
        hidden = self.mlp(self.features(time))
        return hidden[:, None] if t.ndim == 1 else hidden

    def features(self, time: Tensor) -> Tensor:
        """(...,) -> (..., frequency_dim) float32."""
        return sinusoid(time, self.frequency_dim, max_period=self.max_period)


class FourierTimeEmbedding(TimestepEmbedding):
    """MLP over ``[sin, cos](2 pi w t)`` of 256 fixed normal frequencies w, which belong to the weights.

    The frequencies stay float32 whatever the model is cast to. A new model has the same ones as every other new model.
    """

    def __init__(self, hidden_size: int, *, scale: float, origin: float, num_frequencies: int = 256) -> None:
        frequency_dim = 2 * num_frequencies
        super().__init__(hidden_size, scale=scale, origin=origin, max_period=math.inf, frequency_dim=frequency_dim)
        self.frequencies: Tensor
        self.register_buffer("frequencies", torch.empty(num_frequencies))
        self._draw()

    def _draw(self) -> None:
        if not self.frequencies.is_meta:
            generator = torch.Generator("cpu").manual_seed(0)
            self.frequencies.copy_(torch.randn(len(self.frequencies), generator=generator, device="cpu"))

    def reset_parameters(self) -> None:
        """As every time embedding, and the frequencies."""
        super().reset_parameters()
        if hasattr(self, "frequencies"):
            self._draw()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FourierTimeEmbedding:
        kept = self.frequencies
        super()._apply(fn, recurse)
        if self.frequencies.dtype != kept.dtype:
            self.frequencies = kept.to(self.frequencies.device)
        return self

    def features(self, time: Tensor) -> Tensor:
        """(...,) -> (..., 2 * num_frequencies) float32."""
        angles = time[..., None] * self.frequencies * 2 * torch.pi
        return torch.cat((angles.sin(), angles.cos()), -1)


class LabelEmbedding(nn.Module):
    """A table of class vectors whose last row is the null class."""

    def __init__(self, num_classes: int, hidden_size: int) -> None:
        super().__init__()
        self.table = nn.Embedding(num_classes + 1, hidden_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal rows of deviation 0.02."""
        nn.init.normal_(self.table.weight, std=0.02)

    def forward(self, labels: Tensor) -> Tensor:
        """(B,) int64 -> (B, 1, D)."""
        return self.table(labels)[:, None]


def sincos_positions(height: int, width: int, dim: int, *, device: torch.device | None = None) -> Tensor:
    """(1, height * width, dim) float32 of row-major tokens: half of the width for the column, half for the row.

    Each half is ``dim / 4`` sines, then as many cosines, of frequencies that fall from 1 to 1 / 10000 (exclusive).
    """
    exact = torch.float32 if device is not None and device.type == "mps" else torch.float64
    quarter = dim // 4
    frequencies = 10000.0 ** (-torch.arange(quarter, dtype=exact, device=device) / quarter)
    angles = torch.arange(max(height, width), dtype=exact, device=device)[:, None] * frequencies
    axis = torch.cat((angles.sin(), angles.cos()), -1).float()  # (longest side, dim / 2)
    columns = axis[:width].expand(height, width, -1)
    rows = axis[:height, None].expand(height, width, -1)
    return torch.cat((columns, rows), -1).flatten(0, 1)[None]


class PositionEmbedding(nn.Module):
    """Adds :func:`sincos_positions`, on any grid; or a stored table, on the one square grid that it was made for.

    Args:
        hidden_size: width D, a multiple of 4.
        num_tokens: of the stored table; 0 for sines and cosines.
    """

    def __init__(self, hidden_size: int, num_tokens: int = 0) -> None:
        super().__init__()
        side = math.isqrt(num_tokens)
        self.table: Tensor | None
        self.register_buffer("table", sincos_positions(side, side, hidden_size) if num_tokens else None)

    def forward(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """(B, N, D) -> (B, N, D) of the same dtype, N = height * width."""
        if self.table is None:
            return tokens + sincos_positions(height, width, tokens.shape[-1], device=tokens.device).to(tokens.dtype)
        return tokens + self.table.to(tokens.dtype)


class LearnedTokens(nn.Module):
    """A vector as several tokens: ``vector + learned_i``."""

    def __init__(self, num_tokens: int, hidden_size: int) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.empty(num_tokens, hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal of variance ``1 / hidden_size``."""
        nn.init.normal_(self.tokens, std=self.tokens.shape[1] ** -0.5)

    def forward(self, vector: Tensor) -> Tensor:
        """(B, 1, D) -> (B, num_tokens, D)."""
        return vector + self.tokens.to(vector.dtype)


class TextProjection(nn.Module):
    """Token states of a text encoder, normalised and projected to the model width."""

    def __init__(self, text_dim: int, hidden_size: int) -> None:
        super().__init__()
        self.norm = RMSNorm(text_dim)
        self.proj = Linear(text_dim, hidden_size)

    def forward(self, values: Tensor) -> Tensor:
        """(B, L, text_dim) -> (B, L, D)."""
        return self.proj(self.norm(values))


class ConditionTokens(nn.Module):
    """Time and label or text as tokens that take part in attention, instead of modulating the blocks.

    Args:
        hidden_size: width D.
        num_time_tokens: a time.
        num_label_tokens: a label; 0 without labels.
        text_dim: width of the text's token states; 0 without text.
        second_time: whether a second time gets tokens of its own, after those of the first.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_time_tokens: int = 4,
        num_label_tokens: int = 8,
        text_dim: int = 0,
        second_time: bool = False,
    ) -> None:
        super().__init__()
        self.time = LearnedTokens(num_time_tokens, hidden_size)
        self.second_time = LearnedTokens(num_time_tokens, hidden_size) if second_time else None
        self.label = LearnedTokens(num_label_tokens, hidden_size) if num_label_tokens else None
        self.text = TextProjection(text_dim, hidden_size) if text_dim else None

    def forward(
        self, condition: Condition, time: Tensor, label: Tensor | None = None, second_time: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The tokens (B, L, D) and their mask (B, L), True = a real token, or None when all are.

        Args:
            condition: its ``tokens["text"]`` is read where the model takes text.
            time, label, second_time: embeddings (B, 1, D).
        """
        parts = [self.time(time)]
        if self.second_time is not None and second_time is not None:
            parts.append(self.second_time(second_time))
        if self.label is not None and label is not None:
            parts.append(self.label(label))
        if self.text is None:
            return torch.cat([part.to(time.dtype) for part in parts], 1), None
        text = condition.tokens["text"]
        mask = text.mask
        if mask is not None:
            mask = F.pad(mask.bool(), (sum(part.shape[1] for part in parts), 0), value=True)
        return torch.cat([part.to(time.dtype) for part in (*parts, self.text(text.values))], 1), mask
