"""What samples are compared with: a folder, a data set or an ADM ``.npz``; its features, kept in a cache."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

import untwine
from untwine.config import Component
from untwine.data import DATASETS
from untwine.data.base import Dataset
from untwine.diffusion.draws import Draws
from untwine.encoders.base import Encoder
from untwine.evaluation.extraction import Extractor
from untwine.evaluation.pictures import Pictures, from_array, from_dataset, from_folder, read_npz
from untwine.evaluation.protocols import Protocol
from untwine.evaluation.statistics import Gaussian, Moments, gather, process
from untwine.registry import did_you_mean

logger = logging.getLogger(__name__)
_FORMAT = 1  # of the cache


@dataclass(frozen=True)
class Bank:
    """What is known of a reference in the features of one encoder."""

    pooled: Tensor
    """(M, D) float32; M = 0 where only statistics are known"""
    pixels: Tensor
    """(M, P) float32, of :class:`~untwine.encoders.pixels.Pixels`"""
    positions: Tensor
    """(M,) of those pictures in the reference"""
    gaussian: Gaussian
    spatial: Gaussian | None = None
    """of the encoder's tokens, for the sFID"""
    data: dict[str, Any] = field(default_factory=dict)
    """fingerprint of the pictures"""


@dataclass(frozen=True)
class Reference:
    """Real pictures, or their statistics, or both, as in ADM's files."""

    source: str
    open: Callable[[tuple[int, int]], Pictures] | None
    """(H, W) of the samples -> the pictures at that size"""
    pool: Gaussian | None = None
    """given statistics of Inception's pooled features; they win over those of the pictures"""
    spatial: Gaussian | None = None

    def pictures(self, size: tuple[int, int]) -> Pictures | None:
        """The pictures for samples of ``size``.

        Raises:
            ValueError: where they have another size.
        """
        pictures = self.open(size) if self.open else None
        if pictures is not None and pictures.size != size:
            raise ValueError(
                f"reference {self.source} has pictures of {pictures.size[0]} x {pictures.size[1]} pixels, the samples "
                f"{size[0]} x {size[1]}; draw the samples at that size, or set the reference's resolution"
            )
        return pictures


def open_reference(source: str | Path | Dataset | Reference) -> Reference:
    """A reference from a folder of pictures, an ``.npz``, a data set, or the name of one with its options.

    Names are those of :data:`untwine.data.DATASETS`, options follow a colon: ``digits``,
    ``fashion:part=test,resolution=28``. Pictures of a folder are resized and cropped to the samples' size as for
    training; the others must have it.

    Raises:
        ValueError: for anything else, and for a name or option that does not exist.
    """
    if isinstance(source, Reference):
        return source
    if isinstance(source, Dataset):
        name = type(source).__name__
        return Reference(name, lambda size: from_dataset(source, name))
    path, name = Path(source), str(source)
    if path.suffix == ".npz":
        return read_reference(path)
    if path.is_dir():
        return Reference(name, lambda size: from_folder(path, size))
    kind, _, options = name.partition(":")
    if kind not in DATASETS:
        raise ValueError(
            f"reference: {name!r} is no folder, no .npz file and no data set{did_you_mean(kind, list(DATASETS))}"
        )
    dataset = Component(Dataset.kinds, kind).replace(**_options(options, name)).build()
    return Reference(name, lambda size: from_dataset(dataset, name))


def _options(text: str, name: str) -> dict[str, Any]:
    """``a=1,b=x`` as a mapping of YAML values."""
    values = {}
    for part in filter(None, text.split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"reference: {name!r} has the option {part!r}; write NAME:option=value,option=value")
        values[key.strip().replace("-", "_")] = yaml.safe_load(value)
    return values


def read_reference(path: Path) -> Reference:
    """ADM's reference file: pictures ``arr_0``, statistics ``mu, sigma`` and spatial ones ``mu_s, sigma_s``.

    Raises:
        ValueError: where it holds neither pictures nor statistics, or statistics that do not fit each other.
    """
    arrays = read_npz(path)
    if "arr_0" not in arrays and "mu" not in arrays:
        raise ValueError(f"reference: {path} has neither arr_0 nor mu (it has {', '.join(arrays) or 'nothing'})")
    pictures = from_array(arrays["arr_0"], str(path)) if "arr_0" in arrays else None
    return Reference(
        str(path),
        None if pictures is None else lambda size: pictures,
        _statistics(arrays, "mu", "sigma", path),
        _statistics(arrays, "mu_s", "sigma_s", path),
    )


def _statistics(arrays: dict[str, np.ndarray], mu: str, sigma: str, path: Path) -> Gaussian | None:
    if mu not in arrays and sigma not in arrays:
        return None
    mean, covariance = arrays.get(mu, np.zeros(0)), arrays.get(sigma, np.zeros(0))
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise ValueError(
            f"reference: {path} must hold {mu} (D,) and {sigma} (D, D), got {mean.shape}, {covariance.shape}"
        )
    return Gaussian(torch.from_numpy(mean.astype(np.float64)), torch.from_numpy(covariance.astype(np.float64)))


