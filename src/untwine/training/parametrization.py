"""muP: rates found on a narrow model hold for a wide one (arXiv 2203.03466; for diffusion transformers 2505.15270).

The base model is the same network at ``base_width``, heads as wide as before, and m the ratio of both widths. What a
parameter is follows from which of its dimensions grow with the width:

    kind     dimensions that grow    initial deviation    AdamW's rate    weight decay
    input    the output alone        1 / sqrt(fan_in)     1               1
    hidden   both                    1 / sqrt(fan_in)     1 / m           m
    output   the input alone         0                    1 / m           m
    vector   biases, norms           biases 0, norms 1    1               1

Tables of classes have deviation 1. Modulations are hidden, and may start at zero. Attention keeps
``1 / sqrt(head width)``, which does not grow.

The reference multiplies what enters the last layer by ``output_scale / m`` and leaves its rate alone. Here the factor
is part of the weight, which then learns at ``output_scale / m`` times the rate (with AdamW's eps and decay to match):
the same network at every step, and a trained model is a plain one, whoever loads it.

Differs from the reference (github.com/ML-GSAI/Scaling-Diffusion-Transformers-muP): as said; modulations start at zero
unless asked otherwise; Muon is covered. Projectors of an objective, which no published rule covers, keep the base rate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from untwine.models.layers.embeddings import LearnedTokens
from untwine.training.optim import Factors

Kind = Literal["input", "hidden", "output", "vector", "fixed"]
WIDTHS = {"hidden_size": "num_heads", "decoder_hidden_size": "decoder_num_heads"}


@dataclass(frozen=True)
class Row:
    """What muP makes of one parameter."""

    kind: Kind
    shape: tuple[int, ...]
    base_shape: tuple[int, ...]
    ratio: float
    """m: of the dimension that the factors depend on; 1 where none grows"""
    std: float | None
    """initial deviation; None = as the layer draws itself"""
    factors: Factors


@dataclass(frozen=True, kw_only=True)
class MuP:
    """Learning rate, weight decay and deviations of a recipe are those of the network at ``base_width``."""

    base_width: int
    """``hidden_size`` of the base model; it has as many heads fewer, and a second width is in proportion"""
    output_scale: float = 1.0
    """factor of the last layers, a hyper-parameter that transfers as well"""
    scale_decay: bool = True
    """whether decay times rate, not decay, is the same at every width"""
    zero_modulations: bool = True
    """whether blocks start as the identity; if not, as in the reference, DDT's decoder, whose modulations are of an
    unnormalised sum, starts with activations near 100"""

    def __post_init__(self) -> None:
        if self.base_width < 1 or not self.output_scale > 0:
            raise ValueError(
                f"base_width must be >= 1 and output_scale > 0, got {self.base_width} and {self.output_scale}"
            )

    def table(self, model: Any) -> dict[str, Row]:
        """A row for every parameter of a backbone, by name.

        Raises:
            ValueError: for a model without a width, or a base width that does not keep the width of a head.
        """
        base, twice = (_shapes(model, width) for width in (self.base_width, 2 * self.base_width))
        rows: dict[str, Row] = {}
        for prefix, module in model.named_modules():
            for key, p in module.named_parameters(prefix, recurse=False):
                grows = [a != b for a, b in zip(base[key], twice[key])]
                row = self._row(module, tuple(p.shape), base[key], grows)
                starts_at_zero = self.zero_modulations and key.endswith("adaln.weight")
                rows[key] = replace(row, std=0.0) if starts_at_zero else row
        return rows

    def _row(self, module: nn.Module, shape: tuple[int, ...], base: tuple[int, ...], grows: list[bool]) -> Row:
        ratios = [now / before for now, before in zip(shape, base)]
        if not isinstance(module, nn.Linear):
            std = {nn.Embedding: 1.0, LearnedTokens: base[-1] ** -0.5}.get(type(module))
            return Row("vector" if any(grows) else "fixed", shape, base, ratios[-1], std, Factors())
        if len(shape) == 1:
            return Row("vector" if grows[0] else "fixed", shape, base, ratios[0], 0.0, Factors())
        ratio, std = ratios[1], shape[1] ** -0.5
        if not grows[1]:
            return Row("input" if grows[0] else "fixed", shape, base, ratios[0], std, Factors())
        if grows[0]:
            return Row("hidden", shape, base, ratio, std, Factors(1 / ratio, ratio if self.scale_decay else 1.0))
        rate = self.output_scale / ratio
        return Row("output", shape, base, ratio, 0.0, Factors(rate, 1 / rate, 1 / rate))

    def factors(self, model: Any) -> dict[str, Factors]:
        """What the optimizer needs, by name of the parameter."""
        return {name: row.factors for name, row in self.table(model).items()}

    @torch.no_grad()
    def initialised(self, model: Any) -> Any:
        """``model`` with its parameters drawn anew."""
        rows = self.table(model)
        for name, p in model.named_parameters():
            if (std := rows[name].std) is not None:
                nn.init.normal_(p, std=std)
        return model


def resized(config: Mapping[str, Any], width: int) -> dict[str, int]:
    """The widths and numbers of heads of a backbone's ``config`` at another ``hidden_size``, heads as wide as before.

    Raises:
        ValueError: where a head or a second width would not be whole.
    """
    if "hidden_size" not in config:
        raise ValueError("the model has no hidden_size whose change with the width could be followed")
    found: dict[str, int] = {}
    for name in (name for pair in WIDTHS.items() for name in pair if name in config):
        found[name], rest = divmod(config[name] * width, config["hidden_size"])
        if rest:
            raise ValueError(
                f"width {width} makes {name} no whole number from {config[name]} at hidden_size "
                f"{config['hidden_size']}; take a multiple of the width of a head"
            )
    return found


def _shapes(model: Any, width: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the parameters of ``model`` at another width."""
    given = {name: value for name, value in model.config.items() if not name.startswith("_")}
    with torch.device("meta"):
        other: nn.Module = type(model)(**{**given, **resized(given, width)})
    return {name: tuple(p.shape) for name, p in other.named_parameters()}
