"""From samples and a reference to a report: sources, counts, caches, processes, refusals."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.distributed.spawn import run_ranks
from untwine.data.base import CorruptImage
from untwine.data.digits import Digits
from untwine.evaluation import selfcheck
from untwine.evaluation.evaluator import Evaluator
from untwine.evaluation.extraction import Extractor
from untwine.evaluation.pictures import from_array, from_folder, open_samples
from untwine.evaluation.protocols import PROTOCOLS, Protocol, find_protocol
from untwine.evaluation.references import Reference, open_reference, read_reference
from untwine.evaluation.report import evaluate
from untwine.evaluation.selfcheck import self_check, shapes
from untwine.training.distributed import Distributed

QUICK = Protocol(
    name="quick",
    encoder="pixels",
    num_samples=60,
    metrics=("fd", "kid", "precision_recall", "density_coverage"),
    principal_axes=12,
    kernel_subsets=3,
    kernel_subset_size=30,
)


SMALL = replace(QUICK, num_samples=24, principal_axes=6, kernel_subset_size=12)


@pytest.fixture(scope="module")
def real():
    return shapes(150, radius=8)


@pytest.fixture(scope="module")
def fake():
    return shapes(60, radius=7, first=500)


@pytest.fixture(scope="module")
def digits():
    """(1797, 8, 8, 1) uint8"""
    return ((Digits().images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def reference_of(images: np.ndarray) -> Reference:
    return Reference("real", lambda size: from_array(images, "real"))


def save(images: np.ndarray, folder) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for k, image in enumerate(images):
        Image.fromarray(image.squeeze()).save(folder / f"{k:04d}.png")


def test_report_has_everything(real, fake, tmp_path):
    save(real, tmp_path / "real")
    report = evaluate(fake, tmp_path / "real", QUICK, out=tmp_path / "out")
    told = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert told == report.values
    assert set(told["metrics"]) == {"fd", "kid", "kid_std", "precision", "recall", "density", "coverage"}
    assert told["counts"] == {"samples": 60, "reference": 150, "reference_pictures": 150}
    assert told["floor"]["count"] == 60
    assert told["floor"]["against"] == 90
    assert 0 < told["floor"]["fd"] < told["metrics"]["fd"]
    assert told["details"] == {"principal_axes": 12, "kid_subset_size": 30, "manifold_reference": 150}
    assert told["memorisation"]["features"]["copies"] == 0
    assert told["protocol"]["name"] == "quick"
    assert {"untwine", "torch", "numpy"} <= set(told["versions"])
    assert told["reference"]["names"]
    assert told["samples"]["sha256"]
    with Image.open(tmp_path / "out" / "nearest.png") as picture:
        assert picture.height == 2 * 64 + 6
        assert picture.width == 10 * 66 + 2


def test_copies_are_told_and_shown(real, fake, tmp_path):
    mixed = np.concatenate([fake[:57], real[[3, 50, 149]]])
    report = evaluate(mixed, reference_of(real), QUICK, out=tmp_path)
    for space in ("features", "pixels"):
        assert report.values["memorisation"][space]["copies"] == 3
    assert report.nearest is not None
    assert report.nearest.position[-3:].tolist() == [3, 50, 149]
    sheet = np.asarray(Image.open(tmp_path / "nearest.png"))
    first, other = sheet[2:66, 2:66], sheet[68:132, 2:66]
    assert np.array_equal(first, other)


def test_source_makes_no_difference(real, fake, tmp_path):
    """Array, .npz, folder of PNG, and a folder of `untwine sample`, whose grid is no sample."""
    np.savez(tmp_path / "samples.npz", arr_0=fake)
    save(fake, tmp_path / "folder")
    save(fake[:5], tmp_path / "drawn")
    np.savez(tmp_path / "drawn" / "samples.npz", arr_0=fake)
    sources = [fake, tmp_path / "samples.npz", tmp_path / "folder", tmp_path / "drawn"]
    first, *others = [evaluate(source, reference_of(real), QUICK).metrics for source in sources]
    assert all(other == first for other in others)


def test_batches_make_no_difference(real, fake):
    """Bitwise: the network always sees chunks of one size."""
    images = torch.from_numpy(fake[:24]).permute(0, 3, 1, 2)
    evaluator = Evaluator(reference_of(real[:48]), replace(SMALL, encoder="efflite0"), batch_size=16)
    found = []
    for size in (24, 7, 1):
        evaluator.reset()
        for part in images.split(size):
            evaluator.update(part)
        found.append(evaluator.result().values)
        assert evaluator.result().metrics == found[-1]["metrics"], "asking again changes nothing"
    assert found[0]["metrics"] == found[1]["metrics"] == found[2]["metrics"]


def measured(processes, fake: np.ndarray, real: np.ndarray, share: str) -> dict:
    """One process's part of the samples; with ``share`` "first" the other has none."""
    images, index = torch.from_numpy(fake).permute(0, 3, 1, 2), torch.arange(len(fake))
    rank, size = processes.rank, processes.world_size
    mine = index[rank::size] if share == "turns" else index if rank == 0 else index[:0]
    protocol = replace(SMALL, encoder="efflite0" if share == "turns" else "pixels")
    evaluator = Evaluator(reference_of(real), protocol, batch_size=8)
    for part in mine.split(9):
        evaluator.update(images[part], part)
    return evaluator.result().values


