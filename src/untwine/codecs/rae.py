"""Representation autoencoders as codecs: folders of diffusers' ``AutoencoderRAE``, and of those trained here.

A folder of the first kind has the frozen encoder in it (DINOv2 with registers, SigLIP2, MAE); one of the second kind
(:class:`~untwine.codecs.rae_model.RAE`) names an encoder of ``untwine.encoders`` and a site in it. Both resize what
they are given to the size of their encoder, and decode to one size of picture only. Encoding is deterministic: the
noise of stage 1 is the objective's, and no codec adds it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.models.autoencoders.autoencoder_rae import AutoencoderRAE
from torch import Tensor

from untwine.codecs.base import Codec, Encoding, warn_unless_unit
from untwine.codecs.rae_model import EPS, RAE
from untwine.codecs.rae_siglip import nested_siglip
from untwine.codecs.vae import _find, _hash, _load, _weights
from untwine.diffusion.draws import Draws

ENCODERS = {"dinov2_with_registers": "dinov2", "siglip_vision_model": "siglip2", "vit_mae": "mae"}
"""model_type of transformers -> encoder_type of diffusers"""
CLASSES = {"AutoencoderRAE": AutoencoderRAE, "RAE": RAE}


class RAECodec(Codec):
    """A frozen representation autoencoder. Its weights are read at the first use, and follow the device of the data.

    Args:
        path: a folder with ``config.json`` and safetensors weights; else a hub id, downloaded once.
        subfolder: of ``path``.
        dtype: of its weights and computations; latents are float32 in any case.

    Raises:
        ValueError: for a folder without such an autoencoder, or weights that do not belong to it.
    """

    def __init__(
        self, path: str, *, subfolder: str | None = None, dtype: Literal["float32", "bfloat16"] = "float32"
    ) -> None:
        self.folder = _find(path, subfolder)
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.config = _read_config(self.folder)
        self._weights = _weights(self.folder)
        self._module: Any = None
        self._latent_shape, self._image_size = geometry(self.config, self.folder)

    def model(self, device: torch.device | str = "cpu") -> Any:
        """The autoencoder itself, an ``AutoencoderRAE`` or :class:`RAE`, in evaluation mode."""
        if self._module is None:
            with nested_siglip():
                self._module = _load(CLASSES[self.config["_class_name"]], self.folder, self.dtype)
        return self._module.to(device)

    @property
    def _outer_dtype(self) -> torch.dtype:
        """Of what goes in: the encoder and the statistics of :class:`RAE` are float32 in any case."""
        return torch.float32 if self.config["_class_name"] == "RAE" else self.dtype

    @torch.no_grad()
    def encode(self, x: Tensor, *, draws: Draws | None = None, index: Tensor | None = None) -> Encoding:
        """Encodes pictures in [-1, 1]; there is nothing to draw."""
        self.latent_shape(tuple(x.shape[1:]))
        first = self._module is None
        latents = self.model(x.device).encode(((x + 1) / 2).to(self._outer_dtype)).latent.float()
        if first and len(x) > 7:
            warn_unless_unit(float(latents.std()), f"the latents of {self.folder}")
        return Encoding(latents, mean=latents)

    @torch.no_grad()
    def decode(
        self,
        latents: Tensor,
        *,
        side: dict[str, Tensor] | None = None,
        tile: int | None = None,
        chunk: int | None = None,
    ) -> Tensor:
        """Decodes; ``tile`` and ``chunk`` change nothing, since every token attends to the whole picture."""
        self.sample_shape(tuple(latents.shape[1:]))
        return self.model(latents.device).decode(latents.to(self._outer_dtype)).sample.float() * 2 - 1

    def represent(self, x: Tensor) -> Tensor:
        """Latents before normalisation, (B, C, h, w) float32, of pictures in [-1, 1]."""
        latents, model = self.encode(x).latents, self.model(x.device)
        if isinstance(model, RAE):
            return latents * model.latents_std + model.latents_mean
        return model._denormalize_latents(latents)

    def latent_shape(self, sample_shape: tuple[int, ...]) -> tuple[int, ...]:
        wanted = self.sample_shape(self._latent_shape)
        if tuple(sample_shape) != wanted:
            raise ValueError(
                f"the autoencoder in {self.folder} cannot restore samples of shape {tuple(sample_shape)}; it decodes "
                f"to {wanted}: use pictures of that size (data.resolution)"
            )
        return self._latent_shape

    def sample_shape(self, latent_shape: tuple[int, ...]) -> tuple[int, ...]:
        if tuple(latent_shape) != self._latent_shape:
            raise ValueError(f"{self.folder} decodes latents of {self._latent_shape}, got {tuple(latent_shape)}")
        return (3, self._image_size, self._image_size)

    def fingerprint(self) -> dict[str, Any]:
        config = {k: v for k, v in self.config.items() if not k.startswith("_")}
        return {
            "class": self.config["_class_name"],
            "config": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest(),
            "weights": _hash(self._weights),
            "dtype": str(self.dtype).removeprefix("torch."),
        }


@torch.no_grad()
def compute_statistics(represent: Callable[[Tensor], Tensor], batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """(mean, population variance) of latents per channel and position, exact, float64, (C, h, w) each.

    For :func:`set_statistics`. The official statistics are running averages of momentum 0.1 over batches, so that
    their last ten batches decide; these weigh every sample alike.

    Args:
        represent: pictures -> latents before normalisation, such as :meth:`RAECodec.represent`.
        batches: pictures (B, 3, H, W), as ``represent`` takes them.

    Raises:
        ValueError: without any picture.
    """
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for images in batches:
        z = represent(images).double().cpu()
        count, total, squares = count + len(z), total + z.sum(0), squares + z.square().sum(0)
    if not count:
        raise ValueError("batches holds no pictures; statistics need at least one, and better thousands")
    mean = total / count
    return mean, (squares / count - mean.square()).clamp(min=0)


def set_statistics(model: AutoencoderRAE | RAE, mean: Tensor | None, var: Tensor | None) -> None:
    """Normalises latents by ``(z - mean) / sqrt(var + 1e-5)`` from now on; ``save_pretrained`` keeps it.

    ``AutoencoderRAE`` adds 1e-5 to the deviation instead, so that it gets ``sqrt(var + 1e-5) - 1e-5``.

    Raises:
        ValueError: for another shape than that of the latents.
    """
    if isinstance(model, RAE):
        return model.set_statistics(mean, var)
    shape, _ = geometry(model.config, Path(type(model).__name__))
    given = {
        "latents_mean": mean,
        "latents_std": None if var is None else (var.double() + EPS).sqrt() - EPS,
    }
    for name, value in given.items():
        if value is None:
            continue
        if tuple(value.shape) != shape:
            raise ValueError(f"{name}: statistics must have shape {shape}, got {tuple(value.shape)}")
        model.register_buffer(f"_{name}", value.float().to(model.device))
        model.register_to_config(**{name: value.float().tolist()})
    return None


def to_diffusers(decoder: RAE, encoder: str | Path) -> AutoencoderRAE:
    """The ``AutoencoderRAE`` of an official decoder and the encoder that it is for.

    Args:
        decoder: with its statistics, as ``untwine.from_official("rae-decoder", ...)`` returns it.
        encoder: folder of a DINOv2 with registers, SigLIP(2) vision or MAE checkpoint of transformers.

    Raises:
        ValueError: for another encoder, or one whose width is not that of the latents.
    """
    from transformers import AutoConfig, AutoModel

    folder = Path(encoder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"encoder: {folder} has no config.json of a transformers checkpoint")
    told = AutoConfig.from_pretrained(folder, local_files_only=True)
    told = getattr(told, "vision_config", told)
    if told.model_type not in ENCODERS or told.hidden_size != decoder.config.latent_shape[0]:
        raise ValueError(
            f"encoder: {folder} is a {told.model_type} of width {told.hidden_size}; the decoder needs one of "
            f"{', '.join(ENCODERS)} of width {decoder.config.latent_shape[0]}"
        )
    c, d = decoder.config, decoder.decoder
    with nested_siglip():
        model = AutoencoderRAE(
            encoder_type=ENCODERS[told.model_type],
            encoder_hidden_size=told.hidden_size,
            encoder_patch_size=told.patch_size,
            encoder_num_hidden_layers=told.num_hidden_layers,
            encoder_input_size=told.patch_size * c.latent_shape[1],
            decoder_hidden_size=c.hidden_size,
            decoder_num_hidden_layers=c.depth,
            decoder_num_attention_heads=c.num_heads,
            decoder_intermediate_size=c.mlp_size or 4 * c.hidden_size,
            patch_size=c.patch_size,
            encoder_norm_mean=list(c.pixel_mean),
            encoder_norm_std=list(c.pixel_std),
        )
    if not torch.allclose(model.decoder.decoder_pos_embed, d.decoder_pos_embed):  # type: ignore[arg-type]
        raise ValueError(
            f"decoder: diffusers rebuilds the positions of 16 x 16 patches only, this one has {c.num_patches}; use a "
            "published decoder, or keep it as RAE"
        )
    model.decoder.load_state_dict(d.state_dict())
    weights = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    _fill_encoder(model.encoder, getattr(weights, "vision_model", weights).state_dict(), folder)
    set_statistics(model, decoder.latents_mean, decoder.latents_std.double().square() - EPS)
    return model.eval().requires_grad_(False)


def _fill_encoder(encoder: Any, weights: dict[str, Tensor], folder: Path) -> None:
    """Weights of transformers without the affine part of the last norm, which RAE's encoders do not have."""
    wanted = encoder.state_dict()
    prefix = "vision_model." if all(name.startswith("vision_model.") for name in wanted) else ""
    given = {prefix + name.removeprefix(prefix): value for name, value in weights.items()}
    if wrong := [name for name, value in wanted.items() if name not in given or given[name].shape != value.shape]:
        raise ValueError(f"encoder: {folder} does not fit AutoencoderRAE; it lacks {wrong[:5]} of the same shape")
    encoder.load_state_dict({name: given[name] for name in wanted})


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        name = config["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'config.json'} is damaged, or is not of a diffusers model: {error}") from error
    if name not in CLASSES:
        raise ValueError(f"codec.path: {folder} holds a {name}, not one of {', '.join(CLASSES)}; try codec.kind: vae")
    return config


def geometry(config: Any, where: Path) -> tuple[tuple[int, int, int], int]:
    """(shape of the latents, side of the pictures) of an autoencoder's config."""
    try:
        if "latent_shape" in config:
            channels, height, width = config["latent_shape"]
            return (channels, height, width), config["patch_size"] * math.isqrt(config["num_patches"])
        side = config["encoder_input_size"] // config["encoder_patch_size"]
        return (config["encoder_hidden_size"], side, side), config["patch_size"] * side
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{where}: its config does not tell the shape of the latents: {error!r}") from error
