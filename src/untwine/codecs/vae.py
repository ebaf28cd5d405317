"""Variational and other autoencoders of diffusers as codecs.

Any class of diffusers with ``encode(x)`` -> ``latent_dist`` (AutoencoderKL and its kin, QwenImage, Wan, HunyuanVideo,
CogVideoX, LTX), ``latents`` (AutoencoderTiny, VQModel) or ``latent`` (AutoencoderDC), and ``decode(z)`` -> ``sample``.
What shapes it takes is asked of the network itself, run on tensors without memory. Networks of images take videos frame
by frame; networks of videos take an image as one frame.

Normalised latents are ``(z - mean) / std`` per channel. Without options the statistics are those in the config or the
weights of the autoencoder: ``latents_mean``, ``latents_std``, ``scaling_factor``, ``shift_factor``, as its diffusers
pipelines use them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from torch import Tensor, nn

from untwine.codecs.base import Codec, Encoding, warn_unless_unit
from untwine.codecs.tiling import decode_frames, decode_tiles
from untwine.diffusion.draws import Draws

_WEIGHTS = "diffusion_pytorch_model.safetensors"
_NORMALISED_BY = "scaling_factor", "latents_mean"


class VAECodec(Codec):
    """A frozen autoencoder of diffusers. Its weights are read at the first use, and follow the device of the data.

    A saved pipeline or checkpoint names its autoencoder by these options, and does not contain it: give an absolute
    path or a hub id where the folder will be used from elsewhere.

    Args:
        path: a folder with ``config.json`` and safetensors weights; else a hub id, downloaded once.
        subfolder: of ``path``; ``vae`` in a saved pipeline.
        dtype: of its weights and computations; latents are float32 in any case.
        mean: per channel (or one for all) of latents before normalisation; with ``std``, instead of the config's.
        std: likewise.

    Raises:
        ValueError: for a folder without such a model, weights that do not belong to it, or unknown normalisation.
    """

    def __init__(
        self,
        path: str,
        *,
        subfolder: str | None = None,
        dtype: Literal["float32", "bfloat16"] = "float32",
        mean: tuple[float, ...] | None = None,
        std: tuple[float, ...] | None = None,
    ) -> None:
        if (mean is None) != (std is None) or (std is not None and not all(s > 0 for s in std)):
            raise ValueError(f"mean and std must be given together, std > 0; got mean={mean}, std={std}")
        self.folder = _find(path, subfolder)
        self.dtype: torch.dtype = getattr(torch, dtype)
        self._skeleton = _skeleton(self.folder)
        self._given = (mean, std) if mean is not None and std is not None else None
        self._takes_frames = any(p.ndim == 5 for p in self._skeleton.parameters())
        self.causal_time = self._takes_frames  # type: ignore[misc]
        self._weights = _weights(self.folder)
        self._module: Any = None
        self._shapes: dict[tuple[int, ...], tuple[int, ...]] = {}
        if self._given is None and not any(_setting(self._skeleton, name) is not None for name in _NORMALISED_BY):
            raise ValueError(
                f"{self.folder}: the config of this {self._name} does not say how its latents are normalised; give "
                "codec.mean and codec.std"
            )

    @torch.no_grad()
    def encode(self, x: Tensor, *, draws: Draws | None = None, index: Tensor | None = None) -> Encoding:
        self.latent_shape(tuple(x.shape[1:]))
        first = self._module is None
        vae = self._vae(x.device)
        mean, *std = (part.float() for part in self._posterior(vae, x.to(self.dtype)))
        shift, scale = self._statistics(mean)
        encoding = Encoding.drawn((mean - shift) / scale, std[0] / scale if std else None, draws, index)
        if first and len(x) > 7:
            warn_unless_unit(float(encoding.latents.std()), f"the latents of {self.folder}")
        return encoding

    @torch.no_grad()
    def decode(
        self,
        latents: Tensor,
        *,
        side: dict[str, Tensor] | None = None,
        tile: int | None = None,
        chunk: int | None = None,
    ) -> Tensor:
        """Decodes; ``tile`` holds for every network, ``chunk`` for videos through a network of images.

        Networks of videos bound the frames they hold by themselves, through caches that a cut would break.
        """
        vae = self._vae(latents.device)
        shift, scale = self._statistics(latents)
        z = (latents.float() * scale + shift).to(self.dtype)
        frames = None if self._takes_frames or z.ndim == 4 else chunk
        run = partial(self._decode, vae)
        return decode_frames(lambda part: decode_tiles(run, part, tile), z, frames).float()

    def latent_shape(self, sample_shape: tuple[int, ...]) -> tuple[int, ...]:
        shape = tuple(sample_shape)
        if shape not in self._shapes:
            latent = self._ask(lambda x: self._posterior(self._skeleton, x)[0], shape, "samples")
            back = self.sample_shape(latent)
            if back != shape:
                raise ValueError(f"{self._name} cannot restore samples of shape {shape}; the nearest it can is {back}")
            self._shapes[shape] = latent
        return self._shapes[shape]

    def sample_shape(self, latent_shape: tuple[int, ...]) -> tuple[int, ...]:
        return self._ask(partial(self._decode, self._skeleton), tuple(latent_shape), "latents")

    def fingerprint(self) -> dict[str, Any]:
        config = {k: v for k, v in self._skeleton.config.items() if not k.startswith("_")}
        digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
        mean, std = self._normalisation()
        return {
            "class": self._name,
            "config": digest.hexdigest(),
            "weights": _hash(self._weights),
            "dtype": str(self.dtype).removeprefix("torch."),
            "mean": list(mean),
            "std": list(std),
        }

    @property
    def _name(self) -> str:
        return type(self._skeleton).__name__

    def _vae(self, device: torch.device) -> Any:
        if self._module is None:
            self._module = _load(type(self._skeleton), self.folder, self.dtype)
        if next(self._module.parameters()).device != device:
            self._module.to(device)
        return self._module

    def _normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """(mean, std) per channel, or one value each for all channels."""
        if self._given is not None:
            return self._given
        mean, std = (_setting(self._skeleton, name) for name in ("latents_mean", "latents_std"))
        if isinstance(mean, Tensor):  # buffers: LTX keeps its statistics with the weights
            vae = self._vae(torch.device("cpu")) if self._module is None else self._module
            mean, std = vae.latents_mean.tolist(), vae.latents_std.tolist()
        factor = _setting(self._skeleton, "scaling_factor") or 1.0
        shift = _setting(self._skeleton, "shift_factor") or 0.0
        return tuple(mean or [shift]), tuple(s / factor for s in std or [1.0])

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and std, broadcast over (B, C, *grid)."""
        mean, std = self._normalisation()
        if not {len(mean), len(std)} <= {1, like.shape[1]}:
            raise ValueError(
                f"codec.mean and codec.std must have 1 or {like.shape[1]} values, as the latents of {self._name} have "
                f"channels; got {len(mean)} and {len(std)}"
            )
        view = (1, -1, *([1] * (like.ndim - 2)))
        return tuple(torch.tensor(v, device=like.device).view(view) for v in (mean, std))  # type: ignore[return-value]

    def _posterior(self, vae: Any, x: Tensor) -> tuple[Tensor, ...]:
        """(mean, deviation), or (latents,) of a deterministic encoder, before normalisation."""
        encoded = vae.encode(self._fold(x))
        if hasattr(encoded, "latent_dist"):
            parts = encoded.latent_dist.mean, encoded.latent_dist.std
        else:
            parts = (encoded.latents if hasattr(encoded, "latents") else encoded.latent,)
        return tuple(self._unfold(part, x) for part in parts)

    def _decode(self, vae: Any, z: Tensor) -> Tensor:
        return self._unfold(vae.decode(self._fold(z)).sample, z)

    def _fold(self, x: Tensor) -> Tensor:
        """(B, C, H, W) or (B, C, T, H, W) as the network takes it: an image as one frame, or a video as images."""
        if (x.ndim == 5) == self._takes_frames:
            return x
        return x.unsqueeze(2) if self._takes_frames else x.transpose(1, 2).flatten(0, 1)

    def _unfold(self, y: Tensor, x: Tensor) -> Tensor:
        """Undoes :meth:`_fold` of ``x`` on what the network returned."""
        if (x.ndim == 5) == self._takes_frames:
            return y
        return y.squeeze(2) if self._takes_frames else y.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)

    @torch.no_grad()
    def _ask(self, network: Callable[[Tensor], Tensor], shape: tuple[int, ...], what: str) -> tuple[int, ...]:
        """The shape that the network makes of one sample, found on tensors without memory."""
        if len(shape) not in (3, 4):
            raise ValueError(f"{what} must be (C, H, W) or (C, T, H, W), got {shape}")
        try:
            return tuple(network(torch.empty((1, *shape), device="meta")).shape[1:])
        except Exception as error:  # whatever a network raises for a shape that it cannot take
            channels = self._skeleton.config.get("in_channels", 3)
            hint = f"; it encodes {channels} channels" if what == "samples" and shape[0] != channels else ""
            raise ValueError(f"{self._name} cannot take {what} of shape {shape}{hint}: {error}") from error


