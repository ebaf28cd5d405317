"""The adversary of stage 1 of RAE (arXiv 2510.11690): small heads on frozen features (StyleGAN-T, arXiv 2301.09515).

Differs from the reference: any frozen encoder gives the features (the official one is DINO ViT-S/8, its key biases set
to zero), and the augmentation of a picture is a function of its sample counter.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from untwine.codecs.rae_features import FeatureMaps
from untwine.diffusion.draws import Draws


class Discriminator(nn.Module):
    """One score a position and site: how real the features of pictures look.

    Args:
        features: frozen, and no parameters of this module; a head for each of its sites.
    """

    def __init__(self, features: FeatureMaps) -> None:
        super().__init__()
        self.features = features
        self.heads = nn.ModuleList(_Head(shape[0]) for shape in features.shapes())

    def forward(self, images: Tensor) -> Tensor:
        """Scores (B, K) of pictures (B, 3, H, W) in [-1, 1]."""
        maps = self.features((images + 1) / 2)
        return torch.cat([head(m.flatten(2)) for head, m in zip(self.heads, maps)], dim=1)


class _Head(nn.Module):
    """1 x 1 convolution, a circular residual one of width 9, and the score; (B, C, L) -> (B, L)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.entry = _block(channels, 1)
        self.residual = _block(channels, 9)
        self.score = spectral_norm(nn.Conv1d(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.entry(x)
        x = (x + self.residual(x)) / 2**0.5
        return self.score(x).squeeze(1)


def _block(channels: int, width: int) -> nn.Sequential:
    convolution = nn.Conv1d(channels, channels, width, padding=width // 2, padding_mode="circular")
    # Batch normalisation over virtual batches of one sample.
    return nn.Sequential(
        spectral_norm(convolution), nn.GroupNorm(channels, channels, eps=1e-6), nn.LeakyReLU(0.2, inplace=True)
    )


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    """The discriminator's loss (arXiv 1705.02894), times 1/2 as in VQGAN."""
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


def diff_augment(images: Tensor, draws: Draws, name: str, index: Tensor) -> Tensor:
    """DiffAugment (arXiv 2006.10738) without cutout: brightness, saturation, contrast, a shift of up to 1/8.

    Pictures (B, 3, H, W) in [-1, 1]; what enters from outside is grey. Row b is a function of (draws, name, index[b]).
    """
    u = draws.uniform(f"augment/{name}", (5,), index, device=images.device)
    brightness, saturation, contrast = u[:, :3, None, None, None].unbind(1)
    x = images + (brightness - 0.5)
    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey) * 2 * saturation
    mean = x.mean((1, 2, 3), keepdim=True)
    x = mean + (x - mean) * (contrast + 0.5)
    return _shift(x, u[:, 3:])


def _shift(images: Tensor, u: Tensor) -> Tensor:
    """Moves each picture by up to 1/8 of its sides, as ``u`` (B, 2) in [0, 1) says."""
    margins = [round(n / 8) for n in images.shape[-2:]]
    padded = F.pad(images, (margins[1], margins[1], margins[0], margins[0])).permute(0, 2, 3, 1)
    rows, columns = (
        torch.arange(n, device=u.device) + (u[:, k, None] * (2 * m + 1)).long()
        for k, (n, m) in enumerate(zip(images.shape[-2:], margins))
    )
    batch = torch.arange(len(images), device=u.device)[:, None, None]
    return padded[batch, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