@pytest.mark.parametrize("share", ["turns", "first"])
def test_two_processes_are_one(real, fake, share):
    one = measured(Distributed(torch.device("cpu")), fake[:24], real[:48], share)
    for other in run_ranks(measured, 2, fake[:24], real[:48], share):
        for key in ("metrics", "floor", "memorisation", "counts"):
            assert other[key] == one[key], key


def test_processes_must_not_repeat_pictures(fake):
    extractor = Extractor(PROTOCOLS["fd-efflite0-1k"].build_encoder())
    images = torch.from_numpy(fake[:4]).permute(0, 3, 1, 2)
    extractor.update(images, torch.tensor([0, 1, 2, 2]))
    with pytest.raises(ValueError, match="two pictures have the same"):
        extractor.gathered()


def test_noise_raises_every_distance(digits):
    """On real digits by EfficientNet: from the floor up, for each step of noise; the check that a metric measures."""
    draw = np.random.default_rng(0)
    reference, held_out = reference_of(digits[300:600]), digits[:80].astype(float)
    noise = draw.normal(size=held_out.shape)
    protocol = find_protocol("fd-efflite0-1k", num_samples=80)
    evaluator = Evaluator(reference, replace(protocol, kernel_subsets=5))
    found = []
    for level in (0, 16, 64):
        evaluator.reset()
        noisy = (held_out + level * noise).round().clip(0, 255).astype(np.uint8)
        evaluator.update(torch.from_numpy(noisy).permute(0, 3, 1, 2))
        found.append(evaluator.result())
    distances, kids = ([r.metrics[name] for r in found] for name in ("fd", "kid"))
    assert distances == sorted(distances)
    assert kids == sorted(kids)
    assert distances[0] < 2 * found[0].values["floor"]["fd"] < distances[1]
    assert found[0].metrics["precision"] > 0.6 > 0.05 > found[-1].metrics["precision"]


def test_cache_is_used_and_told_apart(real, fake, tmp_path, monkeypatch):
    first = evaluate(fake, reference_of(real), QUICK, cache=tmp_path).metrics
    (file,) = tmp_path.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr("untwine.evaluation.references._encode", None)
        assert evaluate(fake, reference_of(real), QUICK, cache=tmp_path).metrics == first
    evaluate(fake, reference_of(real[:149]), QUICK, cache=tmp_path)
    evaluate(fake, reference_of(real), replace(QUICK, max_reference=100), cache=tmp_path)
    evaluate(fake, reference_of(real), QUICK, cache=tmp_path, batch_size=32)
    assert len(list(tmp_path.iterdir())) == 4
    file.write_bytes(file.read_bytes()[:1000])
    assert evaluate(fake, reference_of(real), QUICK, cache=tmp_path).metrics == first
    assert file.stat().st_size > 1000


