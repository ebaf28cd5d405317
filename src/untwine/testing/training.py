"""Contracts of objectives and codecs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import nn

from untwine.codecs.base import Codec
from untwine.contracts import Batch, cat
from untwine.diffusion.draws import Draws
from untwine.training.objectives.base import Objective


def check_objective(make: Callable[[], Objective], networks: Mapping[str, nn.Module], batch: Batch) -> None:
    """One mean loss per micro-batch, drawn by sample counter, finite, with a gradient for everything it trains.

    Args:
        networks: ``model`` and whatever :meth:`Objective.networks` names.
        batch: at least two samples, divisible by 2.
    """
    objective, draws = make(), Draws(0)
    assert set(networks) == {"model", *objective.networks()}, "networks must be those that the objective declares"
    for update in objective.updates(0):
        whole = objective(networks, batch, update=update, step=0, draws=draws)
        assert whole.total.ndim == 0 and whole.total.isfinite(), f"total must be a finite scalar, got {whole.total}"
        assert all(not part.requires_grad and part.ndim == 0 for part in whole.parts.values()), (
            "parts are detached scalars"
        )
        half = len(batch.index) // 2
        parts = [batch.select(slice(0, half)), batch.select(slice(half, None))]
        halves = [objective(networks, part, update=update, step=0, draws=draws) for part in parts]
        if whole.per_sample is not None:
            joined = torch.cat([loss.per_sample for loss in halves if loss.per_sample is not None])
            assert torch.allclose(joined, whole.per_sample, atol=1e-5), "a sample's loss depends on its micro-batch"
        swapped = objective(networks, replace(cat(parts[::-1])), update=update, step=0, draws=draws)
        assert torch.allclose(swapped.total, whole.total, atol=1e-5), "the loss depends on the order in the batch"
        whole.total.backward()
        trained = [*networks[update].parameters(), *(objective.parameters() if update == "model" else ())]
        assert any(p.grad is not None for p in trained), f"the update of {update!r} reaches none of its parameters"


def check_codec(codec: Codec, sample_shape: tuple[int, ...]) -> None:
    """Shapes that invert, draws by sample counter, and a round trip where the codec reconstructs."""
    low, high = codec.value_range
    x = low + (high - low) * Draws(0).uniform("x", sample_shape, range(4))
    encoding = codec.encode(x, draws=Draws(1), index=torch.arange(4))
    shape = codec.latent_shape(sample_shape)
    assert tuple(encoding.latents.shape) == (4, *shape), (
        f"latent_shape says {shape}, encode made {encoding.latents.shape}"
    )
    assert codec.sample_shape(shape) == tuple(sample_shape), "sample_shape does not invert latent_shape"
    again = codec.encode(x[2:3], draws=Draws(1), index=torch.tensor([2])).latents
    assert torch.allclose(again, encoding.latents[2:3], atol=1e-5), "a latent depends on its batch"
    decoded = codec.decode(encoding.mean, side=encoding.side)
    assert tuple(decoded.shape) == (4, *sample_shape), f"decode made {tuple(decoded.shape)} from {sample_shape}"
    if codec.reconstructs:
        error = (decoded - x).abs().mean() / (high - low)
        assert error < 0.25, f"decode(encode(x)) is off by {error:.2f} of the range"
