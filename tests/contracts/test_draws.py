"""Random draws are functions of (seed, name, sample counter) and of nothing else."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from untwine.diffusion.draws import Draws

counters = st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=6)
seeds = st.integers(0, 2**64 - 1)
kinds = st.sampled_from(["normal", "uniform"])


@given(seed=seeds, kind=kinds, index=counters, data=st.data())
@settings(max_examples=40, deadline=None)
def test_a_row_depends_on_its_counter_alone(seed, kind, index, data):
    draw = getattr(Draws(seed), kind)
    rows = draw("noise", (2, 3), index)
    order = data.draw(st.permutations(range(len(index))))
    assert torch.equal(draw("noise", (2, 3), [index[i] for i in order]), rows[list(order)])
    assert torch.equal(draw("noise", (2, 3), torch.tensor(index[-1:])), rows[-1:])


@given(seed=seeds, kind=kinds, size=st.integers(1, 40))
@settings(max_examples=20, deadline=None)
def test_a_longer_draw_starts_with_the_shorter_one(seed, kind, size):
    draw = getattr(Draws(seed), kind)
    long = draw("noise", (64,), [5])
    # the ziggurat of a normal draw consumes values one by one, so a prefix is a prefix
    assert torch.equal(draw("noise", (size,), [5])[0], long[0, :size])


def test_what_was_drawn_before_does_not_matter():
    draws = Draws(3)
    first = draws.normal("a", (4,), [0, 1])
    draws.uniform("b", (7,), range(9))
    draws.permutation("a", 11, 2)
    assert torch.equal(draws.normal("a", (4,), [0, 1]), first)


def test_other_names_seeds_counters_and_kinds_are_independent():
    shape, index = (20_000,), [0]
    streams = [
        Draws(0).normal("a", shape, index),
        Draws(1).normal("a", shape, index),
        Draws(2**64 - 1).normal("a", shape, index),
        Draws(0).normal("b", shape, index),
        Draws(0).normal("a", shape, [1]),
        Draws(0).normal("a", shape, [2**62]),
    ]
    correlation = np.corrcoef(torch.cat(streams).numpy())
    assert np.abs(correlation - np.eye(len(streams))).max() < 5 / 20_000**0.5


@pytest.mark.parametrize("kind, mean, variance, kurtosis", [("normal", 0.0, 1.0, 3.0), ("uniform", 0.5, 1 / 12, 9 / 5)])
def test_moments(kind, mean, variance, kurtosis):
    x = getattr(Draws(7), kind)("x", (100,), range(2000)).double().flatten()
    n = x.numel()
    assert abs(x.mean() - mean) < 5 * (variance / n) ** 0.5
    assert abs(x.var() / variance - 1) < 5 * ((kurtosis - 1) / n) ** 0.5
    assert abs(((x - mean) ** 4).mean() / variance**2 - kurtosis) < 0.08
    if kind == "uniform":
        assert x.min() >= 0
        assert x.max() < 1


def test_consecutive_counters_do_not_overlap():
    rows = Draws(0).uniform("x", (1000,), range(50)).flatten()
    # float32 uniforms have 2**24 values: about n**2 / 2**25 = 75 birthday collisions among 50,000
    assert rows.numel() - rows.unique().numel() < 150


@given(seed=seeds, size=st.integers(1, 200), epoch=st.integers(0, 2**40))
@settings(max_examples=40, deadline=None)
def test_permutation(seed, size, epoch):
    order = Draws(seed).permutation("order", size, epoch)
    assert sorted(order) == list(range(size))
    assert np.array_equal(order, Draws(seed).permutation("order", size, epoch))


def test_permutations_differ_between_epochs_and_names():
    draws = Draws(0)
    orders = {tuple(draws.permutation(name, 30, epoch)) for name in "ab" for epoch in range(5)}
    assert len(orders) == 10


def test_shared_values():
    values = [Draws(5).shared("dropout", step) for step in range(400)]
    assert values == [Draws(5).shared("dropout", step) for step in range(400)]
    assert len(set(values)) == 400
    assert abs(np.mean(values) - 0.5) < 0.08
    assert values[:9] != [Draws(5).shared("other", step) for step in range(9)]


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, True, "0"])
def test_bad_seed(seed):
    with pytest.raises(ValueError, match=r"seed must be an integer in \[0, 2\*\*64\)"):
        Draws(seed)


def test_negative_counter():
    with pytest.raises(ValueError, match="sample counters >= 0, got -2"):
        Draws(0).normal("x", (1,), [3, -2])
