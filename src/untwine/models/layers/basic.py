"""Linear and RMSNorm with their precision rules written out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """A linear layer that casts its input to the dtype of its weight, so that ``model.to(bfloat16)`` just works.

    Under autocast the cast is autocast's own; doing it here as well would round trip through float32.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) of any floating dtype -> (..., out_features)."""
        if not torch.is_autocast_enabled(input.device.type):
            input = input.to(self.weight.dtype)
        return F.linear(input, self.weight, self.bias)


class RMSNorm(nn.Module):
    """Root mean square normalisation with a learned weight; the statistics are in float32 in every dtype.

    Args:
        dim: size D of the last dimension.
        eps: added to the mean square.
        scale_in_float32: multiply by the weight before the result is rounded to the input dtype, not after. The two
            orders agree in float32 and differ in bfloat16; DDT rounds first, the improved DiT last.
    """

    def __init__(self, dim: int, *, eps: float = 1e-6, scale_in_float32: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps
        self.scale_in_float32 = scale_in_float32

    def reset_parameters(self) -> None:
        """Weight one."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D) of the same dtype."""
        source = x.float() if self.scale_in_float32 else x
        # F.rms_norm with a weight rounds once, after the product: not what DDT computes in bfloat16.
        normed = F.rms_norm(source, self.weight.shape, None, self.eps)
        return (normed * self.weight.to(normed.dtype)).to(x.dtype)
