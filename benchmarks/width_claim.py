"""RAE's width claim (arXiv 2510.11690, section 4.1): a transformer narrower than its tokens cannot fit even one latent.

    python benchmarks/width_claim.py          two seeds, minutes on one core

One random latent of 16 tokens of 48 channels is learned by LightningDiTs of four blocks, 24 and 64 wide, by flow
matching. The loss compared is the mean of the last 50 of 900 steps. Claimed: the narrow one's is more than 5 times the
wide one's.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
from common import save

from untwine.contracts import Batch, Condition
from untwine.diffusion.draws import Draws
from untwine.diffusion.timesteps import UniformTime
from untwine.models.lightningdit import LightningDiT
from untwine.training.objectives.flow_matching import FlowMatching

BATCH, CHANNELS, WIDTHS, CLAIMED = 32, 48, (24, 64), 5.0


def final_loss(width: int, seed: int, steps: int) -> float:
    """The flow loss at the end of the fit of one latent."""
    torch.manual_seed(seed)
    model = LightningDiT(
        in_channels=CHANNELS, hidden_size=width, depth=4, num_heads=2, patch_size=1, num_classes=0
    )  # fmt: skip
    draws, objective = Draws(seed), FlowMatching(time=UniformTime())
    latent = draws.normal("latent", (CHANNELS, 4, 4), [0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    losses = []
    for step in range(steps):
        index = torch.arange(step * BATCH, (step + 1) * BATCH)
        batch = Batch(latent.expand(BATCH, -1, -1, -1), Condition(), index)
        loss = objective({"model": model}, batch, update="model", step=step, draws=draws)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        losses.append(float(loss.total.detach()))
    return statistics.mean(losses[-50:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    runs: list[dict[str, Any]] = []
    for seed in range(options.seeds):
        losses = {width: final_loss(width, seed, options.steps) for width in WIDTHS}
        row = {f"loss_width_{width}": round(loss, 4) for width, loss in losses.items()}
        runs.append({"seed": seed, **row, "ratio": round(losses[WIDTHS[0]] / losses[WIDTHS[1]], 2)})
    ratios = [run["ratio"] for run in runs]
    save(
        "width_claim",
        {
            "steps": options.steps,
            "channels": CHANNELS,
            "runs": runs,
            "smallest_ratio": min(ratios),
            "claimed_ratio": CLAIMED,
            "holds": min(ratios) > CLAIMED,
        },
    )


if __name__ == "__main__":
    main()