def _setting(vae: Any, name: str) -> Any:
    """From the config, or else a buffer of that name."""
    value = vae.config.get(name)
    return getattr(vae, name, None) if value is None and name in dict(vae.named_buffers()) else value


def _find(path: str, subfolder: str | None) -> Path:
    """The local folder: ``path`` itself, else the snapshot of a hub repository, from the cache if it is there."""
    root = Path(path).expanduser()
    if not root.is_dir():
        root = _download(path, subfolder)
    folder = root / (subfolder or "")
    if (folder / "config.json").is_file():
        return folder
    inner = sorted(file.parent.name for file in folder.glob("*/config.json")) if folder.is_dir() else []
    hint = f"; its subfolders with one: {', '.join(inner)} (codec.subfolder)" if inner else ""
    raise ValueError(f"codec.path: {folder} has no config.json of an autoencoder{hint}")


def _download(path: str, subfolder: str | None) -> Path:
    from huggingface_hub import snapshot_download

    owner, _, name = path.partition("/")
    if not owner or not name or "/" in name or owner[0] in ".~" or Path(owner).exists():
        raise ValueError(f"codec.path must be a folder or a hub id owner/name, got {path!r}")
    prefix = f"{subfolder}/" if subfolder else ""
    wanted = [prefix + "config.json", prefix + _WEIGHTS, prefix + "diffusion_pytorch_model-*.safetensors"]
    wanted.append(prefix + f"{_WEIGHTS}.index.json")
    for offline in (True, False):
        try:
            root = Path(snapshot_download(path, allow_patterns=wanted, local_files_only=offline))
        except Exception as error:  # whatever the hub's client raises without a network, a right or a repository
            if not offline:
                raise ValueError(
                    f"codec.path {path!r} is no local folder, and the hub did not give it: {str(error).splitlines()[0]}"
                ) from error
            continue
        if not offline or any((root / prefix).glob(f"{_WEIGHTS[:-12]}*")):
            return root
    raise ValueError(f"codec.path {path!r} cannot be found")


