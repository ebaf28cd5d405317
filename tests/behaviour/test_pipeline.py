"""The image pipeline: image k is a function of (seed, k, label, settings), whatever the batch."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from PIL import Image

import untwine
from untwine.diffusion.sampling import Cancelled, Sampling
from untwine.pipelines.image import ImagePipeline

SHAPE = (1, 8, 12)
SETTINGS = {"num_inference_steps": 6, "guidance_scale": 2.0, "guidance_interval": [0.0, 0.7], "refresh_every": 2}


def make(kind: str = "DDT", num_classes: int = 3, **options) -> ImagePipeline:
    """A tiny pipeline whose output layers are random, not zero as they start."""
    depth = {"depth": 3, "encoder_depth": 2} if kind == "DDT" else {"depth": 2}
    torch.manual_seed(0)
    model = getattr(untwine, kind)(in_channels=SHAPE[0], hidden_size=16, num_heads=2, num_classes=num_classes, **depth)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.eval().requires_grad_(False)
    settings = SETTINGS if model.decoupled else {**SETTINGS, "refresh_every": 1}
    return ImagePipeline(model, sampling=settings, latent_shape=SHAPE, **options)


@pytest.fixture(scope="module")
def pipe() -> ImagePipeline:
    return make(class_names=["a", "b", "c"], origin={"recipe": "tiny"})


def latents(pipe: ImagePipeline, labels=None, **request) -> torch.Tensor:
    return pipe(labels, output_type="latent", **request).images  # type: ignore[union-attr]


def assert_close(one: torch.Tensor, other: torch.Tensor) -> None:
    """The promise for float32 latents: 1e-4 of the largest value."""
    assert (one - other).abs().max() <= 1e-4 * other.abs().max()


@pytest.mark.parametrize("solver", ["euler", {"kind": "euler", "rule": "sde"}, {"kind": "adams_bashforth", "order": 2}])
@pytest.mark.parametrize("split", [[7], [1] * 7, [3, 4], [5, 2]], ids=str)
def test_any_batch_split_gives_the_same_images(pipe, solver, split):
    path = {**SETTINGS, "solver": solver}
    sampling = ImagePipeline(pipe.model, sampling=path, latent_shape=SHAPE).sampling
    whole, seen = latents(pipe, num_images=7, seed=4, sampling=sampling), []
    first = 0
    for size in split:
        seen.append(latents(pipe, num_images=size, first_image=first, seed=4, sampling=sampling))
        first += size
    assert_close(torch.cat(seen), whole)
    assert (whole[0] - whole[3]).abs().max() > 0.01 * whole.abs().max()  # same label, other noise


def test_noise_is_bitwise_the_same_for_every_split(pipe, monkeypatch):
    """What the network is first shown, through a model that leaves its input alone."""
    shown: dict[int, list[torch.Tensor]] = {}
    encode = type(pipe.model).encode
    for size in (1, 2, 7):
        seen = shown.setdefault(size, [])

        def record(self, x, t, condition, seen=seen, **more):
            seen.append(x.clone())
            return encode(self, x, t, condition, **more)

        monkeypatch.setattr(type(pipe.model), "encode", record)
        for first in range(0, 7, size):
            latents(pipe, num_images=min(size, 7 - first), first_image=first, num_inference_steps=2, guidance_scale=1.0)
    assert torch.equal(torch.cat(shown[1]), shown[7][0])
    assert torch.equal(torch.cat(shown[2]), shown[7][0])


def test_a_generator_gives_its_seed(pipe):
    generator = torch.Generator().manual_seed(11)
    generator_used = torch.Generator().manual_seed(11)
    torch.randn(5, generator=generator_used)
    expected = latents(pipe, num_images=3, seed=11)
    assert torch.equal(latents(pipe, num_images=3, generator=generator), expected)
    assert torch.equal(latents(pipe, num_images=3, generator=generator), expected)  # its state is left alone
    assert torch.equal(latents(pipe, num_images=3, generator=generator_used), expected)
    assert not torch.equal(latents(pipe, num_images=3, seed=12), expected)


def test_a_list_of_generators_gives_each_image_its_own(pipe):
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6, 5)]
    three = latents(pipe, [2, 2, 2], generator=generators)
    assert_close(three[0], three[2])
    assert (three[0] - three[1]).abs().max() > 0.1 * three.abs().max()
    for image, seed in zip(three, (5, 6, 5)):
        assert_close(image[None], latents(pipe, [2], seed=seed))
    with pytest.raises(ValueError, match="one per image, got 3 for 2 images"):
        latents(pipe, [1, 1], generator=generators)
    with pytest.raises(ValueError, match="seed or generator, not both"):
        latents(pipe, [1], generator=generators[0], seed=0)


def test_labels_cycle_through_the_classes(pipe):
    expected = latents(pipe, [0, 1, 2, 0, 1], seed=1)
    assert torch.equal(latents(pipe, num_images=5, seed=1), expected)
    assert torch.equal(latents(pipe, num_images=5, seed=1)[3:], expected[3:])
    assert_close(latents(pipe, num_images=2, first_image=3, seed=1), expected[3:])  # 3 mod 3, 4 mod 3
    other = latents(pipe, [1, 1, 2, 0, 1], seed=1)
    assert not torch.allclose(other[0], expected[0])
    assert untwine.sample(pipe, count=5).labels.tolist() == [0, 1, 2, 0, 1]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "labels", [2, torch.tensor(2), np.int64(2), [2, 2], np.array([2, 2]), torch.tensor([2, 2])], ids=repr
)
def test_forms_of_labels(pipe, labels):
    assert torch.equal(latents(pipe, labels, num_images=2), latents(pipe, [2, 2]))


def test_output_types(pipe):
    latent = latents(pipe, num_images=2)
    assert latent.shape == (2, *SHAPE)
    assert latent.dtype == torch.float32
    unit = ((latent + 1) / 2).clamp(0, 1)
    pt = pipe(num_images=2, output_type="pt").images
    assert torch.equal(pt, (unit * 255).round() / 255)
    array = pipe(num_images=2, output_type="np").images
    assert array.shape == (2, 8, 12, 1)
    assert array.dtype == np.float32
    assert np.array_equal(array, pt.permute(0, 2, 3, 1).numpy())
    pictures = pipe(num_images=2).images
    assert [picture.mode for picture in pictures] == ["L", "L"]
    assert isinstance(pictures[0], Image.Image)
    assert pictures[0].size == (12, 8)
    assert np.array_equal(np.asarray(pictures[1]), (array[1, :, :, 0] * 255).round())
    (images,) = pipe(num_images=2, output_type="pt", return_dict=False)
    assert torch.equal(images, pt)
    with pytest.raises(ValueError, match=r"output_type must be 'pil'.*got 'png'"):
        pipe(output_type="png")


@pytest.mark.parametrize("kind, num_classes", [("DDT", 3), ("DDT", 0), ("ImprovedDiT", 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_saved_and_loaded_is_bitwise_the_same(tmp_path, capfd, caplog, kind, num_classes, dtype):
    pipe = make(kind, num_classes, class_names=["a", "b", "c"][:num_classes], origin={"step": 7})
    pipe.model.to(dtype)
    pipe.save_pretrained(tmp_path)
    caplog.clear()
    capfd.readouterr()
    with caplog.at_level(logging.WARNING):
        loaded = untwine.load(tmp_path, dtype=dtype)
    assert not caplog.records
    assert capfd.readouterr() == ("", "")  # neither a progress bar nor a warning
    for again in (loaded, ImagePipeline.from_pretrained(str(tmp_path), dtype=dtype)):
        assert type(again.model) is type(pipe.model)
        assert (again.class_names, again.latent_shape, again.sampling) == (pipe.class_names, SHAPE, pipe.sampling)
        assert (again.codec, again.path, again.origin) == (pipe.codec, pipe.path, {"step": 7})
        assert again.model.dtype == dtype
        assert torch.equal(latents(again, num_images=3), latents(pipe, num_images=3))


def test_saved_index_names_the_public_class(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    assert pipe.load_config(str(tmp_path))["model"] == ["untwine", "DDT"]


def test_loading_leaves_the_settings_of_diffusers_alone(pipe, tmp_path):
    from diffusers.utils import logging as settings

    pipe.save_pretrained(tmp_path)
    before = settings.is_progress_bar_enabled(), settings.get_verbosity(), logging.getLogger("diffusers").level
    untwine.load(tmp_path)
    with pytest.raises(ValueError, match="unknown checkpoint"):
        untwine.load("nothing")
    assert (
        settings.is_progress_bar_enabled(),
        settings.get_verbosity(),
        logging.getLogger("diffusers").level,
    ) == before


def test_foreign_pipelines_are_refused(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    index = tmp_path / "model_index.json"
    index.write_text(index.read_text().replace("ImagePipeline", "FluxPipeline"))
    with pytest.raises(ValueError, match="holds a FluxPipeline, not an ImagePipeline of untwine"):
        untwine.load(tmp_path)


def test_unconditional_model():
    pipe = make(num_classes=0)
    assert pipe.num_classes == 0
    three = latents(pipe, num_images=3)
    assert torch.equal(three, latents(pipe, num_images=3, guidance_scale=5.0))
    assert pipe.last_run == {"network_evaluations": 6, "encoder_passes": 3}
    with pytest.raises(ValueError, match=r"class_labels must be left out.*unconditional, got \[1\]"):
        latents(pipe, [1])
    assert untwine.sample(pipe, count=2).labels is None


def test_other_sizes(pipe):
    """In pixels, height first; the size of training gives what no size gives."""
    assert latents(pipe, num_images=1, size=(4, 10)).shape == (1, 1, 4, 10)
    assert torch.equal(latents(pipe, num_images=1, size=(8, 12)), latents(pipe, num_images=1))
    assert pipe(num_images=1, size=(4, 10)).images[0].size == (10, 4)
    assert untwine.sample(pipe, count=2, size=(4, 10)).images.shape == (2, 4, 10, 1)


def test_counts_are_what_the_network_did(pipe, monkeypatch):
    """The report of a generation against calls that are counted at the model itself."""
    rows = {"encode": 0, "decode": 0}
    for name in rows:
        method = getattr(type(pipe.model), name)

        def count(self, x, *args, method=method, name=name, **more):
            rows[name] += len(x)
            return method(self, x, *args, **more)

        monkeypatch.setattr(type(pipe.model), name, count)
    report = untwine.sample(pipe, count=5, batch_size=3).report
    assert (report["network_evaluations"], report["encoder_passes"]) == (rows["decode"], rows["encode"])
    assert rows["encode"] < rows["decode"]


BAD = {
    "label of the null class": ({"class_labels": [0, 3]}, r"labels must be within \[0, 2\], got \[3\]"),
    "a single one": ({"class_labels": 3}, r"labels must be within \[0, 2\], got \[3\]"),
    "negative label": ({"class_labels": [-1]}, r"labels must be within \[0, 2\], got \[-1\]"),
    "label that is no integer": ({"class_labels": [0.5]}, "labels must be a list of integers"),
    "labels in two dimensions": ({"class_labels": [[0, 1]]}, "labels must be a list of integers"),
    "more images than labels": ({"class_labels": [0, 1], "num_images": 3}, "num_images=3, 2 labels"),
    "no images": ({"num_images": 0}, "num_images must be >= 1"),
    "no labels": ({"class_labels": []}, "num_images must be >= 1"),
    "first image": ({"first_image": -1}, "first_image=-1"),
    "no steps": ({"num_inference_steps": 0}, "num_inference_steps must be an integer >= 1, got 0"),
    "guidance": ({"guidance_scale": float("nan")}, "guidance_scale must be a finite number >= 0.*got nan"),
    "negative guidance": ({"guidance_scale": -0.5}, "guidance_scale must be a finite number >= 0.*got -0.5"),
    "seed": ({"seed": 2**64}, r"seed must be an integer in \[0, 2\*\*64\)"),
    "negative seed": ({"seed": -1}, r"seed must be an integer in \[0, 2\*\*64\), got -1"),
    "height": ({"size": (7, 8)}, r"size \(7, 8\) does not divide into patches; the nearest that does is \(8, 8\)"),
    "width": ({"size": (8, 1)}, r"size \(8, 1\) does not divide into patches; the nearest that does is \(8, 2\)"),
    "no size": ({"size": (0, 8)}, r"two integers >= 1, got \(0, 8\)"),
    "refresh too late": ({"refresh": [0, 6]}, r"refresh names steps \[6\] outside \[0, 5\]"),
    "refresh without a start": ({"refresh": [1]}, "refresh must contain the first step, 0"),
}


@pytest.mark.parametrize("request_, message", BAD.values(), ids=BAD)
def test_refuses_before_computing(pipe, monkeypatch, request_, message):
    def reached(*args, **more):
        raise AssertionError("the network was run")

    monkeypatch.setattr(type(pipe.model), "encode", reached)
    with pytest.raises(ValueError, match=message):
        pipe(**request_)


BAD_SETS = {
    "count": ({"count": 0}, "count must be an integer >= 1, got 0"),
    "true is no count": ({"count": True}, "count must be an integer >= 1, got True"),
    "batch": ({"batch_size": 1.5}, "batch_size must be an integer >= 1, got 1.5"),
    "empty labels": ({"labels": []}, "labels must name at least one class"),
    "a late label": ({"count": 9, "batch_size": 1, "labels": [0, 1, 3]}, r"labels must be within \[0, 2\], got \[3\]"),
}


@pytest.mark.parametrize("request_, message", BAD_SETS.values(), ids=BAD_SETS)
def test_sample_refuses_before_computing(pipe, monkeypatch, request_, message):
    done = []
    with pytest.raises(ValueError, match=message):
        untwine.sample(pipe, on_batch=done.append, **request_)
    assert not done


def test_five_lines(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "mine")
    pipeline = untwine.load(tmp_path / "mine")
    images = pipeline(class_labels=[0, 2], guidance_scale=1.5, num_inference_steps=3).images
    assert len(images) == 2
    samples = untwine.sample(tmp_path / "mine", count=4, num_inference_steps=3)
    assert samples.images.shape == (4, 8, 12, 1)
    assert samples.images.dtype == np.uint8
    assert samples.report["sampling"]["num_inference_steps"] == 3
    assert samples.report["sampling"]["guidance_scale"] == 2.0


def _attributes(model: torch.nn.Module) -> dict[str, list[str]]:
    return {name: sorted(vars(module)) for name, module in model.named_modules()}


@pytest.mark.parametrize("kind", ["DDT", "ImprovedDiT"])
def test_cancelled_sampling_leaves_nothing_behind(kind):
    pipe = make(kind)
    before, attributes = latents(pipe, num_images=2), _attributes(pipe.model)
    steps = []

    def stop(at, x):
        steps.append((at.step, tuple(x.shape)))
        return at.step < 2

    with pytest.raises(Cancelled, match="after step 2") as cancelled:
        latents(pipe, num_images=3, on_step=stop)
    assert cancelled.value.step == 2
    assert steps == [(i, (3, *SHAPE)) for i in range(3)]

    def fail(at, x):
        if at.step == 1:  # between a refresh and the step that reuses its state
            raise KeyError("from outside")

    with pytest.raises(KeyError):
        latents(pipe, num_images=3, on_step=fail)
    assert _attributes(pipe.model) == attributes
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()
    assert torch.equal(latents(pipe, num_images=2), before)


def test_settings_of_the_pipeline_are_the_default(pipe):
    as_given = Sampling(num_inference_steps=6, guidance_scale=2.0, guidance_interval=(0.0, 0.7), refresh_every=2)
    assert pipe.sampling == as_given
    assert torch.equal(latents(pipe, num_images=2), latents(pipe, num_images=2, sampling=as_given))
    assert not torch.equal(latents(pipe, num_images=2), latents(pipe, num_images=2, guidance_scale=1.0))
    every = latents(pipe, num_images=2, refresh=range(0, 6, 2))
    assert torch.equal(every, latents(pipe, num_images=2))
