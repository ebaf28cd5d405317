"""What untwine is timed against: a plain eager DDT and Euler sampler of our own, and peers' checkouts.

The plain network is written from the formulas of arXiv 2504.05741, in the official parameter layout and conventions
(t = 0 is noise), without any of untwine's layers. ``official_ddt(PATH)`` imports a checkout of the authors' code
(github.com/MCG-NJU/DDT) in place of it; nothing of that code is here.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        full = x.float()
        full = full * torch.rsqrt(full.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * full.to(x.dtype)


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_norm, self.k_norm = _Norm(width // heads), _Norm(width // heads)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, turn: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q, k = (_turned(n(part), turn) for n, part in ((self.q_norm, q), (self.k_norm, k)))
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, width))


def _turned(x: Tensor, turn: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)


def _turns(side: int, head_width: int) -> Tensor:
    """(side^2, head_width / 2) complex: x and y angles in turn."""
    frequencies = 10000 ** (-torch.arange(0, head_width, 4).float() / head_width)
    line = torch.linspace(0, 16, side)
    y, x = torch.meshgrid(line, line, indexing="ij")
    angles = torch.stack([x.flatten()[:, None] * frequencies, y.flatten()[:, None] * frequencies], -1).flatten(1)
    return torch.polar(torch.ones_like(angles), angles)


class _MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = int(8 * width / 3)
        self.w1, self.w3 = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.w2 = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = _Norm(width), _Norm(width)
        self.attn, self.mlp = _Attention(width, heads), _MLP(width)
        self.adaLN_modulation = nn.Sequential(nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor, turn: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, -1)
        x = x + gate_a * self.attn(self.norm1(x) * (1 + scale_a) + shift_a, turn)
        return x + gate_m * self.mlp(self.norm2(x) * (1 + scale_m) + shift_m)


class _Named(nn.Module):
    """A module under one more name, for the parameter layout."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


class PlainDDT(nn.Module):
    """``(x (B, C, H, W), t (B,), y (B,), s=None) -> (velocity towards data, state)``; the official conventions."""

    def __init__(self, *, in_channels: int, num_groups: int, hidden_size: int, num_blocks: int, **rest: Any) -> None:
        super().__init__()
        self.patch, self.split = rest["patch_size"], rest["num_encoder_blocks"]
        patches, width = in_channels * self.patch**2, hidden_size
        self.head_width = width // num_groups
        self.x_embedder, self.s_embedder = (_Named(proj=nn.Linear(patches, width)) for _ in range(2))
        self.t_embedder = _Named(mlp=nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width)))
        self.y_embedder = _Named(embedding_table=nn.Embedding(rest["num_classes"] + 1, width))
        self.blocks = nn.ModuleList(_Block(width, num_groups) for _ in range(num_blocks))
        modulation = nn.Sequential(nn.Linear(width, 2 * width))
        self.final_layer = _Named(linear=nn.Linear(width, patches), adaLN_modulation=modulation)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, s: Tensor | None = None) -> tuple[Tensor, Tensor]:
        size, p = x.shape[-2:], self.patch
        turn = _turns(size[0] // p, self.head_width)
        tokens = F.unfold(x, p, stride=p).transpose(1, 2)
        if s is None:
            frequencies = torch.exp(-math.log(10) * torch.arange(128) / 128)
            angles = t[:, None].float() * frequencies
            time = self.t_embedder.mlp(torch.cat([angles.cos(), angles.sin()], -1))[:, None]
            c = F.silu(time + self.y_embedder.embedding_table(y)[:, None])
            s = self.s_embedder.proj(tokens)
            for block in self.blocks[: self.split]:
                s = block(s, c, turn)
            s = F.silu(time + s)
        h = self.x_embedder.proj(tokens)
        for block in self.blocks[self.split :]:
            h = block(h, s, turn)
        shift, scale = self.final_layer.adaLN_modulation(s).chunk(2, -1)
        h = self.final_layer.linear(F.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale) + shift)
        return F.fold(h.transpose(1, 2), tuple(size), p, stride=p), s


def plain_sampler(num_steps: int, scale: float, interval: tuple[float, float], refresh_every: int) -> Callable:
    """Euler from noise to data, both branches at every step: ``sampler(net, noise, labels, null_labels)``."""

    def run(net: nn.Module, x: Tensor, labels: Tensor, null: Tensor) -> Tensor:
        times, state = torch.linspace(0, 1, num_steps + 1), None
        for i in range(num_steps):
            state = None if i % refresh_every == 0 else state
            t = times[i].repeat(2 * len(x))
            out, state = net(torch.cat([x, x]), t, torch.cat([null, labels]), state)
            free, conditional = out.chunk(2)
            now = scale if interval[0] < times[i] < interval[1] else 1.0
            x = x + (free + now * (conditional - free)) * (times[i + 1] - times[i])
        return x

    return run


def official_ddt(checkout: Path) -> tuple[type[nn.Module], Callable[..., Callable]]:
    """The network class and a sampler factory like :func:`plain_sampler` of a checkout of the authors' code."""
    if not (checkout / "src/models/denoiser/decoupled_improved_dit.py").is_file():
        raise SystemExit(f"--peer: {checkout} is not a checkout of github.com/MCG-NJU/DDT")
    sys.path.insert(0, str(checkout))
    network = importlib.import_module("src.models.denoiser.decoupled_improved_dit").DDT
    sampling = importlib.import_module("src.diffusion.stateful_flow_matching.sampling")
    scheduling = importlib.import_module("src.diffusion.stateful_flow_matching.scheduling")

    def sampler(num_steps: int, scale: float, interval: tuple[float, float], refresh_every: int) -> Callable:
        return sampling.EulerSampler(
            scheduler=scheduling.LinearScheduler(),
            guidance_fn=sampling.simple_guidance_fn,
            num_steps=num_steps,
            guidance=scale,
            state_refresh_rate=refresh_every,
            guidance_interval_min=interval[0],
            guidance_interval_max=interval[1],
        )

    return network, sampler
