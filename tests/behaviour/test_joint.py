"""Class tokens diffused with the image (REG), from a recipe to pictures: trained packed, drawn packed, shown apart."""

from __future__ import annotations

import pytest
import torch

import untwine
from tests.tiny import tiny
from untwine.contracts import Condition
from untwine.diffusion.draws import Draws
from untwine.diffusion.guidance import Branch, Guided, classifier_free
from untwine.diffusion.paths import LinearPath
from untwine.diffusion.sampling import Sampling, integrate, noises, sample
from untwine.diffusion.solvers import Euler
from untwine.models.ddt_head import DDTHead
from untwine.training.metering import read_log
from untwine.training.objectives.joint import ClassToken
from untwine.training.planning import plan
from untwine.training.trainer import Trainer

Z = 12  # three channels of pictures averaged to 2 x 2
HEAD = {
    "hidden_size": 32, "decoder_hidden_size": 48, "depth": 2, "encoder_depth": 1, "num_heads": 2,
    "decoder_num_heads": 2, "patch_size": 2, "conditioning": "tokens",
}  # fmt: skip


def recipe(**changes):
    term = {"kind": "class_token", "features": {"encoder": {"kind": "pixels", "side": 2}}, "scale": 0.03}
    return tiny(
        **{
            "model": {"kind": "ddt_head", **HEAD, "class_token_dim": Z},
            "objective": {"kind": "flow_matching", "terms": [term]},
            "sampling": {"num_inference_steps": 2, "guidance_scale": 2.0},
            "train.num_steps": 4,
            "train.sample_every": 4,
            "train.validate_every": 4,
            **changes,
        }
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "reg"
    Trainer(recipe(), folder).fit()
    return folder


def test_it_trains_from_a_recipe(run):
    """The token is what the encoder makes of the clean picture; previews and validation know of it."""
    training, held_out = (read_log(run / "log.jsonl", kind) for kind in ("train", "validation"))
    assert 0 < training[-1]["class_token"] < 10 and 0 < held_out[-1]["class_token"] < 10
    assert (run / "samples" / "step-4.png").is_file()


def test_a_run_draws_pictures(run):
    pipe = untwine.load(run)
    assert pipe.latent_shape == (1, 8, 8)
    images = pipe(class_labels=[3, 7], output_type="pt").images
    assert images.shape == (2, 1, 8, 8)
    apart = torch.cat([pipe(class_labels=[c], first_image=k, output_type="pt").images for k, c in enumerate((3, 7))])
    torch.testing.assert_close(images, apart, atol=1 / 255 + 1e-6, rtol=0)
    assert untwine.sample(pipe, count=3).images.shape == (3, 8, 8, 1)


def test_the_token_is_drawn_and_guided_with_the_image():
    """What is returned is the image of the packed sample that the driver carries."""
    torch.manual_seed(0)
    model = DDTHead(in_channels=1, num_classes=4, class_token_dim=Z, **HEAD).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.05)
    settings, condition, index = (
        Sampling(num_inference_steps=3, guidance_scale=2.0),
        Condition(labels=torch.tensor([1, 2])),
        torch.arange(2),
    )
    heard = []
    images, _ = sample(
        model, condition, (1, 8, 8), index, draws=Draws(5), sampling=settings,
        on_step=lambda at, x: heard.append(tuple(x.shape)),
    )  # fmt: skip
    assert images.shape == (2, 1, 8, 8)
    assert heard == [(2, 1, 64 + Z)] * 3
    branches = {"cond": Branch(model, condition), "null": Branch(model, model.null(condition))}
    x, _ = noises(Draws(5), (1, 64 + Z), index)
    guided = Guided(branches, classifier_free(2.0), path=LinearPath())
    with torch.no_grad():
        x = integrate(Euler(), guided, x, settings.grid(LinearPath()), path=LinearPath())
    assert torch.equal(images, model.unpack(x)["image"])


def test_it_is_planned():
    found = plan(
        recipe(**{"model": {"kind": "ddt_head", **HEAD, "class_token_dim": Z, "in_channels": 1, "num_classes": 10}}),
        (1, 8, 8),
    )
    assert found.activations > 0 and found.step_flops > 0


def test_what_does_not_fit(tmp_path):
    other = recipe(**{"model": {"kind": "ddt_head", **HEAD, "class_token_dim": 5}})
    with pytest.raises(ValueError, match="class_token_dim is 5, but the class tokens have 12 numbers"):
        Trainer(other, tmp_path / "a").fit()
    without = recipe(objective={"kind": "flow_matching", "terms": [{"kind": "class_token"}]})
    with pytest.raises(ValueError, match="lacks 'class_token'"):
        Trainer(without, tmp_path / "b").fit()
    model = DDTHead(in_channels=1, num_classes=4, class_token_dim=Z, **HEAD)
    with pytest.raises(ValueError, match="image must be square"):
        model.pack(torch.zeros(1, 1, 8, 4), torch.zeros(1, Z))
    assert ClassToken().encoders() == ()
