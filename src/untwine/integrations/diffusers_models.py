"""Our DiT as diffusers' ``DiTTransformer2DModel``, and back, without a bit lost.

diffusers keeps a copy of the time and label embedders in every block, writes q, k and v apart, and a patch as (row,
column, channel). Its time frequencies fall to ``1 / max_period`` itself instead of one factor short of it: what
:func:`to_diffusers` returns computes with the official ones, but a copy that diffusers loads from a folder does not,
as none of diffusers' DiT pipelines does.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from torch import Tensor

from untwine.models.dit import DiT
from untwine.models.layers.official import channels_first

_BLOCK = {
    "adaln": "norm1.linear",
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
_EMBEDDERS = {
    "time_embedder.mlp.0.weight": "timestep_embedder.linear_1.weight",
    "time_embedder.mlp.0.bias": "timestep_embedder.linear_1.bias",
    "time_embedder.mlp.2.weight": "timestep_embedder.linear_2.weight",
    "time_embedder.mlp.2.bias": "timestep_embedder.linear_2.bias",
    "label_embedder.table.weight": "class_embedder.embedding_table.weight",
}
_HEAD = {"embedder.proj": "pos_embed.proj", "final_layer.adaln": "proj_out_1", "final_layer.linear": "proj_out_2"}


def to_diffusers(model: DiT, *, sample_size: int = 32) -> DiTTransformer2DModel:
    """A ``DiTTransformer2DModel`` of the weights of ``model``.

    Args:
        model: without a stored position table, and with classes.
        sample_size: side of the latents that diffusers' pipelines draw.

    Raises:
        ValueError: for a model that diffusers' class cannot hold.
    """
    c = model.config
    if type(model) is not DiT or c.num_positions or not c.num_classes:
        raise ValueError(
            f"model must be a DiT with classes and computed positions, got {type(model).__name__} with num_classes="
            f"{c.get('num_classes')}, num_positions={c.get('num_positions')}; diffusers' class has nothing else"
        )
    theirs = DiTTransformer2DModel(
        num_attention_heads=c.num_heads,
        attention_head_dim=c.hidden_size // c.num_heads,
        in_channels=c.in_channels,
        out_channels=model.num_outputs,
        num_layers=c.depth,
        sample_size=sample_size,
        patch_size=c.patch_size,
        num_embeds_ada_norm=c.num_classes,
        norm_eps=1e-6,
    )
    theirs.load_state_dict(_their_weights(model))
    for block in theirs.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0  # type: ignore[union-attr]
    return theirs.to(dtype=model.dtype).eval()  # type: ignore[call-arg]


def _their_weights(model: DiT) -> dict[str, Tensor]:
    c, own = model.config, model.state_dict()
    p, channels = c.patch_size, model.num_outputs
    found: dict[str, Tensor] = {}
    for ours, theirs in _HEAD.items():
        found |= {f"{theirs}.{kind}": own[f"{ours}.{kind}"] for kind in ("weight", "bias")}
    found["pos_embed.proj.weight"] = found["pos_embed.proj.weight"].unflatten(1, (c.in_channels, p, p))
    for kind in ("weight", "bias"):
        rows = own[f"final_layer.linear.{kind}"].unflatten(0, (channels, p, p)).movedim(0, 2)
        found[f"proj_out_2.{kind}"] = rows.flatten(0, 2)
    for i in range(c.depth):
        block = f"transformer_blocks.{i}"
        found |= {f"{block}.norm1.emb.{theirs}": own[ours] for ours, theirs in _EMBEDDERS.items()}
        for kind in ("weight", "bias"):
            found |= {f"{block}.{theirs}.{kind}": own[f"blocks.{i}.{ours}.{kind}"] for ours, theirs in _BLOCK.items()}
            for letter, value in zip("qkv", own[f"blocks.{i}.attn.qkv.{kind}"].chunk(3)):
                found[f"{block}.attn1.to_{letter}.{kind}"] = value
    return found


def from_diffusers(transformer: DiTTransformer2DModel) -> DiT:
    """Our DiT of the weights of a ``DiTTransformer2DModel``, for example ``DiTPipeline.transformer``.

    Raises:
        ValueError: for another class or options that DiT does not have.
    """
    if not isinstance(transformer, DiTTransformer2DModel):
        raise ValueError(f"transformer must be a DiTTransformer2DModel, got {type(transformer).__name__}")
    c: Any = transformer.config
    if c.activation_fn != "gelu-approximate" or not c.attention_bias or c.norm_elementwise_affine:
        raise ValueError(
            "transformer must have activation_fn='gelu-approximate', attention_bias=True and "
            f"norm_elementwise_affine=False, got {c.activation_fn!r}, {c.attention_bias}, {c.norm_elementwise_affine}"
        )
    model = DiT(
        in_channels=c.in_channels,
        hidden_size=c.num_attention_heads * c.attention_head_dim,
        depth=c.num_layers,
        num_heads=c.num_attention_heads,
        patch_size=c.patch_size,
        num_classes=c.num_embeds_ada_norm,
        learn_sigma=transformer.out_channels == 2 * c.in_channels,
    )
    model.load_state_dict(_our_weights(transformer, model))
    return model.to(dtype=transformer.dtype).eval()  # type: ignore[call-arg]


def _our_weights(transformer: DiTTransformer2DModel, model: DiT) -> dict[str, Tensor]:
    own, depth = transformer.state_dict(), model.config.depth
    found: dict[str, Tensor] = {}
    for ours, theirs in _EMBEDDERS.items():
        copies = [own[f"transformer_blocks.{i}.norm1.emb.{theirs}"] for i in range(depth)]
        if not all(torch.equal(copy, copies[0]) for copy in copies):
            raise ValueError(f"transformer: the blocks' copies of {theirs} differ, and a DiT has one for all")
        found[ours] = copies[0]
    for kind in ("weight", "bias"):
        found |= {f"{ours}.{kind}": own[f"{theirs}.{kind}"] for ours, theirs in _HEAD.items()}
        for i in range(depth):
            block = f"transformer_blocks.{i}"
            found |= {f"blocks.{i}.{ours}.{kind}": own[f"{block}.{theirs}.{kind}"] for ours, theirs in _BLOCK.items()}
            qkv = [own[f"{block}.attn1.to_{letter}.{kind}"] for letter in "qkv"]
            found[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(qkv)
    found["embedder.proj.weight"] = found["embedder.proj.weight"].flatten(1)
    return channels_first(found, model.config.patch_size, model.num_outputs)
