"""The representation autoencoder RAE (Zheng et al., arXiv 2510.11690): a frozen encoder and a trained ViT decoder.

``z = LayerNorm(encoder(x))`` per position without affine weights, ``x = decoder(z)``; diffusion models see
``(z - mean) / std`` with statistics per position and channel. The decoder is diffusers' ``RAEDecoder`` with the
official table of positions (diffusers' own is the official one for 16 x 16 patches only). A patch twice as large as
the encoder's makes the upsampling decoder: twice the resolution from the same latents.

Differs from the reference: any frozen network with a spatial map can be the encoder. Where its last LayerNorm has
affine weights they are not taken out, but normalised away by a second LayerNorm; diffusers' ``AutoencoderRAE`` takes
them out (:func:`untwine.codecs.rae.to_diffusers`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Self

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.autoencoder_rae import RAEDecoder
from diffusers.models.autoencoders.vae import DecoderOutput, EncoderOutput
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from untwine.codecs.rae_features import FeatureMaps
from untwine.codecs.rae_official import STATISTICS, infer_official, rename_official
from untwine.config import from_dict, to_dict

EPS = 1e-5
"""added to the variance of latents, as the official code does; diffusers' AutoencoderRAE adds it to the deviation"""
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class RAE(ModelMixin, ConfigMixin):
    """A frozen encoder, statistics of its latents, and the decoder, whose parameters are all there are.

    Args:
        representation: the encoder and the one site of it that is decoded; None for a decoder alone.
        latent_shape: (C, h, w) of the latents; None asks the encoder.
        num_patches: of the decoder, a square number; None = h * w. Other numbers of tokens are resized bilinearly.
        patch_size: side in pixels of what the decoder makes of one of its patches.
        hidden_size: width of the decoder.
        depth: its layers.
        num_heads: its heads.
        mlp_size: width of its MLPs; None = 4 * hidden_size.
        layer_norm_eps: of its norms.
        pixel_mean: per channel; the decoder's output times ``pixel_std`` plus this is the picture in [0, 1].
        pixel_std: likewise.
        encoder_sha256: of the encoder's weights, where they are known; those in use must have it.

    Raises:
        ValueError: for a map that is not square, or sizes that do not fit together.
    """

    _no_split_modules = ("ViTMAELayer",)
    _supports_gradient_checkpointing = False
    _keep_in_fp32_modules = ["latents_mean", "latents_std"]  # noqa: RUF012 - diffusers wants a list
    config: Any
    latents_mean: Tensor
    latents_std: Tensor

    @register_to_config
    def __init__(
        self,
        *,
        representation: FeatureMaps | None = FeatureMaps(),  # noqa: B008 - a frozen value
        latent_shape: tuple[int, int, int] | None = None,
        num_patches: int | None = None,
        patch_size: int = 8,
        hidden_size: int = 192,
        depth: int = 6,
        num_heads: int = 6,
        mlp_size: int | None = None,
        layer_norm_eps: float = 1e-12,
        pixel_mean: tuple[float, float, float] = IMAGENET_MEAN,
        pixel_std: tuple[float, float, float] = IMAGENET_STD,
        encoder_sha256: str | None = None,
    ) -> None:
        super().__init__()
        if isinstance(representation, Mapping):  # out of a config.json
            representation = from_dict(FeatureMaps, representation, "representation")
        self.representation = representation
        shape = latent_shape or self._ask_encoder()
        if representation is not None and encoder_sha256 is None:
            encoder_sha256 = representation.network.weights_sha256
        patches = num_patches or shape[1] * shape[2]
        _check_sizes(shape, patches, hidden_size, num_heads)
        self.register_to_config(
            representation=None if representation is None else to_dict(representation),
            latent_shape=tuple(shape),
            num_patches=patches,
            encoder_sha256=encoder_sha256,
        )
        self.decoder = RAEDecoder(
            hidden_size=shape[0],
            decoder_hidden_size=hidden_size,
            decoder_num_hidden_layers=depth,
            decoder_num_attention_heads=num_heads,
            decoder_intermediate_size=mlp_size or 4 * hidden_size,
            num_patches=patches,
            patch_size=patch_size,
            image_size=patch_size * math.isqrt(patches),
            layer_norm_eps=layer_norm_eps,
        )
        self.decoder.decoder_pos_embed = position_table(hidden_size, patches)
        self.register_buffer("latents_mean", torch.zeros(*shape))
        self.register_buffer("latents_std", torch.ones(*shape))

    def forward(self, latents: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1], not clipped, of latents (B, C, h, w) before normalisation."""
        channels, height, width = self.config.latent_shape
        if latents.ndim != 4 or latents.shape[1] != channels or latents.shape[2] != latents.shape[3]:
            raise ValueError(
                f"latents must be square, such as (B, {channels}, {height}, {width}), got {tuple(latents.shape)}"
            )
        tokens = latents.flatten(2).transpose(1, 2).to(self.last_layer.dtype)
        pixels = self.decoder.unpatchify(self.decoder(tokens).logits)
        mean, std = (pixels.new_tensor(v).view(1, 3, 1, 1) for v in (self.config.pixel_mean, self.config.pixel_std))
        return pixels * std + mean

    @torch.no_grad()
    def represent(self, images: Tensor) -> Tensor:
        """Latents (B, C, h, w) before normalisation, of pictures (B, 3, H, W) in [0, 1]; float32.

        Raises:
            ValueError: where there is no encoder, or one with other weights or another map than the decoder is for.
        """
        if self.representation is None:
            raise ValueError(
                "this is a decoder without its encoder; put them together with untwine.codecs.rae.to_diffusers"
            )
        if (found := self.representation.network.weights_sha256) != self.config.encoder_sha256:
            raise ValueError(
                f"representation.encoder has weights of sha256 {found}, and the decoder was trained on those of "
                f"{self.config.encoder_sha256}; use these"
            )
        features = self.representation(images.float())[0]
        if features.shape[1:] != torch.Size(self.config.latent_shape):
            raise ValueError(
                f"latent_shape is {tuple(self.config.latent_shape)}, but the encoder makes {tuple(features.shape[1:])} "
                f"of pictures of {tuple(images.shape[1:])}"
            )
        z = F.layer_norm(features.permute(0, 2, 3, 1), features.shape[1:2], eps=1e-6)
        return z.permute(0, 3, 1, 2).contiguous()

    def encode(self, images: Tensor) -> EncoderOutput:
        """Normalised latents, as the autoencoders of diffusers return them."""
        return EncoderOutput(latent=(self.represent(images) - self.latents_mean) / self.latents_std)

    def decode(self, latents: Tensor) -> DecoderOutput:
        """Pictures of normalised latents."""
        return DecoderOutput(sample=self(latents * self.latents_std + self.latents_mean))

    @torch.no_grad()
    def set_statistics(self, mean: Tensor | None, var: Tensor | None) -> None:
        """Takes mean and population variance of the latents, (C, h, w) each; the deviation is ``sqrt(var + 1e-5)``."""
        for name, value in (("mean", mean), ("var", var)):
            if value is not None and value.shape != self.latents_mean.shape:
                raise ValueError(
                    f"{name} must have the shape of the latents, {tuple(self.latents_mean.shape)}, got "
                    f"{tuple(value.shape)}"
                )
        if mean is not None:
            self.latents_mean.copy_(mean)
        if var is not None:
            self.latents_std.copy_((var.double() + EPS).sqrt())

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight whose gradients balance the terms of stage 1."""
        return self.decoder.decoder_pred.weight  # type: ignore[return-value]

    @property
    def image_size(self) -> int:
        """Side in pixels of the decoded pictures."""
        return self.decoder.image_size

    @classmethod
    def is_official(cls, state_dict: Mapping[str, Tensor], system: str | None = None) -> bool:
        """Whether these are weights of an official decoder."""
        return "trainable_cls_token" in state_dict and "decoder_embed.weight" in state_dict

    @classmethod
    def infer_official(
        cls, state_dict: Mapping[str, Tensor], given: Mapping[str, Any], *, system: str | None = None
    ) -> dict[str, Any]:
        """The official decoder's configuration, read off the weights where ``given`` is silent."""
        return infer_official(state_dict, given)

    @classmethod
    def from_official(
        cls, state_dict: Mapping[str, Tensor], config: Mapping[str, Any], *, system: str | None = None
    ) -> Self:
        """The official decoder, without an encoder.

        Args:
            state_dict: of the decoder; with the entries ``mean`` and ``var`` of ``stat.pt``, if there is one.
            config: of the decoder (``config.json``) and ``num_patches``; what is left out is read off the weights.

        Raises:
            ValueError: for weights or statistics that do not fit.
        """
        c = infer_official(state_dict, config)
        mean, var = (state_dict.get(name) for name in STATISTICS)
        side = math.isqrt(c["num_patches"])
        grids = [tuple(value.shape[1:]) for value in (mean, var) if value is not None and value.ndim == 3]
        model = cls(
            representation=None,
            latent_shape=(c["hidden_size"], *(grids or [(side, side)])[0]),  # type: ignore[arg-type]
            num_patches=c["num_patches"],
            patch_size=c["patch_size"],
            hidden_size=c["decoder_hidden_size"],
            depth=c["decoder_num_hidden_layers"],
            num_heads=c["decoder_num_attention_heads"],
            mlp_size=c["decoder_intermediate_size"],
            layer_norm_eps=c["layer_norm_eps"],
        )
        model.decoder.load_state_dict(rename_official(state_dict, model.decoder))
        model.set_statistics(mean, var)
        return model

    def _ask_encoder(self) -> tuple[int, int, int]:
        if self.representation is None:
            raise ValueError("latent_shape: give it where there is no representation to ask")
        if len(self.representation.sites) != 1:
            raise ValueError(f"representation.sites must name one place, got {self.representation.sites}")
        return self.representation.shapes()[0]


def position_table(hidden_size: int, num_patches: int) -> Tensor:
    """The fixed table (1, 1 + N, D) of MAE decoders: sines and cosines of column and row, zero for the class token.

    Positions count patches. That of diffusers' ``RAEDecoder`` stretches positions to a grid of 16 x 16 (``base_size``).
    """
    side = math.isqrt(num_patches)
    table = get_2d_sincos_pos_embed(hidden_size, side, cls_token=True, extra_tokens=1, base_size=side, output_type="pt")
    return table[None].float()


def _check_sizes(shape: tuple[int, ...], patches: int, hidden_size: int, num_heads: int) -> None:
    if len(shape) != 3 or shape[1] != shape[2] or math.isqrt(patches) ** 2 != patches:
        raise ValueError(
            f"latent_shape must be (C, n, n) and num_patches a square number, got {tuple(shape)} and {patches}"
        )
    if hidden_size % num_heads or hidden_size % 4:
        raise ValueError(f"hidden_size must be a multiple of num_heads {num_heads} and of 4, got {hidden_size}")
