"""Stage 1 of RAE (arXiv 2510.11690, section 3 and appendix): a decoder learns to invert a frozen encoder, under noise.

``L1 + perceptual + w * GAN`` with ``w = |grad of the first two| / |grad of the GAN term|`` on the decoder's last weight
(VQGAN, arXiv 2012.09841). Latents get noise ``tau u n``, u uniform in [0, 1) per sample, before normalisation, which
decoding undoes: statistics play no part here, and :func:`export` computes them over the training set.

Differs from the reference: LPIPS's weights come with no package, so that the perceptual term is the distance of
normalised features of any frozen encoder, and is not called LPIPS; schedules count steps; the discriminator sees what
the decoder makes after its update of the same step; all draws are functions of the sample counter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from untwine.codecs.rae import compute_statistics
from untwine.codecs.rae_features import FeatureMaps
from untwine.codecs.rae_model import RAE
from untwine.config import Component
from untwine.contracts import Batch, Loss
from untwine.data.base import CorruptImage, Dataset
from untwine.diffusion.draws import Draws
from untwine.encoders.base import Encoder
from untwine.training import checkpoint
from untwine.training.objectives.base import Objective, Role
from untwine.training.objectives.discriminator import Discriminator, diff_augment, hinge
from untwine.training.optim import AdamW, OptimizerConfig
from untwine.training.recipe import Recipe

_STAGES = FeatureMaps(
    encoder=Component(Encoder.kinds, "efflite0", {"side": 64}),
    sites=tuple(f"network._blocks.{i}" for i in (0, 2, 4)),
)


@dataclass(frozen=True, kw_only=True)
class Perceptual:
    """Distance of features that have unit length at each position, summed over channels, averaged over sites."""

    features: FeatureMaps = _STAGES
    scale: float = 1.0
    start_step: int = 0

    def __post_init__(self) -> None:
        if self.scale < 0 or self.start_step < 0:
            raise ValueError(f"scale and start_step must be >= 0, got {self.scale} and {self.start_step}")

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """Mean over samples and positions, for pictures (B, 3, H, W) in [0, 1]; ``b`` takes no gradient."""
        with torch.no_grad():
            targets = self.features(b)
        pairs = zip(self.features(a), targets)
        return torch.stack([(_unit(f) - _unit(g)).square().sum(1).mean() for f, g in pairs]).mean()


@dataclass(frozen=True, kw_only=True)
class Adversary:
    """The discriminator and its schedule. The official one: trained from 6/16 of the run, its term from 8/16."""

    features: FeatureMaps = _STAGES
    scale: float = 0.75
    max_weight: float = 1e4
    """of the adaptive weight"""
    train_step: int = 0
    """the discriminator is trained from this step on"""
    start_step: int = 0
    """the decoder gets its term from this step on"""
    optimizer: OptimizerConfig = field(default_factory=lambda: AdamW(lr=2e-4, betas=(0.9, 0.95)))

    def __post_init__(self) -> None:
        if self.scale < 0 or self.max_weight <= 0:
            raise ValueError(f"scale must be >= 0 and max_weight > 0, got {self.scale} and {self.max_weight}")
        if not 0 <= self.train_step <= self.start_step:
            raise ValueError(
                f"train_step must be within [0, start_step = {self.start_step}], got {self.train_step}: an untrained "
                "discriminator teaches nothing"
            )


class Reconstruction(Objective):
    """Trains a recipe's ``model: {kind: rae}``; its ``codec`` is the identity, so that samples are pictures.

    Args:
        tau: largest deviation of the noise on latents before normalisation; 0 = none.
        perceptual: null = L1 alone.
        adversary: null = no discriminator.
    """

    def __init__(
        self,
        *,
        tau: float = 0.8,
        perceptual: Perceptual | None = Perceptual(),
        adversary: Adversary | None = None,
    ) -> None:
        super().__init__()
        if tau < 0:
            raise ValueError(f"tau must be >= 0, got {tau}")
        self.tau, self.perceptual, self.adversary = tau, perceptual, adversary

    def networks(self) -> dict[str, Role]:
        if (gan := self.adversary) is None:
            return {}
        return {"discriminator": Role(partial(Discriminator, gan.features), optimizer=gan.optimizer)}

    def updates(self, step: int) -> tuple[str, ...]:
        trains = self.adversary is not None and step >= self.adversary.train_step
        return ("model", "discriminator") if trains else ("model",)

    def forward(self, networks: Mapping[str, Any], batch: Batch, *, update: str, step: int, draws: Draws) -> Loss:
        model = networks["model"]
        real = self._pictures(model, batch)
        latents = self._noisy(model.represent(real), batch, draws)
        if update == "discriminator":
            return self._discriminate(networks, latents, batch, draws)
        fake = model(latents).float()
        error = (fake - real).abs().flatten(1).mean(1)
        total, parts = error.mean(), {"l1": error.detach().mean()}
        if (p := self.perceptual) is not None and step >= p.start_step:
            distance = p.distance(fake, real)
            total, parts["perceptual"] = total + p.scale * distance, distance.detach()
        if (gan := self.adversary) is not None and step >= gan.start_step and self.training:
            scores = networks["discriminator"](diff_augment(fake * 2 - 1, draws, "decoder", batch.index))
            term = -scores.float().mean()
            weight = adaptive_weight(total, term, model.last_layer, gan.max_weight)
            parts |= {"gan": term.detach(), "gan_weight": weight}
            total = total + gan.scale * weight * term
        return Loss(total, parts, error.detach())

    def _pictures(self, model: RAE, batch: Batch) -> Tensor:
        """In [0, 1]."""
        wanted = (3, model.image_size, model.image_size)
        if tuple(batch.x0.shape[1:]) != wanted:
            raise ValueError(
                f"data: the decoder makes pictures of {wanted}, the data has {tuple(batch.x0.shape[1:])}; change "
                "data.resolution, model.patch_size or the side of the encoder, and leave the codec out"
            )
        return (batch.x0 + 1) / 2

    def _noisy(self, latents: Tensor, batch: Batch, draws: Draws) -> Tensor:
        if not self.training or self.tau == 0:
            return latents
        u = draws.uniform("rae/deviation", (1, 1, 1), batch.index, device=latents.device)
        n = draws.normal("rae/noise", latents.shape[1:], batch.index, device=latents.device)
        return latents + self.tau * u * n

    def _discriminate(self, networks: Mapping[str, Any], latents: Tensor, batch: Batch, draws: Draws) -> Loss:
        with torch.no_grad():
            fake = quantised(networks["model"](latents).float() * 2 - 1)
        pairs = ((fake, "fake"), (batch.x0, "real"))
        images = torch.cat([diff_augment(x, draws, name, batch.index) for x, name in pairs])
        scores_fake, scores_real = networks["discriminator"](images).float().chunk(2)
        loss = hinge(scores_real, scores_fake)
        return Loss(loss, {"real": scores_real.detach().mean(), "fake": scores_fake.detach().mean()})


def quantised(images: Tensor) -> Tensor:
    """Pictures in [-1, 1] clipped and rounded to the 256 levels that files have."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def adaptive_weight(loss: Tensor, gan: Tensor, weight: Tensor, max_weight: float = 1e4) -> Tensor:
    """``|d loss / d weight| / (|d gan / d weight| + 1e-6)``, clipped to [0, max_weight]; of this process's samples.

    Raises:
        ValueError: for a sharded weight, whose gradient cannot be asked for alone.
    """
    if isinstance(weight, DTensor):
        raise ValueError("train.parallel.strategy: the adaptive weight of the GAN term needs 'ddp' or 'none'")
    norms = [torch.autograd.grad(value, weight, retain_graph=True)[0].float().norm() for value in (loss, gan)]
    return (norms[0] / (norms[1] + 1e-6)).clamp(0, max_weight).detach()


