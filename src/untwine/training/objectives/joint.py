"""Further predictions of the same call: the class token diffused with the image, and the cheaper second prediction.

REG (arXiv 2507.01467): the clean class token of a frozen encoder, ``batch.features["class_token"]`` (B, z), is packed
with the image into one sample, so that path, solver and guidance carry it along. Internal guidance (DiffusionBench,
arXiv 2606.24888) extrapolates from a prediction of fewer blocks, which needs a loss of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from untwine.codecs.rae_features import POOLED, FeatureMaps
from untwine.contracts import Output
from untwine.training.objectives.base import PathDraw, Term, parts_of, squared_error


class ClassToken(Term):
    """Mean squared error of the class token's prediction, at the time of the image.

    Args:
        features: names the frozen encoder whose one vector a picture is the token, whatever its sites; None where the
            batches bring a token of their own.
    """

    def __init__(self, *, features: FeatureMaps | None = None, scale: float = 0.03) -> None:
        super().__init__()
        self.features, self.scale = features, scale

    def encoders(self) -> tuple[FeatureMaps, ...]:
        return () if self.features is None else (replace(self.features, sites=(POOLED,)),)

    def forward(self, draw: PathDraw, output: Output, networks: Mapping[str, Any]) -> dict[str, Tensor]:
        if "token" not in parts_of(networks["model"], draw.x_t):
            raise ValueError("class_token needs a model that diffuses one: a ddt_head with class_token_dim > 0")
        return {"class_token": squared_error(output.sample, draw, networks["model"], "token")}


class BasePrediction(Term):
    """Mean squared error of the second prediction of the image, ``extra["base"]``."""

    def __init__(self, *, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, draw: PathDraw, output: Output, networks: Mapping[str, Any]) -> dict[str, Tensor]:
        if "base" not in output.extra:
            raise ValueError("base_prediction needs a model with a second prediction: a ddt_head with base_depth > 0")
        return {"base": squared_error(output.extra["base"], draw, networks["model"])}