def write_reference(path: Path, bank: Bank, images: np.ndarray | None = None) -> None:
    """Writes ADM's reference file; the counterpart of :func:`read_reference`.

    Args:
        images: (N, H, W, C) uint8, for precision and recall.
    """
    arrays = {} if images is None else {"arr_0": images}
    for suffix, gaussian in (("", bank.gaussian), ("_s", bank.spatial)):
        if gaussian is not None:
            arrays |= {f"mu{suffix}": gaussian.mean.numpy(), f"sigma{suffix}": gaussian.covariance.numpy()}
    np.savez(path, **arrays)  # type: ignore[arg-type]


def build_bank(
    reference: Reference,
    encoder: Encoder,
    protocol: Protocol,
    size: tuple[int, int],
    *,
    cache: Path | None = None,
    batch_size: int = 64,
) -> Bank:
    """Features and statistics of a reference, from ``cache`` where this data, encoder and protocol have been before.

    Collective: processes share the work, and the first one writes the cache.

    Raises:
        ValueError: for statistics without pictures that are not of this encoder.
    """
    pictures = reference.pictures(size)
    # Statistics in a file are those of Inception, by ADM's convention.
    pool, spatial = (reference.pool, reference.spatial) if encoder.name == "inception" else (None, None)
    if pictures is None:
        if pool is None:
            raise ValueError(
                f"reference {reference.source} holds statistics of Inception features only, and the encoder is "
                f"{encoder.name}; give a reference with pictures"
            )
        none = torch.zeros(0)
        return Bank(none, none, none.long(), pool, spatial)
    positions, data = _positions(pictures.count, protocol), pictures.fingerprint()
    file = None if cache is None else cache / f"{_key(data, pictures.size, encoder, protocol, batch_size)}.safetensors"
    found = None if file is None else _load(file)
    if not all(gather(found is not None)) or found is None:
        found = _encode(pictures, positions, encoder, "sfid" in protocol.metrics, batch_size)
        if file is not None and process()[0] == 0:
            _save(found, file)
    count = len(positions)
    if spatial is None and "spatial_mean" in found:
        spatial = Gaussian(found["spatial_mean"], found["spatial_covariance"], count)
    pool = pool or Gaussian(found["mean"], found["covariance"], count)
    return Bank(found["pooled"], found["pixels"], torch.from_numpy(positions), pool, spatial, data)


def _positions(count: int, protocol: Protocol) -> np.ndarray:
    """Of the reference pictures that take part: all, or ``max_reference`` of them chosen by the seed."""
    if count <= protocol.max_reference:
        return np.arange(count)
    return np.sort(Draws(protocol.seed).permutation("evaluation/reference", count, 0)[: protocol.max_reference])


def _encode(
    pictures: Pictures, positions: np.ndarray, encoder: Encoder, spatial: bool, batch_size: int
) -> dict[str, Tensor]:
    """Features of the pictures and their statistics, by all processes together."""
    rank, world_size = process()
    extractor = Extractor(encoder, batch_size, ("spatial",) if spatial else ())
    index = torch.arange(rank, len(positions), world_size)
    for part, images in zip(index.split(batch_size), pictures.batches(positions[index].tolist(), batch_size)):
        extractor.update(images, part)
        logger.debug("reference %s: %d of %d pictures", pictures.source, extractor.count, len(index))
    seen = extractor.gathered()
    found = {"pooled": seen.pooled, "pixels": seen.pixels, **_named(Moments.of(seen.pooled).gaussian(), "")}
    return found | (_named(seen.spatial.gaussian(), "spatial_") if spatial else {})


def _named(gaussian: Gaussian, prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}mean": gaussian.mean, f"{prefix}covariance": gaussian.covariance}


def _key(data: dict[str, Any], size: tuple[int, int], encoder: Encoder, protocol: Protocol, batch_size: int) -> str:
    """One name for everything that the features depend on."""
    facts = {
        "format": _FORMAT,
        "data": data,
        "size": size,
        "encoder": encoder.fingerprint(),
        "protocol": [protocol.max_reference, protocol.seed, "sfid" in protocol.metrics],
        "batch_size": batch_size,
        "versions": [untwine.__version__, torch.__version__],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]


def _load(file: Path) -> dict[str, Tensor] | None:
    """What a cache file holds; None where it is absent or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError) as error:
        logger.warning("%s is damaged and made anew: %s", file, error)
        return None


def _save(found: dict[str, Tensor], file: Path) -> None:
    """Writes a cache file whole or not at all; a folder that cannot be written costs time, not the result."""
    from safetensors.torch import save_file

    temporary = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(found, temporary)
        temporary.replace(file)
    except OSError as error:
        logger.warning("the reference's features are not kept: %s", error)
        with suppress(OSError):
            temporary.unlink()