def test_a_cache_that_cannot_be_written_costs_only_time(real, fake, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        assert evaluate(fake, reference_of(real), QUICK, cache=tmp_path / "file").metrics["fd"] > 0
    assert "are not kept" in caplog.text


def test_references_from_every_source(real, tmp_path, digits):
    size = (8, 8)
    assert open_reference("digits").pictures(size).count == 1797
    assert np.array_equal(open_reference("digits:resolution=8").pictures(size).read(5), digits[5])
    assert open_reference(Digits()).pictures(size).count == 1797
    np.savez(tmp_path / "a.npz", arr_0=digits[:30])
    assert open_reference(tmp_path / "a.npz").pictures(size).count == 30
    save(real[:3], tmp_path / "real")
    small = open_reference(tmp_path / "real").pictures((16, 16)).read(2)
    assert small.shape == (16, 16, 3)  # of 32 x 32: prepared as for training
    pool = real[2].reshape(16, 2, 16, 2, 3).mean((1, 3))
    assert np.abs(small - pool).max() <= 1


def test_statistics_of_adm_win_over_its_pictures(real, tmp_path):
    """FID by the stored statistics of the full set, precision by the pictures, as ADM does."""
    path = tmp_path / "reference.npz"
    np.savez(path, arr_0=real, mu=np.full(5, 2.0), sigma=np.eye(5), mu_s=np.zeros(3), sigma_s=2 * np.eye(3))
    found = read_reference(path)
    assert found.pool is not None
    assert found.pool.mean.tolist() == [2] * 5
    assert found.pool.count is None
    assert found.spatial is not None
    assert found.spatial.covariance.trace() == 6
    with pytest.raises(ValueError, match=r"sigma \(D, D\)"):
        np.savez(tmp_path / "bad.npz", mu=np.zeros(5), sigma=np.eye(4))
        read_reference(tmp_path / "bad.npz")
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(768), sigma=np.eye(768))
    with pytest.raises(ValueError, match="statistics of Inception features only, and the encoder is pixels"):
        evaluate(real, tmp_path / "statistics.npz", QUICK)


def test_adm_protocol_from_statistics_alone(fake):
    """Everything but what needs pictures; says so, and refuses singular covariances."""
    from untwine.encoders.base import Features
    from untwine.encoders.pixels import AnyEncoder
    from untwine.evaluation.statistics import Moments

    def colours(images: torch.Tensor) -> Features:
        pooled = images.mean((2, 3))
        return Features(pooled, images[:, :2, ::16, ::16].flatten(2).transpose(1, 2), 5 * pooled)

    encoder = AnyEncoder(colours, "inception")
    images = torch.from_numpy(fake).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        found = colours(images)
    pool, spatial = Moments.of(found.pooled).gaussian(), Moments.of(found.tokens.flatten(1)).gaussian()
    reference = Reference("statistics", None, replace(pool, count=None), replace(spatial, count=None))
    protocol = find_protocol("adm-50k", num_samples=60)
    report = evaluate(fake, reference, protocol, encoder=encoder)
    assert report.metrics["fid"] == pytest.approx(0, abs=1e-6)
    assert report.metrics["sfid"] == pytest.approx(0, abs=1e-6)
    assert report.metrics["is"] > 1
    assert report.metrics["is_whole"] > report.metrics["is"]
    assert "not measured" in report.values["details"]["precision_recall"]
    assert report.values["floor"] is None
    assert report.values["protocol"]["modified"] == ["num_samples", "kernel_subset_size"]
    with pytest.raises(ValueError, match="'fid' means Inception features; with encoder 'colours'"):
        evaluate(fake, reference, protocol, encoder=AnyEncoder(colours, "colours"))
    with pytest.raises(ValueError, match="a covariance of 8 features from 6 pictures is singular"):
        evaluate(fake[:6], reference, find_protocol("adm-50k", num_samples=6), encoder=encoder)


def test_few_reference_pictures_are_refused(real, fake):
    with pytest.raises(ValueError, match="span at most 9 axes, got 12"):
        evaluate(fake, reference_of(real[:10]), QUICK)


def test_floats_are_rounded_by_the_protocol(fake):
    images = torch.tensor([0.0, 0.5, 0.999, 1.0]).view(1, 1, 2, 2)
    assert QUICK.to_uint8(images).flatten().tolist() == [0, 128, 255, 255]
    assert replace(QUICK, rounding="truncate").to_uint8(images).flatten().tolist() == [0, 127, 254, 255]
    with pytest.raises(ValueError, match=r"float within \[0, 1\]"):
        QUICK.to_uint8(images * 2 - 1)


def test_grey_is_repeated(real, fake):
    grey = fake[..., :1]
    assert evaluate(grey, reference_of(real), QUICK).metrics == (
        evaluate(grey.repeat(3, -1), reference_of(real), QUICK).metrics
    )


def test_surplus_samples_are_ignored(real, fake):
    more = np.concatenate([fake, real])
    assert evaluate(more, reference_of(real), QUICK).metrics == evaluate(fake, reference_of(real), QUICK).metrics


