"""DDT's statistic dynamic programming against the official code's tables."""

from __future__ import annotations

import pytest
import torch

from tests.parity.cases import cases
from untwine.acceleration.caching.schedules import dynamic_programming, segment_costs
from untwine.acceleration.sharing.probe import gram
from untwine.diffusion.sampling import Sampling


@pytest.mark.parametrize("case", cases("ddt", klass="sharing_dp"))
def test_sharing_matches_official(case):
    states = case.inputs["states"].flatten(1, 2)
    similarity = gram(states) / states.shape[1]
    case.check("similarity", similarity)
    costs = segment_costs(1 - similarity)
    num_steps = len(states)
    # Official column j holds, from its diagonal down, the errors of a refresh at j cumulated over the steps it serves.
    cumulated = case.outputs["error_cumulative"].T.triu()
    assert torch.allclose(costs[:, 1:].triu(), cumulated, atol=case.tolerance, rtol=0)
    for budget in case.kwargs["K"]:
        steps, cost = dynamic_programming(costs, budget)
        path, table, parents = (case.outputs[f"K{budget}/{n}"] for n in ("path_with_end", "cost", "parent"))
        assert [*steps, num_steps] == path.tolist()
        assert list(steps) == case.outputs[f"K{budget}/recompute"].tolist()
        assert abs(cost - float(table[budget, num_steps])) < case.tolerance
        for k in range(1, budget + 1):
            for i in range(k, num_steps + 1):  # every reached cell of the table is a problem of its own
                part, value = dynamic_programming(costs[:i, : i + 1], k)
                assert abs(value - float(table[k, i])) < case.tolerance
                assert part[-1] == int(parents[k, i])


PUBLISHED = (
    0, 3, 6, 9, 12, 16, 20, 24, 28, 33, 38, 43, 48, 53, 57, 62, 67, 72, 78, 83, 87, 91, 95, 98, 102, 106, 110, 115, 120,
    125, 130, 135, 141, 146, 152, 158, 164, 171, 179, 185, 191, 197, 203, 209, 216, 223, 229, 234, 240, 245,
)  # fmt: skip


def test_published_schedule_is_a_setting():
    """The refreshes in the authors' scripts for 250 steps, 50 of them, in the sampler of their tables."""
    settings = Sampling(num_inference_steps=250, last_step=0.04, refresh=PUBLISHED)
    assert settings.refresh_steps == PUBLISHED
    assert len(PUBLISHED) == 50
