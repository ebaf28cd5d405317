"""Official state dicts of RAE's networks, random, written out from the descriptions of their formats."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

HEAD = {"hidden_size": [16, 24], "depth": [2, 1], "num_heads": [2, 2], "in_channels": 64, "num_classes": 4}
"""official arguments of :func:`head_of_rae`"""
SIDE = 4
"""patches a side, of either"""


def _filled(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def head_of_rae(seed: int = 0) -> dict[str, Tensor]:
    """``DiTwDDTHead`` of bytetriper/RAE: RMSNorm, SwiGLU in one w12, rotary and sine-cosine positions."""
    (encoder, head), tokens = (16, 24), SIDE**2
    shapes: dict[str, tuple[int, ...]] = {
        "t_embedder.W": (256,),
        "t_embedder.mlp.0.weight": (encoder, 512),
        "t_embedder.mlp.0.bias": (encoder,),
        "t_embedder.mlp.2.weight": (encoder, encoder),
        "t_embedder.mlp.2.bias": (encoder,),
        "y_embedder.embedding_table.weight": (5, encoder),
        "s_projector.weight": (head, encoder),
        "s_projector.bias": (head,),
        "final_layer.norm_final.weight": (head,),
        "final_layer.linear.weight": (64, head),
        "final_layer.linear.bias": (64,),
        "final_layer.adaLN_modulation.1.weight": (2 * head, head),
        "final_layer.adaLN_modulation.1.bias": (2 * head,),
    }
    for name, width in (("s_embedder", encoder), ("x_embedder", head)):
        shapes |= {f"{name}.proj.weight": (width, 64, 1, 1), f"{name}.proj.bias": (width,)}
    for i, width in enumerate((encoder, encoder, head)):
        hidden = int(2 / 3 * 4 * width)
        layers = {
            "attn.qkv": (3 * width, width), "attn.proj": (width, width), "mlp.w12": (2 * hidden, width),
            "mlp.w3": (width, hidden), "adaLN_modulation.1": (6 * width, width),
        }  # fmt: skip
        shapes |= {f"blocks.{i}.{name}.weight": shape for name, shape in layers.items()}
        shapes |= {f"blocks.{i}.{name}.bias": shape[:1] for name, shape in layers.items()}
        shapes |= {f"blocks.{i}.norm{k}.weight": (width,) for k in (1, 2)}
    tables = {
        f"{part}_feat_rope.freqs_{f}": torch.ones(tokens, d)
        for part, d in (("enc", 8), ("dec", 12))
        for f in ("cos", "sin")
    }
    return {**_filled(shapes, seed), **tables, "pos_embed": _positions(encoder, SIDE)}


def _positions(width: int, side: int) -> Tensor:
    """(1, N, D): sines and cosines of the column, then of the row."""
    frequencies = 10000.0 ** (-torch.arange(width // 4).double() / (width // 4))
    rows, columns = torch.meshgrid(torch.arange(side).double(), torch.arange(side).double(), indexing="ij")
    angles = [grid.flatten()[:, None] * frequencies for grid in (columns, rows)]
    return torch.cat([part for a in angles for part in (a.sin(), a.cos())], 1)[None].float()


def decoder_of_rae(
    *, channels: int = 64, width: int = 32, side: int = SIDE, patch: int = 4, seed: int = 0
) -> dict[str, Tensor]:
    """``GeneralDecoder`` of bytetriper/RAE with one layer, and its fixed positions."""
    layer = {
        "attention.attention.query": (width, width), "attention.attention.key": (width, width),
        "attention.attention.value": (width, width), "attention.output.dense": (width, width),
        "intermediate.dense": (48, width), "output.dense": (width, 48),
    }  # fmt: skip
    linears = {f"decoder_layers.0.{name}": shape for name, shape in layer.items()}
    linears |= {"decoder_embed": (width, channels), "decoder_pred": (3 * patch**2, width)}
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": shape for name, shape in linears.items()}
    shapes |= {f"{name}.bias": shape[:1] for name, shape in linears.items()}
    norms = ("decoder_layers.0.layernorm_before", "decoder_layers.0.layernorm_after", "decoder_norm")
    shapes |= {f"{name}.{kind}": (width,) for name in norms for kind in ("weight", "bias")}
    table = torch.cat((torch.zeros(1, 1, width), _positions(width, side)), 1)
    return {**_filled(shapes, seed), "trainable_cls_token": torch.zeros(1, 1, width), "decoder_pos_embed": table}