REFUSED = {
    "missing folder": (lambda p: open_samples(p / "nothing"), "is no folder of pictures and no .npz file"),
    "empty folder": (lambda p: open_samples(p), "root has no images"),
    "missing npz": (lambda p: open_samples(p / "a.npz"), "cannot be read as an .npz file"),
    "no arr_0": (lambda p: open_samples(_npz(p, images=np.zeros(3))), r"has no arr_0 \(it has images\)"),
    "floats": (lambda p: open_samples(_npz(p, arr_0=np.zeros((2, 4, 4, 3)))), "uint8.*float64"),
    "channels first": (lambda p: open_samples(_npz(p, arr_0=np.zeros((2, 3, 8, 8), np.uint8))), r"\(N, H, W, 3\)"),
    "objects": (lambda p: open_samples(_npz(p, arr_0=np.array([{}]))), "cannot be read"),
    "unknown protocol": (lambda p: find_protocol("fd-eflite0-1k"), "did you mean 'fd-efflite0-1k'"),
    "unknown metric": (lambda p: replace(QUICK, metrics=("fdd",)), "did you mean 'fd'"),
    "FID without Inception": (lambda p: replace(QUICK, metrics=("fid",)), "'fid' means Inception features"),
    "unknown reference": (lambda p: open_reference("digit"), "did you mean 'digits'"),
    "unknown option": (lambda p: open_reference("digits:size=8"), "unknown option"),
    "no value": (lambda p: open_reference("digits:resolution"), "NAME:option=value"),
    "no statistics": (lambda p: open_reference(_npz(p, x=np.zeros(1))), "has neither arr_0 nor mu"),
}


def _npz(folder, **arrays):
    np.savez(folder / "some.npz", **arrays)
    return folder / "some.npz"


@pytest.mark.parametrize("call,message", REFUSED.values(), ids=REFUSED)
def test_refused(call, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        call(tmp_path)


def test_sizes_and_counts_that_do_not_fit(real, fake, tmp_path):
    with pytest.raises(ValueError, match=r"array holds 59 pictures, and protocol quick compares 60"):
        evaluate(fake[:59], reference_of(real), QUICK)
    with pytest.raises(ValueError, match=r"pictures of 8 x 8 pixels, the samples 32 x 32"):
        evaluate(fake, "digits", QUICK)
    save(fake[:4], tmp_path)
    save(real[:1, :16], tmp_path / "other")
    folder = from_folder(tmp_path)
    with pytest.raises(ValueError, match=r"other/0000.png has 32 x 16 pixels, and the set 32 x 32"):
        list(folder.batches(range(5)))
    evaluator = Evaluator(reference_of(real), QUICK)
    evaluator.update(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"of one size, got \(16, 16\) after \(32, 32\)"):
        evaluator.update(torch.zeros(2, 3, 16, 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match="samples: 2 pictures"):
        evaluator.result()


def test_a_corrupt_picture_is_named(fake, tmp_path):
    save(fake[:4], tmp_path)
    (tmp_path / "0002.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    with pytest.raises(CorruptImage, match=r"0002\.png"):
        list(from_folder(tmp_path).batches(range(4)))


def test_lossy_pictures_are_warned_of(fake, tmp_path, caplog):
    Image.fromarray(fake[0]).save(tmp_path / "a.jpg")
    with caplog.at_level(logging.WARNING):
        from_folder(tmp_path)
    assert "lossy" in caplog.text


def test_self_check_passes_here():
    checks = list(self_check())
    assert len(checks) >= 5
    assert all(check.passed for check in checks), checks


def test_self_check_fails_when_tampered_with(monkeypatch, tmp_path):
    """With the formula, the file format, or the shipped numbers changed."""

    def failed() -> set[str]:
        return {check.name for check in self_check() if not check.passed}

    shipped = tmp_path / "numbers.json"
    shipped.write_text(json.dumps({"pixels": {"fd": json.loads(selfcheck.SHIPPED.read_text())["pixels"]["fd"]}}))
    monkeypatch.setattr(selfcheck, "SHIPPED", shipped)
    assert failed() == set()
    with monkeypatch.context() as patch:
        real = selfcheck.frechet_distance
        patch.setattr(selfcheck, "frechet_distance", lambda a, b: real(a, b) * (1 + 1e-6))
        assert failed() == {"Frechet distance of known Gaussians"}
    with monkeypatch.context() as patch:
        read = selfcheck.read_reference
        patch.setattr(selfcheck, "read_reference", lambda path: replace(read(path), spatial=None))
        assert failed() == {"entries changed by ADM's .npz"}
    with monkeypatch.context() as patch:
        patch.setattr("untwine.evaluation.evaluator.frechet_distance", lambda a, b: 1.0)
        assert failed() == {"shapes, pixels: fd"}
    shipped.write_text(json.dumps({"pixels": {"fd": 2.5}}))
    assert failed() == {"shapes, pixels: fd"}
