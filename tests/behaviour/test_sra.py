"""Terms that use a teacher, an encoder or the rest of the batch, from a recipe to the end of a run."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from tests.distributed.spawn import run_ranks
from tests.tiny import tiny
from untwine.codecs.rae_features import FeatureMaps
from untwine.config import Component
from untwine.contracts import Batch, Condition, Output
from untwine.data.features import FrozenFeatures, names_of
from untwine.diffusion.draws import Draws
from untwine.diffusion.paths import DiscretePath
from untwine.encoders.base import Encoder
from untwine.models.ddt import DDT
from untwine.testing import check_objective
from untwine.training import checkpoint
from untwine.training.metering import read_log
from untwine.training.objectives.dispersive import Dispersive, off_diagonal_covariance
from untwine.training.objectives.flow_matching import FlowMatching
from untwine.training.objectives.sra import SelfAlignment, distance
from untwine.training.trainer import Trainer

SRA = {"kind": "sra", "site": "blocks.0", "teacher_site": "blocks.1"}
PIXELS = {"encoder": {"kind": "pixels", "side": 4}}
ALIGNMENT = {"kind": "alignment", "site": "blocks.0", "features": PIXELS}
EVERYTHING = [SRA, {"kind": "dispersive", "site": "blocks.1"}, ALIGNMENT]


def _model(seed=0, **options):
    torch.manual_seed(seed)
    model = DDT(in_channels=1, hidden_size=32, depth=3, encoder_depth=2, num_heads=2, num_classes=4, **options)
    for p in model.parameters():
        nn.init.normal_(p, std=0.05)
    return model


def _batch(size=6):
    x0 = Draws(0).normal("x", (1, 8, 8), range(size))
    return Batch(x0, Condition(labels=torch.arange(size) % 4), torch.arange(100, 100 + size))


class Heard(nn.Module):
    """A teacher that keeps what it was asked."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, t, condition, features=()):
        self.x, self.t, self.condition = x, t, condition
        return self.model(x, t, condition, features=features)


def _sra(**options):
    term = SelfAlignment(site="blocks.0", teacher_site="blocks.1", **options)
    term.bind(_model())
    return term


def test_contract_of_sra():
    objective = FlowMatching(terms=(_sra(),))
    check_objective(lambda: objective, {"model": _model(), "teacher": _model(1)}, _batch())


def test_teacher_sees_the_same_noise_and_labels_at_less_noise():
    objective, model, teacher = FlowMatching(label_dropout=0.5, terms=(_sra(),)), _model(), Heard(_model(1))
    batch, draws = _batch(32), Draws(0)
    loss = objective({"model": model, "teacher": teacher}, batch, update="model", step=0, draws=draws)
    draw = objective.draw(model, batch, draws)
    assert torch.equal(teacher.condition.labels, draw.condition.labels)
    assert (teacher.condition.labels == 4).any() and (teacher.condition.labels < 4).any()
    gap = draw.t - teacher.t
    assert ((gap >= 0) & (gap < 0.2)).all() and gap.max() > 0.1
    assert torch.equal(teacher.x, draw.path.interpolate(draw.x0, draw.noise, teacher.t))
    loss.total.backward()
    assert all(p.grad is None for p in teacher.parameters())
    reached = {n.split(".")[1] for n, p in model.named_parameters() if n.startswith("blocks.") and p.grad is not None}
    assert reached == {"0", "1", "2"}


def test_teacher_on_a_chain_stays_on_its_levels():
    path = DiscretePath(num_timesteps=50)
    objective, teacher = FlowMatching(path=path, terms=(_sra(gap=1.0),)), Heard(_model(1))
    objective({"model": _model(), "teacher": teacher}, _batch(32), update="model", step=0, draws=Draws(0))
    levels = teacher.t * 50
    assert torch.allclose(levels, levels.round(), atol=1e-4)
    assert levels.min() >= 1 - 1e-4


def test_scale_of_sra_decays_as_published():
    term = _sra(scale=0.2, hold_steps=149, decay_steps=1000)
    assert [term.scale_at(step) for step in (0, 149)] == [0.2, 0.2]
    assert term.scale_at(1149) == pytest.approx(0.02)
    assert term.scale_at(649) == pytest.approx(2 * 0.1 ** (1 + 500 / 1000))
    assert _sra().scale_at(10**9) == 0.2
    # The total of a step has that scale.
    networks, batch = {"model": _model(), "teacher": _model(1)}, _batch()
    losses = [
        FlowMatching(label_dropout=0.0, terms=(term,))(networks, batch, update="model", step=step, draws=Draws(0))
        for step in (0, 1149)
    ]
    difference = float((losses[0].total - losses[1].total).detach())
    assert difference == pytest.approx(0.18 * float(losses[0].parts["sra"]), rel=1e-4)


