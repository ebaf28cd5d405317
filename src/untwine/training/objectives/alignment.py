"""Representation alignment (REPA, arXiv 2410.06940): hidden tokens are pulled towards features of the clean image.

``batch.features[name]`` (B, N, z) holds the features of the clean image, of a given frozen encoder or whatever the
batch brings; a projector maps the tokens after one block to them. Published forms: REPA's MLP of three layers and
``-cos``, which DDT (arXiv 2504.05741) writes as ``1 - cos``; DiffusionBench's (arXiv 2606.24888) one linear layer and
a mean squared error.

Differs from the references: the projector belongs to this term, not to the network, so that exported weights are the
backbone's alone; in evaluation without features the term is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from untwine.codecs.rae_features import FeatureMaps
from untwine.contracts import Output
from untwine.data.features import names_of
from untwine.training.objectives.base import PathDraw, Term, parts_of, projector_of, width_at


class Alignment(Term):
    """The mean over encoders and tokens of ``-cos(z, target)``, or of the squared error.

    Args:
        features: the frozen encoder and its sites; their widths, and the model's, are found out. One projector each.
        targets: instead, name in ``batch.features`` -> width of its tokens, for batches that bring their own.
        width: of the tokens at ``site``; None = the model's.
        site: whose output is projected, 0-based: REPA's ``encoder_depth`` 8 is ``blocks.7``.
        metric: "cosine", within [-1, 1], or "mse".
        projector: "mlp" of three layers with SiLU, or "linear".
        projector_width: of the MLP's hidden layers.
        class_token: whether ``batch.features["class_token"]`` (B, z) stands before the targets, as the token that is
            diffused with the image stands before the image's (REG).
        scale: REPA's 0.5.
    """

    def __init__(
        self,
        *,
        features: FeatureMaps | None = None,
        targets: dict[str, int] | None = None,
        width: int | None = None,
        site: str = "blocks.7",
        metric: Literal["cosine", "mse"] = "cosine",
        projector: Literal["mlp", "linear"] = "mlp",
        projector_width: int = 2048,
        class_token: bool = False,
        scale: float = 0.5,
    ) -> None:
        super().__init__()
        if bool(targets) == (features is not None):
            raise ValueError(
                f"targets must name features of the batch, or features a frozen encoder, one of both; got {targets} "
                f"and {features}"
            )
        if min(width or 1, projector_width, *(targets or {}).values()) < 1:
            raise ValueError(f"targets must name features of width >= 1, got {targets} for tokens of width {width}")
        self.scale, self.sites, self.metric, self.class_token = scale, (site,), metric, class_token
        self.features, self.widths = features, targets or {}
        self.targets = tuple(self.widths) if features is None else names_of(features)
        self.hidden = (projector_width, projector_width) if projector == "mlp" else ()
        self.projectors = nn.ModuleList()
        if width is not None and self.widths:
            self._project(width)

    def encoders(self) -> tuple[FeatureMaps, ...]:
        return () if self.features is None else (self.features,)

    def bind(self, model: nn.Module) -> None:
        if not self.projectors:
            if self.features is not None:
                with unset_fake_temporarily():  # a plan is made without memory, but the encoder has real weights
                    self.widths = dict(zip(self.targets, (channels for channels, *_ in self.features.shapes())))
            self._project(width_at(model, self.sites[0]))

    def _project(self, width: int) -> None:
        self.projectors.extend(projector_of((width, *self.hidden, z)) for z in self.widths.values())

    def forward(self, draw: PathDraw, output: Output, networks: Mapping[str, Any]) -> dict[str, Tensor]:
        missing = {*self.targets, *(["class_token"] if self.class_token else [])} - draw.features.keys()
        if missing and not self.training:
            return {}
        if missing:
            raise ValueError(f"alignment: batch.features lacks {sorted(missing)}; it has {sorted(draw.features)}")
        tokens, image = output.features[self.sites[0]], parts_of(networks["model"], draw.x_t)["image"]
        patch = networks["model"].config.patch_size
        grid = image.shape[2] // patch, image.shape[3] // patch
        found = [self._distance(tokens, draw, grid, *pair) for pair in zip(self.targets, self.projectors)]
        return {"alignment": torch.stack(found).mean(0)}

    def _distance(
        self, tokens: Tensor, draw: PathDraw, grid: tuple[int, int], name: str, projector: nn.Module
    ) -> Tensor:
        """(B,) from the projected tokens to one encoder's features; tokens of the condition follow and are left out."""
        target = _on_grid(draw.features[name].float(), grid, name)
        if self.class_token:
            target = torch.cat((draw.features["class_token"].float()[:, None], target), 1)
        z = projector(tokens[:, : target.shape[1]]).float()
        if self.metric == "mse":
            return (z - target).square().flatten(1).mean(1)
        return -(F.normalize(z, dim=-1) * F.normalize(target, dim=-1)).sum(-1).mean(1)


def _on_grid(target: Tensor, grid: tuple[int, int], name: str) -> Tensor:
    """Features (B, N, z) of a square grid on the backbone's, bilinearly where they differ, as DDT does."""
    if target.shape[1] == grid[0] * grid[1]:
        return target
    side = isqrt(target.shape[1])
    if side**2 != target.shape[1]:
        raise ValueError(
            f"alignment: {name!r} has {target.shape[1]} tokens, neither the {grid[0]} x {grid[1]} of the backbone nor "
            "a square; leave out tokens that stand for no place"
        )
    square = target.transpose(1, 2).unflatten(2, (side, side))
    return F.interpolate(square, grid, mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)
