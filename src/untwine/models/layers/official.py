"""From official checkpoints to ours: names, constructor arguments, signs, orders.

DDT, SiT and LightningDiT run from noise at t' = 0 to data at t' = 1 and predict ``d x / d t'``. With t = 1 - t' the
velocity changes sign (the last linear is negated) and the time embedder sees ``t - 1 = -t'`` (the sine columns are
negated). Both are exact in floating point. DiT's descendants write a patch as (row, column, channel), we as (channel,
row, column): rows of the last linear are permuted.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from untwine.models.layers.embeddings import sincos_positions
from untwine.registry import did_you_mean

Weights = dict[str, Tensor]

PREFIXES = {"t_embedder.": "time_embedder.", "y_embedder.embedding_table.": "label_embedder.table."}


@dataclass(frozen=True)
class Dialect:
    """How the official code base of one system writes a network that we have.

    ``config`` and ``infer`` work on official constructor arguments; ``convert`` on weights that already have our names.
    """

    system: str
    """slug of the system"""
    arguments: Mapping[str, tuple[str, Any]]
    """official constructor argument -> (ours, official default)"""
    names: Mapping[str, str]
    """fragment of an official parameter name -> ours; those that end in a dot and stand first are prefixes"""
    marks: tuple[str, ...]
    """fragments that occur among the official names of this network"""
    absent: tuple[str, ...] = ()
    """fragments that do not"""
    ignored: tuple[str, ...] = ()
    """official arguments without an effect on the network"""
    dropped: tuple[str, ...] = ()
    """prefixes of official parameters that are no part of the network"""
    configure: Callable[[dict[str, Any], Mapping[str, Tensor]], dict[str, Any]] = lambda ours, weights: ours
    """(our arguments, official weights) -> our arguments"""
    convert: Callable[[Weights, Any], Weights] = lambda weights, config: weights
    """(weights by our names, our config) -> our weights"""
    read: Callable[[Mapping[str, Tensor], Mapping[str, Any], Mapping[str, Any]], dict[str, Any]] | None = None
    """(official weights, given arguments, published sizes) -> official arguments"""

    def is_of(self, state_dict: Iterable[str]) -> bool:
        """Whether these are names of this network in this code base."""
        names = "\n".join(state_dict)
        return all(mark in names for mark in self.marks) and not any(mark in names for mark in self.absent)

    def config(self, given: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> dict[str, Any]:
        """Official constructor arguments as ours.

        Raises:
            ValueError: for an argument that the official constructor does not have.
        """
        self.check_arguments(given)
        ours = {name: given.get(k, default) for k, (name, default) in self.arguments.items()}
        return self.configure(ours, state_dict)

    def check_arguments(self, given: Mapping[str, Any]) -> None:
        """Raises ValueError for an argument that the official constructor does not have."""
        if unknown := [k for k in given if k not in self.arguments and k not in self.ignored]:
            known = list(self.arguments)
            raise ValueError(f"config has no official argument {unknown[0]!r}{did_you_mean(unknown[0], known)}")

    def infer(
        self, state_dict: Mapping[str, Tensor], given: Mapping[str, Any], sizes: Mapping[str, Mapping[str, Any]]
    ) -> dict[str, Any]:
        """Official constructor arguments, read off the weights where ``given`` is silent.

        Raises:
            ValueError: naming the argument to give, where neither settles it; or if the weights are of another family.
        """
        self.check_arguments(given)
        if self.read is None:
            return dict(given)
        try:
            return {**self.read(state_dict, given, sizes), **given}
        except KeyError as error:
            raise ValueError(f"state_dict has no {error}: not weights of this network") from error

    def name(self, official: str) -> str:
        """An official parameter name as ours."""
        return _replaced(official, self.names)

    def official_name(self, ours: str) -> str:
        """The reverse of :meth:`name`, for messages."""
        return _replaced(ours, {own: theirs for theirs, own in self.names.items()})


def _replaced(name: str, table: Mapping[str, str]) -> str:
    """``name`` with the first fitting prefix and every inner fragment of ``table`` replaced."""
    for old, new in table.items():
        if name.startswith(old):
            name = new + name.removeprefix(old)
            break
    for old, new in table.items():
        if "." + old in name:
            name = name.replace("." + old, "." + new)
            break
    return name


def load_translated(model: nn.Module, state_dict: Mapping[str, Tensor], dialect: Dialect) -> None:
    """Loads official weights into ``model``, signs absorbed.

    Args:
        model: of the shapes of the official one.
        state_dict: official names without a checkpoint's own prefix.
        dialect: the code base that they come from.

    Raises:
        ValueError: for missing, unexpected or misshapen parameters, each listed by its official name.
    """
    own = model.state_dict()
    names = {dialect.name(k): k for k in state_dict if not k.startswith(dialect.dropped)}
    weights = dialect.convert({ours: state_dict[k] for ours, k in names.items()}, getattr(model, "config", None))
    missing = [dialect.official_name(name) for name in own if name not in weights]
    unexpected = [names.get(name, name) for name in weights if name not in own]
    shapes = [
        f"{names.get(name, dialect.official_name(name))}: {tuple(weight.shape)}, expected {tuple(own[name].shape)}"
        for name, weight in weights.items()
        if name in own and weight.shape != own[name].shape
    ]
    _refuse(type(model).__name__, missing, unexpected, shapes)
    model.load_state_dict(weights)


def _refuse(network: str, missing: Sequence[str], unexpected: Sequence[str], shapes: Sequence[str]) -> None:
    lines: list[str] = []
    for title, names, others in (("missing", missing, unexpected), ("unexpected", unexpected, missing)):
        if names:
            lines.append(f"{len(names)} {title}:")
            lines += [f"  {name}{_nearest(name, others)}" for name in names[:20]]
    if shapes:
        lines.append(f"{len(shapes)} of another shape:")
        lines += [f"  {text}" for text in shapes[:20]]
    if lines:
        raise ValueError(
            f"state_dict does not fit {network} with the given config; correct the config or the network\n"
            + "\n".join(lines)
        )


def _nearest(name: str, others: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, others, n=1)
    return f" (nearest: {close[0]})" if close else ""


# Conversions of weights, by our names. Each leaves alone what is not there or not of the shape that it is for, so that
# the check of names and shapes can tell what is wrong.


def negated(weights: Weights, layers: Collection[str] = ("final_layer.linear",)) -> Weights:
    """The named linear layers with the other sign."""
    names = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    return {k: -v if k in names else v for k, v in weights.items()}


def sines_negated(weights: Weights, name: str = "time_embedder.mlp.0.weight") -> Weights:
    """The second half of the columns of the first time linear with the other sign."""
    if name not in weights:
        return weights
    cosines, sines = weights[name].tensor_split([weights[name].shape[1] // 2], 1)
    return {**weights, name: torch.cat((cosines, -sines), 1)}


def reversed_time(weights: Weights, config: Any = None) -> Weights:
    """For a velocity predictor whose time runs from noise to data; its ``time_origin`` is 1."""
    return sines_negated(negated(weights))


def channels_first(
    weights: Weights, patch_size: int, channels: int, layers: Collection[str] = ("final_layer.linear",)
) -> Weights:
    """The outputs of the named layers reordered from (row, column, channel), the first ``channels`` of them kept."""
    found = dict(weights)
    for name in (f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")):
        weight, p = weights.get(name), patch_size
        if weight is not None and len(weight) % p**2 == 0 and len(weight) >= channels * p**2:
            rows = weight.unflatten(0, (p, p, -1)).movedim(2, 0)[:channels]
            found[name] = rows.flatten(0, 2).contiguous()
    return found


def flat_patches(weights: Weights) -> Weights:
    """Patch convolutions (D, C, p, p) as the linear layers (D, C p p) that they are."""
    return {k: v.flatten(1) if v.ndim == 4 else v for k, v in weights.items()}


def split_w12(weights: Weights) -> Weights:
    """SwiGLU's fused first layers ``w12`` as ``w1`` and ``w3``; its last one as ``w2``."""
    found: Weights = {}
    for name, weight in weights.items():
        head, fused, kind = name.partition(".mlp.w12.")
        if fused:
            found[f"{head}.mlp.w1.{kind}"], found[f"{head}.mlp.w3.{kind}"] = weight.chunk(2)
        else:
            found[name.replace(".mlp.w3.", ".mlp.w2.")] = weight
    return found


