"""The transformer block that DDT's encoder, DDT's decoder and the improved DiT share (arXiv 2504.05741, section 4).

RMSNorm, attention with normalised queries and keys and rotary positions, SwiGLU, and adaptive modulation without an
activation of its own: the SiLU is applied once to the condition.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn

from untwine.models.layers.basic import Linear, RMSNorm
from untwine.models.layers.rope import Rope, rotate


@dataclass(frozen=True)
class Context:
    """What every block of a forward is given beside its tokens and its condition."""

    rope: Rope
    mask: Tensor | None = None
    """(B or 1, 1, N, N) bool, True = attend"""


class AttentionProcessor:
    """Self-attention through the backend that diffusers has been told to use."""

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn: Attention, x: Tensor, context: Context) -> Tensor:
        query, key, value = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).unbind(2)  # each (B, N, H, head_dim)
        query = rotate(attn.q_norm(query), context.rope)
        key = rotate(attn.k_norm(key), context.rope)
        if self._attention_backend is None and self._parallel_config is None and _is_faster_as_products(query):
            return attn.proj(_attention_as_products(query, key, value, context.mask).flatten(2))
        out = dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=context.mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )
        return attn.proj(out.flatten(2))


def _is_faster_as_products(query: Tensor) -> bool:
    """On a CPU the fused kernel is no faster in bfloat16 than in float32; compiled matrix products are.

    They keep (N, N) weights a head, so only up to 512 tokens.
    """
    short = query.device.type == "cpu" and query.dtype == torch.bfloat16 and query.shape[1] <= 512
    return short and torch.compiler.is_compiling()


def _attention_as_products(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax attention of (B, N, H, head_dim) with the softmax in float32."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    scores = (query * query.shape[-1] ** -0.5 @ key.transpose(-1, -2)).float()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1).to(value.dtype) @ value).transpose(1, 2)


class Attention(nn.Module, AttentionModuleMixin):
    """Multi-head self-attention: no bias on q, k, v; RMSNorm on each head's q and k; rotary positions."""

    _default_processor_cls = AttentionProcessor
    _available_processors = [AttentionProcessor]  # noqa: RUF012 - the name and type are diffusers'
    _supports_qkv_fusion = False

    def __init__(self, hidden_size: int, num_heads: int, *, scale_in_float32: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(hidden_size, 3 * hidden_size, bias=False)
        self.q_norm = RMSNorm(hidden_size // num_heads, scale_in_float32=scale_in_float32)
        self.k_norm = RMSNorm(hidden_size // num_heads, scale_in_float32=scale_in_float32)
        self.proj = Linear(hidden_size, hidden_size)
        self.processor = AttentionProcessor()

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        return self.processor(self, x, context)


class SwiGLU(nn.Module):
    """``w2(silu(w1 x) * w3 x)`` with a hidden width of two thirds of 4 D, no biases."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        width = int(2 * (4 * hidden_size) / 3)
        self.w1 = Linear(hidden_size, width, bias=False)
        self.w2 = Linear(width, hidden_size, bias=False)
        self.w3 = Linear(hidden_size, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """Attention and SwiGLU, each modulated before and gated after.

    Args:
        hidden_size: width D.
        num_heads: attention heads, a divisor of D.
        scale_in_float32: order of rounding in the norms, see :class:`~untwine.models.layers.basic.RMSNorm`.
    """

    fsdp_methods = ("modulation",)
    """methods beside ``forward`` that need the parameters gathered; ``forward`` calls none of them"""

    def __init__(self, hidden_size: int, num_heads: int, *, scale_in_float32: bool = False) -> None:
        super().__init__()
        self.norm1 = RMSNorm(hidden_size, scale_in_float32=scale_in_float32)
        self.attn = Attention(hidden_size, num_heads, scale_in_float32=scale_in_float32)
        self.norm2 = RMSNorm(hidden_size, scale_in_float32=scale_in_float32)
        self.mlp = SwiGLU(hidden_size)
        self.adaln = Linear(hidden_size, 6 * hidden_size)

    def modulation(self, condition: Tensor) -> Tensor:
        """(B, M, D) -> (B, M, 6D), for a caller that applies it several times."""
        return self.adaln(condition)

    def forward(
        self, hidden_states: Tensor, condition: Tensor, context: Context, modulation: Tensor | None = None
    ) -> Tensor:
        """(B, N, D) -> (B, N, D).

        Args:
            hidden_states: tokens (B, N, D); the name is the one that diffusers' cache hooks look for.
            condition: (B, M, D) with M = 1 or N; unused when ``modulation`` is given.
            context: rotary tables and mask.
            modulation: (B, M, 6D) from :meth:`modulation`.
        """
        x = hidden_states
        given = self.adaln(condition) if modulation is None else modulation
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = given.chunk(6, -1)
        x = x + gate_a * self.attn(self.norm1(x) * (1 + scale_a) + shift_a, context)
        return x + gate_m * self.mlp(self.norm2(x) * (1 + scale_m) + shift_m)


class FinalLayer(nn.Module):
    """Modulated layer norm and the projection to patches."""

    def __init__(self, hidden_size: int, out_features: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        self.adaln = Linear(hidden_size, 2 * hidden_size)
        self.linear = Linear(hidden_size, out_features)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """All zero: a new model predicts zero."""
        for layer in (self.adaln, self.linear):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def modulation(self, condition: Tensor) -> Tensor:
        """(B, M, D) -> (B, M, 2D)."""
        return self.adaln(condition)

    def forward(self, x: Tensor, condition: Tensor, modulation: Tensor | None = None) -> Tensor:
        """(B, N, D) -> (B, N, out_features)."""
        shift, scale = (self.adaln(condition) if modulation is None else modulation).chunk(2, -1)
        return self.linear(self.norm(x) * (1 + scale) + shift)


TransformerBlockRegistry.register(Block, TransformerBlockMetadata(return_hidden_states_index=0))
