"""From the checkpoints of github.com/MCG-NJU/DDT to ours: names, constructor arguments, signs.

The official models run from noise at t' = 0 to data at t' = 1 and predict ``d x / d t'``. With t = 1 - t' the velocity
changes sign (the last linear is negated) and the time embedder sees ``t - 1 = -t'`` (the sine columns are negated).
Both are exact in floating point.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from untwine.registry import did_you_mean

ARGUMENTS = {
    "in_channels": ("in_channels", 4),
    "num_groups": ("num_heads", 12),
    "hidden_size": ("hidden_size", 1152),
    "num_blocks": ("depth", 18),
    "num_encoder_blocks": ("encoder_depth", 4),
    "patch_size": ("patch_size", 2),
    "num_classes": ("num_classes", 1000),
}
"""official constructor argument -> (ours, official default)"""
IGNORED_ARGUMENTS = ("learn_sigma", "deep_supervision", "weight_path", "load_ema")
"""official arguments without an effect on the network"""
PREFIXES = {"t_embedder.": "time_embedder.", "y_embedder.embedding_table.": "label_embedder.table."}
_ADALN = ("adaLN_modulation.0.", "adaln.")


def translate_config(config: Mapping[str, Any], accepted: Collection[str]) -> dict[str, Any]:
    """Official constructor arguments as ours; ``accepted`` are the official names that the network has.

    Raises:
        ValueError: for an argument that the official constructor does not have.
    """
    _check_arguments(config, accepted)
    ours = {ARGUMENTS[k][0]: config.get(k, ARGUMENTS[k][1]) for k in accepted}
    return {**ours, "time_origin": 1.0}


def _check_arguments(config: Mapping[str, Any], accepted: Collection[str]) -> None:
    if unknown := [k for k in config if k not in accepted and k not in IGNORED_ARGUMENTS]:
        raise ValueError(f"config has no official argument {unknown[0]!r}{did_you_mean(unknown[0], list(accepted))}")


def translate_name(name: str, prefixes: Mapping[str, str]) -> str:
    """An official parameter name as ours."""
    for theirs, ours in prefixes.items():
        if name.startswith(theirs):
            name = ours + name.removeprefix(theirs)
            break
    return name.replace(*_ADALN)


def load_translated(model: nn.Module, state_dict: Mapping[str, Tensor], prefixes: Mapping[str, str]) -> None:
    """Loads official weights into ``model``, signs absorbed.

    Args:
        model: of the shapes of the official one.
        state_dict: official names without a checkpoint's own prefix.
        prefixes: official prefix -> ours.

    Raises:
        ValueError: for missing, unexpected or misshapen parameters, each listed by its official name.
    """
    own = model.state_dict()
    names = {translate_name(name, prefixes): name for name in state_dict}
    inverse = {ours: theirs for theirs, ours in prefixes.items()}
    missing = [_official_name(name, inverse) for name in own if name not in names]
    unexpected = [name for ours, name in names.items() if ours not in own]
    shapes = [
        f"{name}: {tuple(state_dict[name].shape)}, expected {tuple(own[ours].shape)}"
        for ours, name in names.items()
        if ours in own and state_dict[name].shape != own[ours].shape
    ]
    _refuse(type(model).__name__, missing, unexpected, shapes)
    weights = {ours: state_dict[name] for ours, name in names.items()}
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        weights[name] = -weights[name]
    first = weights["time_embedder.mlp.0.weight"]
    half = first.shape[1] // 2
    weights["time_embedder.mlp.0.weight"] = torch.cat((first[:, :half], -first[:, half:]), 1)
    model.load_state_dict(weights)


def _official_name(name: str, inverse: Mapping[str, str]) -> str:
    theirs, ours = _ADALN
    return translate_name(name, inverse).replace(ours, theirs)


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


def infer_config(
    state_dict: Mapping[str, Tensor], given: Mapping[str, Any], sizes: Mapping[str, Mapping[str, int]]
) -> dict[str, Any]:
    """Official constructor arguments read off the weights; ``given`` ones win.

    The width, depth, number of heads and classes are in the shapes. The patch size and the encoder depth are not: they
    come from ``given`` or from the published size of that width and depth, which has four channels.

    Raises:
        ValueError: naming the argument to give, where neither settles it; or if the weights are of another family.
    """
    _check_arguments(given, ARGUMENTS)
    try:
        width, patch = state_dict["x_embedder.proj.weight"].shape
        head_dim = len(state_dict["blocks.0.attn.q_norm.weight"])
        classes = len(state_dict["y_embedder.embedding_table.weight"]) - 1
    except KeyError as error:
        raise ValueError(f"state_dict has no {error}: not weights of a DDT or an improved DiT") from error
    depth = 1 + max(int(name.split(".")[1]) for name in state_dict if name.startswith("blocks."))
    found = {"hidden_size": width, "num_blocks": depth, "num_groups": width // head_dim, "num_classes": classes}
    known = next((s for s in sizes.values() if (s["hidden_size"], s["depth"]) == (width, depth)), None)
    patch_size = given.get("patch_size") or _patch_size(patch, given.get("in_channels"), known)
    found |= {"patch_size": patch_size, "in_channels": patch // patch_size**2}
    if "s_embedder.proj.weight" in state_dict and "num_encoder_blocks" not in given:
        if known is None:
            raise ValueError(
                f"num_encoder_blocks is not in the weights and {depth} blocks of width {width} are no published size "
                f"({', '.join(sizes)}); give it in config"
            )
        found["num_encoder_blocks"] = known["encoder_depth"]
    return {**found, **given}


def _patch_size(patch: int, in_channels: int | None, known: Mapping[str, int] | None) -> int:
    if in_channels is None and known is None:
        raise ValueError(f"a patch of {patch} values does not tell patch_size from in_channels; give either in config")
    return round((patch / (in_channels or 4)) ** 0.5)