def fused_qkv(weights: Weights) -> Weights:
    """Separate projections of queries, keys and values as one."""
    found = dict(weights)
    for name in weights:
        parts = [name.replace(".attn.q.", f".attn.{k}.") for k in "qkv"]
        if ".attn.q." in name and all(part in weights for part in parts):
            found[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat([found.pop(part) for part in parts])
    return found


def shifts_added(weights: Weights) -> Weights:
    """Block modulations without shifts (scale, gate, scale, gate) with shifts of zero."""
    found = dict(weights)
    for name, weight in weights.items():
        if name.startswith("blocks.") and ".adaln." in name:
            scale_a, gate_a, scale_m, gate_m = weight.chunk(4)
            zero = torch.zeros_like(scale_a)
            found[name] = torch.cat((zero, scale_a, gate_a, zero, scale_m, gate_m))
    return found


# Reading the configuration off the weights.


def stored_positions(table: Tensor) -> int:
    """0 where an official position table (1, N, D) is the sines and cosines that we compute, else N.

    Raises:
        ValueError: for a table of no square grid.
    """
    num_tokens, dim = table.shape[1:]
    side = math.isqrt(num_tokens)
    if side**2 != num_tokens:
        raise ValueError(f"pos_embed has {num_tokens} positions, which is no square grid")
    if dim % 4 or table.is_meta:
        return num_tokens
    difference = sincos_positions(side, side, dim) - table.float().cpu()
    return 0 if difference.abs().max() < 1e-5 else num_tokens


def count_blocks(state_dict: Iterable[str]) -> int:
    """How many blocks have parameters."""
    return 1 + max((int(name.split(".")[1]) for name in state_dict if name.startswith("blocks.")), default=-1)


def known_size(sizes: Mapping[str, Mapping[str, Any]], **facts: int) -> Mapping[str, Any] | None:
    """The published size of these numbers."""
    return next((s for s in sizes.values() if all(s[k] == v for k, v in facts.items())), None)


def read_vit(state_dict: Mapping[str, Tensor], given: Mapping[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
    """What the shapes of DiT's layout tell: all but the number of heads, which a published size has.

    Raises:
        ValueError: if the number of heads is neither given nor that of a published size.
    """
    width, channels, patch, _ = state_dict["x_embedder.proj.weight"].shape
    found = {
        "hidden_size": width,
        "depth": count_blocks(state_dict),
        "in_channels": channels,
        "patch_size": patch,
        "num_classes": len(state_dict["y_embedder.embedding_table.weight"]) - 1,
        "learn_sigma": len(state_dict["final_layer.linear.weight"]) == 2 * channels * patch**2,
    }
    if "num_heads" not in given:
        found["num_heads"] = read_heads(state_dict, width, sizes, hidden_size=width, depth=found["depth"])
    return found


def read_heads(
    state_dict: Mapping[str, Tensor], width: int, sizes: Mapping[str, Any], *, rope: str = "feat_rope", **facts: int
) -> int:
    """The number of heads, from the rotary tables or norms of queries that the weights hold, or the published size.

    Raises:
        ValueError: where nothing tells.
    """
    for name, axis in ((f"{rope}.freqs_cos", 1), ("blocks.0.attn.q_norm.weight", 0)):
        if name in state_dict:
            return width // state_dict[name].shape[axis]
    known = known_size(sizes, **facts)
    if known is None:
        raise ValueError(
            f"num_heads is not in the weights and {facts} is no published size ({', '.join(sizes)}); give it in config"
        )
    return known["num_heads"]


# github.com/MCG-NJU/DDT


def read_ddt(state_dict: Mapping[str, Tensor], given: Mapping[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Width, depth, heads and classes are in the shapes of DDT's layout.

    The patch size and the encoder depth are not: they come from ``given`` or from the published size of that width and
    depth, which has four channels.

    Raises:
        ValueError: naming the argument to give, where neither settles it.
    """
    width, patch = state_dict["x_embedder.proj.weight"].shape
    head_dim = len(state_dict["blocks.0.attn.q_norm.weight"])
    classes = len(state_dict["y_embedder.embedding_table.weight"]) - 1
    depth = count_blocks(state_dict)
    found = {"hidden_size": width, "num_blocks": depth, "num_groups": width // head_dim, "num_classes": classes}
    known = known_size(sizes, hidden_size=width, depth=depth)
    patch_size = given.get("patch_size") or _patch_size(patch, given.get("in_channels"), known)
    found |= {"patch_size": patch_size, "in_channels": patch // patch_size**2}
    if "s_embedder.proj.weight" in state_dict and "num_encoder_blocks" not in given:
        if known is None:
            raise ValueError(
                f"num_encoder_blocks is not in the weights and {depth} blocks of width {width} are no published size "
                f"({', '.join(sizes)}); give it in config"
            )
        found["num_encoder_blocks"] = known["encoder_depth"]
    return found


def _patch_size(patch: int, in_channels: int | None, known: Mapping[str, int] | None) -> int:
    if in_channels is None and known is None:
        raise ValueError(f"a patch of {patch} values does not tell patch_size from in_channels; give either in config")
    return round((patch / (in_channels or 4)) ** 0.5)


_DDT_ARGUMENTS = {
    "in_channels": ("in_channels", 4),
    "num_groups": ("num_heads", 12),
    "hidden_size": ("hidden_size", 1152),
    "num_blocks": ("depth", 18),
    "patch_size": ("patch_size", 2),
    "num_classes": ("num_classes", 1000),
}
_DDT_ADALN = {"adaLN_modulation.0.": "adaln."}
_DDT_IGNORED = ("learn_sigma", "deep_supervision", "weight_path", "load_ema")


def data_last(ours: dict[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """For a network whose time runs from noise to data."""
    return {**ours, "time_origin": 1.0}


DDT_DIALECT = Dialect(
    system="ddt",
    arguments={**_DDT_ARGUMENTS, "num_encoder_blocks": ("encoder_depth", 4)},
    names={**PREFIXES, "s_embedder.": "encoder_embedder.", "x_embedder.": "decoder_embedder.", **_DDT_ADALN},
    marks=("x_embedder.", "s_embedder.", "adaLN_modulation.0."),
    ignored=_DDT_IGNORED,
    configure=data_last,
    convert=reversed_time,
    read=read_ddt,
)
IMPROVED_DIT_DIALECT = Dialect(
    system="ddt",
    arguments=_DDT_ARGUMENTS,
    names={**PREFIXES, "x_embedder.": "embedder.", **_DDT_ADALN},
    marks=("x_embedder.", "adaLN_modulation.0."),
    absent=("s_embedder.",),
    ignored=(*_DDT_IGNORED, "num_encoder_blocks"),
    configure=data_last,
    convert=reversed_time,
    read=read_ddt,
)
