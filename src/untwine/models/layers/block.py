"""The transformer block that all backbones share: attention, then an MLP, each modulated before and gated after.

What differs between the published ones is a :class:`Style`: DDT (arXiv 2504.05741) has RMSNorm, normalised queries and
keys, rotary positions and SwiGLU; DiT (arXiv 2212.09748) LayerNorm without a weight and a GELU; the encoder of an
in-context backbone is not modulated at all. The condition arrives with its SiLU applied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn

from untwine.models.layers.basic import Linear, RMSNorm
from untwine.models.layers.rope import Rope, rotate

Norm = Literal["rms", "layer"]


@dataclass(frozen=True)
class Style:
    """What a family of blocks is made of."""

    norm: Norm = "rms"
    """before attention and MLP; "layer" has no weight"""
    qk_norm: Literal["rms", "layer", "none"] = "rms"
    """of each head's queries and keys; "layer" has weight and bias"""
    mlp: Literal["swiglu", "gelu"] = "swiglu"
    bias: bool = False
    """of queries, keys, values and SwiGLU"""
    modulated: bool = True
    scale_in_float32: bool = False
    """order of rounding in the norms, see :class:`~untwine.models.layers.basic.RMSNorm`"""

    def make_norm(self, hidden_size: int) -> nn.Module:
        """The norm in front of attention, MLP or the projection to patches."""
        if self.norm == "layer":
            return nn.LayerNorm(hidden_size, eps=1e-6, elementwise_affine=False)
        return RMSNorm(hidden_size, scale_in_float32=self.scale_in_float32)

    def make_qk_norm(self, head_dim: int) -> nn.Module:
        """The norm of queries or keys."""
        if self.qk_norm == "none":
            return nn.Identity()
        return (
            nn.LayerNorm(head_dim)
            if self.qk_norm == "layer"
            else RMSNorm(head_dim, scale_in_float32=self.scale_in_float32)
        )


@dataclass(frozen=True)
class Context:
    """What every block of a forward is given beside its tokens and its condition."""

    rope: Rope | None = None
    """None: attention is told no positions"""
    mask: Tensor | None = None
    """(B or 1, 1 or H, N, N) bool, True = attend"""


