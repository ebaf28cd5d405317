"""A model of texts trained from a cache of latents is the one trained from the pictures and their captions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import untwine
from tests.behaviour.pictures import save
from tests.behaviour.text_encoders import bert
from tests.tiny import tiny
from tests.vaes import save_vae
from untwine.codecs.vae import VAECodec
from untwine.data.encoding import Encoder
from untwine.data.folder import ImageFolder
from untwine.training.trainer import Trainer

UNIT = {"mean": (0.0,), "std": (1.0,)}
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Pictures with captions of one or two lines, their latents, the codec of both and the text encoder."""
    root = tmp_path_factory.mktemp("sources")
    for k in range(18):
        name = list(COLOURS)[k % 3]
        noise = np.random.default_rng(k).integers(-20, 21, (8, 8, 3))
        save(root / "pictures" / f"{k:02d}.png", (COLOURS[name] + noise).clip(0, 255).astype(np.uint8))
        (root / "pictures" / f"{k:02d}.txt").write_text(f"a {name} square\n{name}" if k % 2 else f"a {name} square")
    codec = {"kind": "vae", "path": str(save_vae(root / "vae")), **UNIT}
    Encoder(ImageFolder(root / "pictures", 8), VAECodec(codec["path"], **UNIT), root / "latents", shard_size=7).run()
    return root, codec, bert(root / "bert")


def train(sources, out, kind: str) -> Trainer:
    root, codec, encoder = sources
    data = {
        "pictures": {"kind": "folder", "root": str(root / "pictures"), "resolution": 8},
        "latents": {"kind": "latents", "root": str(root / "latents")},
    }
    model = {
        "kind": "ddt_head", "conditioning": "tokens", "hidden_size": 32, "decoder_hidden_size": 32, "depth": 2,
        "encoder_depth": 1, "num_heads": 2, "decoder_num_heads": 2, "patch_size": 2,
    }  # fmt: skip
    changes = {
        "data": data[kind],
        "codec": codec,
        "condition": {"kind": "text", "encoder": str(encoder), "max_tokens": 6},
        "model": model,
        "train.num_steps": 3,
        "train.validation": 3,
        "train.batch_size": 6,
        "train.sample_every": 3,
        "sampling": {"num_inference_steps": 2, "guidance_scale": 2.0},
    }
    trainer = Trainer(tiny(**changes), out)
    trainer.fit()
    return trainer


def test_from_latents_as_from_pictures(sources, tmp_path):
    """Captions, their alternatives, the null prompt, the split, the preview's prompts, and the weights."""
    one, other = (train(sources, tmp_path / kind, kind) for kind in ("pictures", "latents"))
    assert other.dataset.captions == one.dataset.captions
    assert other.prompts == one.prompts and len(set(one.prompts)) == 3
    assert other.metrics["validation_loss"] == pytest.approx(one.metrics["validation_loss"], rel=1e-4)
    theirs = other.networks.tensors()
    for name, value in one.networks.tensors().items():
        torch.testing.assert_close(theirs[name], value, atol=1e-5, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
    assert (tmp_path / "latents" / "samples" / "step-3.png").is_file()


def test_the_run_draws_pictures_for_prompts(sources, tmp_path):
    train(sources, tmp_path / "run", "latents")
    pipe = untwine.load(tmp_path / "run")
    assert pipe.makes_pictures
    drawn = untwine.sample(pipe, prompts=["a red square", "blue"], count=2)
    assert drawn.images.shape == (2, 8, 8, 3)
    assert drawn.prompts == ["a red square", "blue"]
    assert not np.array_equal(drawn.images[0], drawn.images[1])