@pytest.mark.parametrize("kind", ["smooth_l1", "l1", "l2", "cosine", "cosine_over_tokens"])
def test_distances_vanish_for_equal_tokens(kind):
    a, b = torch.randn(3, 5, 7), torch.randn(3, 5, 7)
    assert distance(a, a, kind).abs().max() < 1e-6
    assert distance(a, b, kind).mean() > 0.1
    assert distance(a, b, kind).shape[1:] == {"cosine": (5,), "cosine_over_tokens": (7,)}.get(kind, (5, 7))


def test_two_terms_share_a_teacher_or_disagree():
    assert list(FlowMatching(terms=(_sra(), _sra(distance="cosine"))).networks()) == ["teacher"]
    with pytest.raises(ValueError, match="two of them want the network 'teacher'"):
        FlowMatching(terms=(_sra(), _sra(ema=1))).networks()


def test_bad_options():
    for options in ({"gap": 1.5}, {"hold_steps": -1}, {"decay_steps": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            SelfAlignment(**options)
    with pytest.raises(ValueError, match=r"has no block 'blocks\.9'"):
        SelfAlignment(site="blocks.9").bind(_model())
    for options in ({"temperature": 0}, {"margin": -1.0}):
        with pytest.raises(ValueError, match="must be > 0"):
            Dispersive(**options)
    with pytest.raises(ValueError, match="the teacher follows ema:2, and the recipe has 2 averages"):
        Trainer(tiny(**{"objective.terms": [{**SRA, "ema": 2}]}), "unused")


@pytest.mark.parametrize("variant", ["l2", "cosine", "hinge", "covariance"])
@pytest.mark.parametrize("normalise", [True, False])
def test_dispersive_descends_to_spread_features(variant, normalise):
    """Descending the loss alone lowers the mean cosine between samples, and equal features are its worst case."""
    term = Dispersive(variant=variant, normalise=normalise, margin=2.0)
    features = (torch.ones(6, 12) + 0.05 * Draws(0).normal("f", (12,), range(6))).requires_grad_()
    unit = lambda f: nn.functional.normalize(f, dim=1)  # noqa: E731
    before = term.repulsion(unit(features) if normalise else features)
    optimizer = torch.optim.Adam([features], lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        term.repulsion(unit(features) if normalise else features).backward()
        optimizer.step()
    after = term.repulsion(unit(features) if normalise else features)
    assert after < before
    if variant != "covariance":
        cosines = unit(features) @ unit(features).T
        assert cosines[~torch.eye(6, dtype=torch.bool)].mean() < 0.9


def test_covariance_by_samples_is_that_by_features():
    features = torch.randn(5, 8, dtype=torch.float64)
    full = torch.cov(features.T)
    expected = full.square().sum() - full.diagonal().square().sum()
    assert off_diagonal_covariance(features) == pytest.approx(float(expected))


def _gradient_of_rank(processes, features):
    """What one of two processes adds to the gradient of a scale, over its half of the samples."""
    half = len(features) // processes.world_size
    mine = features[processes.rank * half : (processes.rank + 1) * half]
    return _gradient(mine)


def _gradient(features):
    scale = torch.tensor(1.5, requires_grad=True)
    term, tokens = Dispersive(site="blocks.1", normalise=False), (scale * features)[:, None]
    loss = term(None, Output(tokens, {"blocks.1": tokens}), {})["dispersive"]
    loss.backward()
    return float(loss.detach()), float(scale.grad)


def test_dispersive_pairs_the_samples_of_all_processes():
    """The loss of each of two, and the mean of their gradients, are those of one process with all samples."""
    features = Draws(0).normal("f", (12,), range(8))
    loss, gradient = _gradient(features)
    ranks = run_ranks(_gradient_of_rank, 2, features)
    assert [value for value, _ in ranks] == [pytest.approx(loss, rel=1e-5)] * 2
    assert sum(g for _, g in ranks) / 2 == pytest.approx(gradient, rel=1e-4)
    assert _gradient(features[:4])[0] != pytest.approx(loss, rel=1e-2)


def test_dispersive_needs_two_samples_in_training():
    objective = FlowMatching(terms=(Dispersive(site="blocks.1"),))
    run = lambda: objective({"model": _model()}, _batch(1), update="model", step=0, draws=Draws(0))  # noqa: E731
    with pytest.raises(ValueError, match="at least two samples"):
        run()
    objective.eval()
    assert "dispersive" not in run().parts


def test_everything_trains_validates_and_resumes(tmp_path):
    """All terms together: every part is logged and validated, the teacher follows the average, a resumed run ends with
    the same weights."""
    recipe = tiny(**{"objective.terms": EVERYTHING, "train.validate_every": 4, "train.num_steps": 6})
    whole = Trainer(recipe, tmp_path / "whole")
    whole.fit()
    for kind in ("train", "validation"):
        assert {"flow", "sra", "dispersive", "alignment"} <= read_log(tmp_path / "whole" / "log.jsonl", kind)[-1].keys()
    teacher, average = whole.networks.modules["teacher"], whole.networks.averages[0].tensors()
    assert all(torch.equal(p, average[name]) for name, p in teacher.named_parameters())
    assert not any(name.startswith("teacher.") for name in whole.networks.tensors())
    assert {"objective.terms.1.projector.0.weight", "objective.terms.3.projectors.0.0.weight"} <= set(
        whole.networks.tensors()
    )
    Trainer(recipe, tmp_path / "parts").fit(until=3)
    parts = Trainer(recipe, tmp_path / "parts")
    parts.fit()
    ours, theirs = parts.networks.tensors(), whole.networks.tensors()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert checkpoint.latest(tmp_path / "whole" / "checkpoints") is not None


def test_alignment_is_learned(tmp_path):
    """Pixels of the clean picture can be told from the tokens of a noisy one."""
    terms = [{**ALIGNMENT, "metric": "mse", "projector": "linear"}]
    recipe = tiny(**{"objective.terms": terms, "train.num_steps": 60, "train.log_every": 1})
    Trainer(recipe, tmp_path).fit()
    losses = [line["alignment"] for line in read_log(tmp_path / "log.jsonl", "train")]
    assert sum(losses[-10:]) < 0.6 * sum(losses[:10])


@pytest.fixture
def maps():
    return FeatureMaps(encoder=Component(Encoder.kinds, "pixels", {"side": 4}))


def test_features_are_kept_by_position_and_equal_those_computed_anew(maps, monkeypatch):
    data = tiny().data.build()
    x = torch.stack([data.read(k) for k in range(20)])
    batch = Batch(x, Condition(), torch.arange(20))
    (name,) = names_of(maps)
    kept, anew = FrozenFeatures([maps, maps], data), FrozenFeatures([maps], data, cache_mib=0)
    first, again = (kept.fill(batch, x, range(20)).features[name] for _ in range(2))
    assert first.shape == (20, 16, 3) and first.dtype == torch.float32
    assert torch.equal(first, again)
    assert torch.equal(anew.fill(batch, x, range(20)).features[name], first)
    part = anew.fill(batch.select(slice(3, 5)), x[3:5], [3, 4]).features[name]
    assert torch.equal(part, first[3:5])
    monkeypatch.setattr(FeatureMaps, "__call__", lambda *a: pytest.fail("computed again"))
    kept.fill(batch, x, range(20))
    with pytest.raises(pytest.fail.Exception):
        anew.fill(batch, x, range(20))
    assert FrozenFeatures([], data).fill(batch, x, range(20)) is batch


def test_augmented_samples_are_encoded_each_time(maps):
    data = tiny().data.build()
    data.flip = True
    features = FrozenFeatures([maps], data)
    x = torch.stack([data.read(k) for k in range(2)])
    batch, (name,) = Batch(x, Condition(), torch.arange(2)), names_of(maps)
    plain, mirrored = (features.fill(batch, v, [0, 1]).features[name] for v in (x, x.flip(-1)))
    assert not torch.equal(plain, mirrored)


def test_features_need_pictures(maps):
    data = tiny().data.build()
    data.sample_shape = (8, 4, 4)
    with pytest.raises(ValueError, match="need pictures of 1 or 3 channels, and these samples have 8"):
        FrozenFeatures([maps], data)


def test_weight_zero_is_the_plain_run(tmp_path):
    """Bitwise: the terms draw and compute nothing that the flow would notice."""
    off = [{**term, "scale": 0.0} for term in EVERYTHING]
    plain, with_terms = (tiny(**{"objective.terms": terms, "train.num_steps": 3}) for terms in ([], off))
    runs = [Trainer(recipe, tmp_path / name) for recipe, name in ((plain, "plain"), (with_terms, "terms"))]
    for run in runs:
        run.fit()
    a, b = (dict(run.networks.model.named_parameters()) for run in runs)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_efflite_stages_are_targets(tmp_path):
    """A stage of the convolutional network, resized to the grid of the backbone."""
    pytest.importorskip("efficientnet_lite_pytorch")
    features = {"encoder": {"kind": "efflite0", "side": 32}, "sites": ["network._blocks.4", "tokens"]}
    terms = [{"kind": "alignment", "site": "blocks.1", "features": features}]
    recipe = tiny(**{"objective.terms": terms, "train.num_steps": 1, "train.validation": 16})
    trainer = Trainer(recipe, tmp_path)
    trainer.fit()
    line = read_log(tmp_path / "log.jsonl", "validation")[-1]
    assert -1 <= line["alignment"] <= 1 and math.isfinite(line["loss"])
    widths = [p[-1].out_features for p in trainer.objective.terms[1].projectors]
    assert widths == [40, 1280]