class AttentionProcessor:
    """Self-attention through the backend that diffusers has been told to use."""

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn: Attention, x: Tensor, context: Context) -> Tensor:
        query, key, value = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).unbind(2)  # each (B, N, H, head_dim)
        query, key = attn.q_norm(query), attn.k_norm(key)
        if context.rope is not None:
            query, key = rotate(query, context.rope), rotate(key, context.rope)
        query, key = query.to(value.dtype), key.to(value.dtype)
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
    """Multi-head self-attention; norms of queries and keys, and rotary positions, where the style and context say."""

    _default_processor_cls = AttentionProcessor
    _available_processors = [AttentionProcessor]  # noqa: RUF012 - the name and type are diffusers'
    _supports_qkv_fusion = False

    def __init__(self, hidden_size: int, num_heads: int, style: Style) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(hidden_size, 3 * hidden_size, bias=style.bias)
        self.q_norm = style.make_qk_norm(hidden_size // num_heads)
        self.k_norm = style.make_qk_norm(hidden_size // num_heads)
        self.proj = Linear(hidden_size, hidden_size)
        self.processor = AttentionProcessor()

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        return self.processor(self, x, context)


class SwiGLU(nn.Module):
    """``w2(silu(w1 x) * w3 x)`` with a hidden width of two thirds of 4 D."""

    def __init__(self, hidden_size: int, *, bias: bool = False) -> None:
        super().__init__()
        width = int(2 * (4 * hidden_size) / 3)
        self.w1 = Linear(hidden_size, width, bias=bias)
        self.w2 = Linear(width, hidden_size, bias=bias)
        self.w3 = Linear(hidden_size, width, bias=bias)
        self.flops_per_token = 6 * hidden_size * width

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class MLP(nn.Module):
    """``fc2(gelu(fc1 x))`` of hidden width 4 D, the GELU in its tanh approximation."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.fc1 = Linear(hidden_size, 4 * hidden_size)
        self.fc2 = Linear(4 * hidden_size, hidden_size)
        self.flops_per_token = 16 * hidden_size**2

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """Attention and MLP, each modulated before and gated after, or neither in a style without modulation.

    Args:
        hidden_size: width D.
        num_heads: attention heads, a divisor of D.
        style: what it is made of.
    """

    fsdp_methods = ("modulation",)
    """methods beside ``forward`` that need the parameters gathered; ``forward`` calls none of them"""

    def __init__(self, hidden_size: int, num_heads: int, style: Style) -> None:
        super().__init__()
        self.hidden_size, self.num_heads = hidden_size, num_heads
        self.norm1 = style.make_norm(hidden_size)
        self.attn = Attention(hidden_size, num_heads, style)
        self.norm2 = style.make_norm(hidden_size)
        self.mlp = SwiGLU(hidden_size, bias=style.bias) if style.mlp == "swiglu" else MLP(hidden_size)
        self.adaln = Linear(hidden_size, 6 * hidden_size) if style.modulated else None

    def modulation(self, condition: Tensor) -> Tensor:
        """(B, M, D) -> (B, M, 6D), for a caller that applies it several times; the condition where none is made."""
        return condition if self.adaln is None else self.adaln(condition)

    def flops(self, num_tokens: int, num_vectors: int) -> dict[str, int]:
        """Of matrix products and attention by kind of site, for N tokens under a condition of M vectors.

        Attention makes ``8 N D^2 + 4 N^2 D``; the block adds its modulation of ``12 M D^2`` to attention and MLP.
        """
        n, width = num_tokens, self.hidden_size
        attention, mlp = 8 * n * width**2 + 4 * n**2 * width, n * self.mlp.flops_per_token
        modulation = 0 if self.adaln is None else 12 * num_vectors * width**2
        return {"attention": attention, "mlp": mlp, "block": attention + mlp + modulation}

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
        if self.adaln is None:
            x = x + self.attn(self.norm1(x), context)
            return x + self.mlp(self.norm2(x))
        given = self.adaln(condition) if modulation is None else modulation
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = given.chunk(6, -1)
        x = x + gate_a * self.attn(self.norm1(x) * (1 + scale_a) + shift_a, context)
        return x + gate_m * self.mlp(self.norm2(x) * (1 + scale_m) + shift_m)


class FinalLayer(nn.Module):
    """Norm, modulation where the style has it, and the projection to patches."""

    def __init__(self, hidden_size: int, out_features: int, style: Style = Style(norm="layer")) -> None:
        super().__init__()
        self.norm = style.make_norm(hidden_size)
        self.adaln = Linear(hidden_size, 2 * hidden_size) if style.modulated else None
        self.linear = Linear(hidden_size, out_features)
        self.hidden_size, self.out_features = hidden_size, out_features
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """All zero: a new model predicts zero."""
        for layer in (self.adaln, self.linear):
            if layer is not None:
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)

    def modulation(self, condition: Tensor) -> Tensor:
        """(B, M, D) -> (B, M, 2D); the condition where none is made."""
        return condition if self.adaln is None else self.adaln(condition)

    def flops(self, num_tokens: int, num_vectors: int) -> int:
        """For N tokens under a condition of M vectors: ``2 N D out_features + 4 M D^2``."""
        modulation = 0 if self.adaln is None else 4 * num_vectors * self.hidden_size**2
        return 2 * num_tokens * self.hidden_size * self.out_features + modulation

    def modulated(self, x: Tensor, condition: Tensor, modulation: Tensor | None = None) -> Tensor:
        """(B, N, D) -> (B, N, D): what the projection reads."""
        x = self.norm(x)
        if self.adaln is None:
            return x
        shift, scale = (self.adaln(condition) if modulation is None else modulation).chunk(2, -1)
        return x * (1 + scale) + shift

    def forward(self, x: Tensor, condition: Tensor, modulation: Tensor | None = None) -> Tensor:
        """(B, N, D) -> (B, N, out_features)."""
        return self.linear(self.modulated(x, condition, modulation))


TransformerBlockRegistry.register(Block, TransformerBlockMetadata(return_hidden_states_index=0))
