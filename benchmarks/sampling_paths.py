"""What guidance skipping and cached decoder modulations save, and that they change nothing.

    python benchmarks/sampling_paths.py

A DDT of width 384 (8 encoder, 4 decoder blocks) on 16 x 16 tokens, 50 Euler steps, guidance 2.0 on (0, 0.7) [DDT's
(0.3, 1)], encoder state recomputed every 5 steps. All variants share the weights and the noise and are timed in turn in
one process. ``naive`` evaluates both branches at every step and computes modulations inside the decoder.
"""

from __future__ import annotations

import argparse

import torch
from common import paired, save

from untwine.contracts import Condition, Prediction, StepInfo
from untwine.diffusion.draws import Draws
from untwine.diffusion.guidance import Branch, Guided, Interval, classifier_free
from untwine.diffusion.paths import LinearPath
from untwine.diffusion.sampling import integrate
from untwine.diffusion.solvers import Euler
from untwine.diffusion.timesteps import TimeGrid
from untwine.models.ddt import DDT

INTERVAL = Interval(0.0, 0.7)
SCALE = 2.0


class Naive:
    """Both branches at every evaluation, modulations inside the decoder: what the published sampler does."""

    def __init__(self, model: DDT, labels: torch.Tensor) -> None:
        self.model, condition = model, Condition(labels=labels)
        self.labels = torch.cat([labels, model.null(condition).labels])  # type: ignore[list-item]
        self.state = None

    def __call__(self, x: torch.Tensor, t: torch.Tensor, at: StepInfo) -> Prediction:
        both = torch.cat([x, x])
        if at.refresh:
            times = torch.full((len(both),), float(t))
            self.state = self.model.encode(both, times, Condition(labels=self.labels))
        cond, null = self.model.decode(both, self.state).sample.chunk(2)
        scale = SCALE if float(t) in INTERVAL else 1.0
        return Prediction(null + scale * (cond - null), "velocity", x, t, LinearPath())


def guided(model: DDT, labels: torch.Tensor, budget: int) -> Guided:
    condition = Condition(labels=labels)
    branches = {"cond": Branch(model, condition), "null": Branch(model, model.null(condition))}
    return Guided(branches, classifier_free(SCALE, INTERVAL), path=LinearPath(), modulation_budget=budget)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--refresh-every", type=int, default=5)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = DDT(hidden_size=options.width, depth=12, encoder_depth=8, num_heads=6, num_classes=10).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    labels = torch.arange(options.batch) % 10
    x = Draws(0).normal("sample", (4, 32, 32), range(options.batch))
    grid = TimeGrid(options.steps).times()

    def run(make, refresh):
        @torch.no_grad()
        def once():
            return integrate(Euler(), make(), x, grid, path=LinearPath(), refresh=refresh)

        return once

    shared = range(0, options.steps, options.refresh_every)
    runs = {
        "naive": run(lambda: Naive(model, labels), None),
        "branches skipped": run(lambda: guided(model, labels, 0), None),
        "naive, shared": run(lambda: Naive(model, labels), shared),
        "branches skipped, shared": run(lambda: guided(model, labels, 0), shared),
        "branches skipped, shared, modulations cached": run(lambda: guided(model, labels, 2**30), shared),
    }
    outputs = {name: once() for name, once in runs.items()}
    seconds = paired(runs, repeats=options.repeats)

    def against(name: str, reference: str) -> dict[str, float]:
        difference = (outputs[name] - outputs[reference]).abs().max()
        return {
            "speed_up": round(seconds[reference]["median"] / seconds[name]["median"], 3),
            "max_difference_relative": float(difference / outputs[reference].abs().max()),
        }

    save(
        "sampling_paths",
        {
            "settings": {**vars(options), "guidance_scale": SCALE, "guidance_interval": [INTERVAL.low, INTERVAL.high]},
            "seconds": seconds,
            "skipping": against("branches skipped", "naive"),
            "skipping_when_shared": against("branches skipped, shared", "naive, shared"),
            "modulations": against("branches skipped, shared, modulations cached", "branches skipped, shared"),
            "both_when_shared": against("branches skipped, shared, modulations cached", "naive, shared"),
        },
    )


if __name__ == "__main__":
    main()
