"""Official checkpoints of the published systems as untwine models: the body of ``untwine convert``.

The translation itself is the ``from_official`` of each model; this module reads files, chooses the network and writes
the result as a folder that ``from_pretrained`` loads.
"""

from __future__ import annotations

import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from untwine.codecs import TRAINED
from untwine.integrations.published import grid_side
from untwine.registry import did_you_mean

NETWORKS: Mapping[str, tuple[str, ...]] = {
    "ddt": ("ddt", "improved_dit"),
    "dit": ("dit",),
    "sit": ("sit",),
    "repa": ("sit",),
    "sra": ("sit",),
    "umd": ("umd",),
    "lightningdit": ("lightningdit",),
    "rae": ("ddt_head", "lightningdit"),
    "rae-decoder": ("rae",),
    "ddt-head": ("ddt_head", "lightningdit"),
}
"""system -> its networks by their name in recipes; the first whose own parameter names are there is taken"""
PREFIXES = ("ema_denoiser.", "denoiser.")
"""where a Lightning checkpoint keeps the network, averaged weights first"""
CONTAINERS = ("state_dict", "ema", "model")
"""entries of a saved dictionary that hold the weights"""


@dataclass(frozen=True)
class ConvertReport:
    """What a conversion did."""

    source: Path
    out: Path
    slug: str
    network: str
    weights: str
    """prefix of the parameters that were taken, empty for a plain state dict"""
    config: dict[str, Any]
    """official constructor arguments"""
    num_parameters: int
    grid_side: int | None = None
    """patches a side of the grid that the weights have positions for, where they have a table"""


def from_official(
    slug: str, state_dict: Mapping[str, Tensor], config: Mapping[str, Any] | None = None, *, network: str | None = None
) -> Any:
    """The model of a system's official weights.

    Args:
        slug: the system, a key of ``NETWORKS``.
        state_dict: official names, with or without a checkpoint's prefix.
        config: the official constructor's arguments (its defaults hold for what is left out); None reads them off the
            weights.
        network: which of the system's networks; None decides by the parameters that are there.

    Raises:
        ValueError: for an unknown system, network or argument, or for weights that do not fit.
    """
    _, weights = select_weights(state_dict)
    _, cls = _network(slug, weights, network)
    resolved = cls.infer_official(weights, {}, system=slug) if config is None else config
    return cls.from_official(weights, resolved, system=slug)


def convert(
    source: Path, slug: str, config: Mapping[str, Any] | None, out: Path, *, network: str | None = None
) -> ConvertReport:
    """Writes an official checkpoint as a diffusers model folder; ``out`` appears complete or not at all.

    Args:
        source: Lightning ``.ckpt``, or a state dict as ``.pt``, ``.pth`` or ``.safetensors``.
        slug: the system, a key of ``NETWORKS``.
        config: official constructor arguments that the weights do not tell.
        out: a folder that does not exist yet.
        network: as in :func:`from_official`.

    Raises:
        ValueError: for an unreadable or refused source, an existing ``out``, or weights that do not fit.
    """
    source, out = Path(source), Path(out)
    if out.exists():
        raise ValueError(f"out: {out} exists; choose a new folder or remove it")
    prefix, weights = _read(source)
    name, cls = _network(slug, weights, network)
    resolved = cls.infer_official(weights, config or {}, system=slug)
    model = cls.from_official(weights, resolved, system=slug)
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        model.save_pretrained(partial)
        partial.replace(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    size = sum(p.numel() for p in model.parameters())
    return ConvertReport(source, out, slug, name, prefix, resolved, size, grid_side(weights))


def load_official_file(path: Path) -> dict[str, Tensor]:
    """The network's weights in a file, by official name; averaged weights where the file has both.

    Raises:
        ValueError: if the file is missing or damaged, holds no weights, or would run code when unpickled.
    """
    return _read(Path(path))[1]


def select_weights(state_dict: Mapping[str, Any]) -> tuple[str, dict[str, Tensor]]:
    """The prefix under which a state dict keeps the network (maybe empty), and the weights without it.

    The marks that ``torch.compile`` leaves in names are removed.
    """
    named = {k.replace("_orig_mod.", ""): v for k, v in state_dict.items() if isinstance(v, Tensor)}
    for prefix in PREFIXES:
        if chosen := {k.removeprefix(prefix): v for k, v in named.items() if k.startswith(prefix)}:
            return prefix, chosen
    if not named:
        raise ValueError(f"state_dict holds no tensors; its entries are {sorted(map(str, state_dict))[:20]}")
    return "", named


def _network(slug: str, weights: Mapping[str, Tensor], network: str | None) -> tuple[str, Any]:
    if slug not in NETWORKS:
        raise ValueError(f"slug: no official weights are known for {slug!r}{did_you_mean(slug, list(NETWORKS))}")
    names = NETWORKS[slug]
    if network is not None:
        if network not in names:
            raise ValueError(f"network: {slug} has no {network!r}{did_you_mean(network, list(names))}")
        return network, TRAINED[network]
    for name in names:
        if TRAINED[name].is_official(weights, slug):
            return name, TRAINED[name]
    raise ValueError(
        f"state_dict has the parameters of none of {slug}'s networks ({', '.join(names)}); {_likeness(weights)}. Name "
        "the network to see what is missing"
    )


def _likeness(weights: Mapping[str, Tensor]) -> str:
    """Which systems' names these are."""
    fitting = [slug for slug, names in NETWORKS.items() if any(TRAINED[n].is_official(weights, slug) for n in names)]
    if fitting:
        return f"it looks like weights of {' or '.join(fitting)}"
    return f"it begins with {sorted(weights)[:5]}"


def _read(path: Path) -> tuple[str, dict[str, Tensor]]:
    if not path.is_file():
        raise ValueError(f"source: no file at {path}")
    try:
        loaded: Any = load_file(path) if path.suffix == ".safetensors" else _unpickle(path)
    except pickle.UnpicklingError as error:
        raise ValueError(_refusal(path, str(error))) from error
    except (SafetensorError, RuntimeError, OSError, EOFError, KeyError) as error:
        raise ValueError(f"source: {path} is damaged or no checkpoint: {error}") from error
    if not isinstance(loaded, Mapping):
        raise ValueError(f"source: {path} holds a {type(loaded).__name__}, not a state dict or Lightning checkpoint")
    inner: Mapping[str, Any] = next((loaded[key] for key in CONTAINERS if isinstance(loaded.get(key), Mapping)), loaded)
    return select_weights(inner)


def _unpickle(path: Path) -> Any:
    # Only the zip format can be mapped, which keeps the optimizer state of a large checkpoint on disk.
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


def _refusal(path: Path, message: str) -> str:
    found = re.search(r"GLOBAL (\S+)", message)
    if found is None:
        return f"source: {path} is damaged or no checkpoint: it holds no pickle of tensors"
    return (
        f"source: {path} asks for {found[1]}, which unpickling would run; only plain weights are read. Where you trust "
        "the file, save its weights alone: torch.save(torch.load(path, weights_only=False)['state_dict'], 'weights.pt')"
    )