def _skeleton(folder: Path) -> Any:
    """The autoencoder of a folder without its weights, on the meta device."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        name = config["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'config.json'} is damaged, or is not of a diffusers model: {error}") from error
    cls = getattr(diffusers, str(name), None)
    if not (isinstance(cls, type) and issubclass(cls, nn.Module) and hasattr(cls, "encode") and hasattr(cls, "decode")):
        raise ValueError(f"{folder} holds a {name}, which is no autoencoder of diffusers {diffusers.__version__}")
    try:
        with torch.device("meta"):
            return cls.from_config(config).eval()  # type: ignore[attr-defined]
    except Exception as error:  # whatever the class raises for options that it lacks or does not know
        raise ValueError(f"{folder / 'config.json'} is no config of a {name}: {error}") from error


def _weights(folder: Path) -> list[Path]:
    """The safetensors files of a model folder."""
    index = folder / f"{_WEIGHTS}.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        names = [_WEIGHTS]
    if missing := [name for name in names if not (folder / name).is_file()]:
        pickles = ", ".join(sorted(file.name for file in folder.glob("*.bin")))
        hint = f"; {pickles} may be a pickle, which is never loaded: save the model with safetensors" if pickles else ""
        raise ValueError(f"codec.path: {folder} lacks {', '.join(missing)}{hint}")
    return [folder / name for name in names]


def _load(cls: Any, folder: Path, dtype: torch.dtype) -> Any:
    """The model, frozen; strictly: diffusers would fill missing parameters with random numbers."""
    try:
        vae, loading = cls.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, dtype=dtype, output_loading_info=True
        )
    except Exception as error:  # whatever a damaged file makes the readers raise
        raise ValueError(f"{folder} cannot be loaded as a {cls.__name__}: {str(error).splitlines()[0]}") from error
    if wrong := {kind.removesuffix("_keys"): names[:5] for kind, names in loading.items() if names}:
        raise ValueError(f"the parameters in {folder} are not those of its {cls.__name__}: {wrong}")
    return vae.eval().requires_grad_(False)


def _hash(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()
