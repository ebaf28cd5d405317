"""Our DiT as diffusers' ``DiTTransformer2DModel``, and back, without a bit lost.

diffusers keeps a copy of the time and label embedders in every block, writes q, k and v apart, and a patch as (row,
column, channel). Its time frequencies fall to ``1 / max_period`` itself instead of one factor short of it, in all of
its DiT pipelines. No config of diffusers says otherwise, so that the correction belongs to a class of ours,
:class:`OfficialDiT`: a folder that it wrote computes as the official network where this class reads it, and as
diffusers' own pipelines do where ``DiTTransformer2DModel`` does. The weights are the same.
"""

from __future__ import annotations

import json
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401 - where pipelines look for it, by the class below
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


class OfficialDiT(DiTTransformer2DModel):
    """``DiTTransformer2DModel`` with the time frequencies of the official DiT, in memory and read from a folder."""

    @wraps(DiTTransformer2DModel.__init__)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for block in self.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0  # type: ignore[union-attr]


def to_diffusers(model: DiT, *, sample_size: int = 32) -> OfficialDiT:
    """The ``DiTTransformer2DModel`` of the weights of ``model``; ``save_pretrained`` and from_diffusers bring it back.

    Args:
        model: a noise predictor of 1000 levels with classes and computed positions.
        sample_size: side of the latents that diffusers' pipelines draw.

    Raises:
        ValueError: for a model that diffusers' class cannot hold; the message names each option.
    """
    if type(model) is not DiT:
        raise ValueError(f"model must be a DiT, got a {type(model).__name__}; diffusers has no class for it")
    c = model.config
    written = {"num_positions": 0, "num_timesteps": 1000, "predicts": "noise"}
    lost = [f"{name}={c[name]!r} (only {value!r})" for name, value in written.items() if c[name] != value]
    if lost := lost + ([] if c.num_classes else ["num_classes=0 (only models with classes)"]):
        raise ValueError(
            f"model: a DiTTransformer2DModel cannot hold {', '.join(lost)}; keep it as a folder of untwine"
        )
    theirs = OfficialDiT(  # type: ignore[call-arg]
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


def from_diffusers(transformer: DiTTransformer2DModel | str | Path, *, dtype: torch.dtype = torch.float32) -> DiT:
    """Our DiT of the weights of a ``DiTTransformer2DModel``, for example ``DiTPipeline.transformer``, or of its folder.

    Args:
        transformer: the model, or a folder that ``save_pretrained`` of it wrote.
        dtype: in which a folder is read; a model keeps its own.

    Raises:
        ValueError: for another class, a folder of another model, or options that DiT does not have.
    """
    if isinstance(transformer, str | Path):
        transformer = _read(Path(transformer), dtype)
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


def _read(folder: Path, dtype: torch.dtype) -> DiTTransformer2DModel:
    try:
        name = json.loads((folder / "config.json").read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"transformer: {folder} holds no config.json of a DiTTransformer2DModel ({error})") from error
    if name not in (DiTTransformer2DModel.__name__, OfficialDiT.__name__):
        raise ValueError(f"transformer: {folder} holds a {name}, not a DiTTransformer2DModel")
    return OfficialDiT.from_pretrained(folder, local_files_only=True, use_safetensors=True, torch_dtype=dtype)


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