def export(run: str | Path, out: str | Path, *, weights: str = "ema:0", batch_size: int = 64) -> RAE:
    """Writes the decoder of a run as the folder that ``codec: {kind: rae, path: ...}`` opens.

    The statistics of the latents are computed over the run's training set.

    Args:
        run: folder of a run under this objective.
        out: a folder that does not exist yet.
        weights: ``ema:k`` or ``raw``.

    Raises:
        ValueError: for a run of another objective, weights that it lacks, or an existing ``out``.
    """
    out, found = Path(out), checkpoint.latest(Path(run) / "checkpoints")
    if out.exists():
        raise ValueError(f"out: {out} exists; choose a new folder")
    if found is None:
        raise ValueError(f"run: {run} holds no checkpoint of a run")
    recipe = Recipe.from_dict(checkpoint.read_config(found))
    known = [*(f"ema:{k}" for k in range(len(recipe.ema))), "raw"]
    if weights not in known:
        raise ValueError(f"weights: {run} has no {weights!r} (known: {', '.join(known)})")
    model = recipe.model.build()
    if not isinstance(model, RAE):
        raise ValueError(f"run: {run} trains a {recipe.model.kind}, not an autoencoder (model: {{kind: rae}})")
    prefix = "model." if weights == "raw" else f"{weights.replace(':', '.')}."
    live = {prefix + name: p.detach() for name, p in model.named_parameters()}
    if missing := checkpoint.load_matching(found, live).reinitialised:
        raise ValueError(f"run: {found} has no complete {weights!r}; it lacks {list(missing)[:5]}")
    training_set, _ = recipe.data.build().split(recipe.train.validation, recipe.seed)
    model.set_statistics(*compute_statistics(model.represent, _batches(training_set, batch_size)))
    model.eval().save_pretrained(out)
    return model


def _batches(dataset: Dataset, batch_size: int) -> Iterator[Tensor]:
    """All pictures that can be read, in [0, 1]."""
    for start in range(0, len(dataset), batch_size):
        read = []
        for position in range(start, min(start + batch_size, len(dataset))):
            try:
                read.append(dataset.read(position))
            except CorruptImage:
                continue
        if read:
            yield (torch.stack(read) + 1) / 2


def _unit(features: Tensor) -> Tensor:
    return F.normalize(features.float(), dim=1, eps=1e-6)
