"""Every encoder: shapes, frozen, gradients for pictures, grey, identity; and what their weights need."""

from __future__ import annotations

import hashlib
import warnings

import numpy as np
import pytest
import torch

from untwine.encoders import ENCODERS
from untwine.encoders import inception as inception_module
from untwine.encoders.base import Encoder, Features, resize_short_side, three_channels
from untwine.encoders.pixels import AnyEncoder
from untwine.evaluation.metrics import clip_score

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoints with random weights, in the formats of the real ones."""
    root = tmp_path_factory.mktemp("encoders")
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**small, "image_size": 28, "patch_size": 7}
    transformers.Dinov2Model(transformers.Dinov2Config(**{**vision, "mlp_ratio": 2})).save_pretrained(root / "dinov2")
    transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**vision)).save_pretrained(root / "siglip")
    vision, text = (
        {**vision, "projection_dim": 24},
        {**small, "projection_dim": 24, "vocab_size": 99, "max_position_embeddings": 12, "eos_token_id": 2},
    )
    clip = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)
    transformers.CLIPModel(clip).save_pretrained(root / "clip")
    return root


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    """Inception's parameters, drawn at random."""
    fidelity = pytest.importorskip("torch_fidelity")
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.manual_seed(0)
    with torch.device("meta"), pytest.MonkeyPatch.context() as patch:
        module = "torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url"
        patch.setattr(module, lambda *args, **options: {})
        patch.setattr(fidelity.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        network = fidelity.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    drawn = {}
    for name, value in network.state_dict().items():
        noise = torch.randn(value.shape) * (value[0].numel() ** -0.5 if value.ndim > 1 else 0.1)
        drawn[name] = (1 + noise).clamp(min=0.1) if name.endswith("var") or "bn.weight" in name else noise
    torch.save(drawn, path)
    return path


@pytest.fixture(scope="module")
def build(folder, inception_file):
    built: dict[str, Encoder] = {}

    def make(name: str) -> Encoder:
        if name not in built:
            options = {"inception": {"weights": inception_file, "check_hash": False}}
            options |= {kind: {"path": folder / kind} for kind in ("dinov2", "siglip", "clip")}
            options["dinov2"] |= {"side": 28}
            built[name] = ENCODERS[name](**options.get(name, {}))
        return built[name]

    return make


# (D, N, D') for a picture of 40 x 40
SHAPES = {
    "clip": (24, 16, 32),
    "dinov2": (32, 16, 32),
    "efflite0": (1280, 16, 1280),
    "inception": (2048, 289, 7),
    "pixels": (768, 256, 3),
    "siglip": (32, 16, 32),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_contract(build, name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder = build(name)
    images = torch.rand(2, 3, 40, 40)
    found = encoder(images)
    dim, tokens, width = SHAPES[name]
    assert found.pooled.shape == (2, dim)
    assert found.tokens.shape == (2, tokens, width)
    assert found.pooled.std() > 1e-4, "pictures make no difference"
    encoder.train()
    assert not any(module.training for module in encoder.modules())
    assert not any(p.requires_grad for p in encoder.parameters())
    grey = images[:, :1]
    assert torch.equal(encoder(grey).pooled, encoder(grey.repeat(1, 3, 1, 1)).pooled)
    again = encoder(images.flip(0)).pooled.flip(0)
    torch.testing.assert_close(again, found.pooled, rtol=1e-4, atol=1e-5)
    facts = encoder.fingerprint()
    assert facts["name"] == name
    assert facts["input"]
    if name != "pixels":
        assert encoder.id == f"{name}-{facts['weights_sha256'][:8]}"
    with pytest.raises(ValueError, match=r"images must be \(B, 3, H, W\)"):
        encoder(torch.rand(1, 4, 40, 40))


@pytest.mark.parametrize("name", [name for name in ENCODERS if name != "inception"])
def test_gradients_reach_the_pictures(build, name):
    """Encoders are losses as well; Inception rounds to 8 bits, as its protocol does."""
    images = torch.rand(1, 3, 40, 40, requires_grad=True)
    build(name)(images).pooled.square().sum().backward()
    assert images.grad is not None
    assert images.grad.abs().max() > 0


def test_efflite_knows_a_temple(build):
    """Real ImageNet weights and the right normalisation: the photograph of a Chinese temple shows such a building."""
    photographs = pytest.importorskip("sklearn.datasets").load_sample_images()
    image = torch.from_numpy(photographs.images[0].copy()).permute(2, 0, 1)[None].float() / 255
    buildings = {"bell cote": 442, "monastery": 663, "palace": 698, "stupa": 832}
    encoder = build("efflite0")
    assert encoder(image).logits.argmax().item() in buildings.values()
    small = image[..., :128, :160]
    stated = encoder.network.extract_features((small * 255 - 127) / 128).mean((2, 3))
    torch.testing.assert_close(encoder(small).pooled, stated, rtol=1e-4, atol=1e-4)


def test_any_function_is_an_encoder():
    encoder = AnyEncoder(lambda images: images.mean((2, 3)), "colour")
    assert encoder(torch.ones(2, 1, 4, 4)).pooled.tolist() == [[1, 1, 1]] * 2
    assert encoder.id == "colour"
    assert AnyEncoder(lambda x: Features(x.sum((1, 2, 3))[:, None], None), "sum")(torch.ones(1, 3, 2, 2)).pooled == 12


def test_resizing_is_pillows_filter():
    from PIL import Image

    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (40, 30), np.uint8)
    for side in (12, 48):
        size = (side, round(40 * side / 30))
        pillow = np.asarray(Image.fromarray(picture.astype(np.float32)).resize(size, Image.Resampling.BICUBIC))
        ours = resize_short_side(torch.from_numpy(picture)[None, None].float() / 255, side)[0, 0] * 255
        assert np.abs(ours.numpy() - pillow.clip(0, 255)).max() < 0.01
    assert three_channels(torch.ones(1, 1, 2, 2)).shape == (1, 3, 2, 2)


def test_inception_agrees_with_torch_fidelity(build, inception_file):
    """Features and unbiased logits bitwise; the spatial ones are those of the block's first branch, row by row."""
    from torch_fidelity import FeatureExtractorInceptionV3

    names = ["2048", "logits_unbiased", "768"]
    theirs = FeatureExtractorInceptionV3("inception-v3-compat", names, feature_extractor_weights_path=inception_file)
    levels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    pooled, logits, _ = theirs(levels)
    found = build("inception")(levels.float() / 255)
    assert torch.equal(found.pooled, pooled)
    assert torch.equal(found.logits, logits)
    block: list[torch.Tensor] = []
    theirs.Mixed_6d.register_forward_hook(lambda *call: block.append(call[-1]))
    theirs(levels)
    assert torch.equal(found.tokens.flatten(1), block[0][:, :7].permute(0, 2, 3, 1).flatten(1))


def test_missing_inception_says_which_file_goes_where(monkeypatch, tmp_path, inception_file):
    monkeypatch.delenv(inception_module.VARIABLE, raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ValueError, match=r"weights-inception-2015-12-05-6726825d\.pth .*starts with 6726825d") as told:
        ENCODERS["inception"]()
    assert str(tmp_path / "checkpoints") in str(told.value)
    monkeypatch.setenv(inception_module.VARIABLE, str(inception_file))
    with pytest.raises(ValueError, match="get the file again"):
        ENCODERS["inception"]()


def test_a_pickle_that_runs_code_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (tmp_path.joinpath("run").write_text, ("x",))

    torch.save({"Conv2d_1a_3x3.conv.weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(Exception, match=r"weights_only|Weights only"):
        ENCODERS["inception"](tmp_path / "evil.pth", check_hash=False)
    assert not (tmp_path / "run").exists()


def test_transformers_need_a_local_checkpoint(tmp_path):
    with pytest.raises(ValueError, match=r"is no folder here, and"):
        ENCODERS["dinov2"]("somebody/dinov2")


def test_an_incomplete_checkpoint_is_refused(folder, tmp_path):
    """transformers alone would fill it up with random numbers."""
    from safetensors.torch import load_file, save_file

    (tmp_path / "config.json").write_bytes((folder / "dinov2" / "config.json").read_bytes())
    weights = load_file(folder / "dinov2" / "model.safetensors")
    del weights["layernorm.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"holds no complete Dinov2Model; it lacks \['layernorm.weight'\]"):
        ENCODERS["dinov2"](tmp_path)


def test_clip_embeds_texts_beside_pictures(folder, build):
    """With a tokenizer of words: equal captions agree, others do not; the score of metrics takes both."""
    tokenizers = pytest.importorskip("tokenizers")
    words = {"<pad>": 0, "<unk>": 1, "<end>": 2, "a": 3, "cat": 4, "dog": 5}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model.post_processor = tokenizers.processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 2)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", unk_token="<unk>", eos_token="<end>"
    ).save_pretrained(folder / "clip")
    encoder = build("clip")
    first, again, other = encoder.texts(["a cat", "a cat", "a dog and a very long caption of many many words"])
    torch.testing.assert_close(first, again)
    assert (first - other).abs().max() > 1e-3
    pooled = encoder(torch.rand(3, 3, 28, 28)).pooled
    assert clip_score(pooled, torch.stack([first, again, other])).mean >= 0
    assert clip_score(pooled, pooled).mean == pytest.approx(100, rel=1e-5)


def test_weights_tell_encoders_apart(folder, tmp_path, build):
    other = transformers.Dinov2Model(transformers.Dinov2Config.from_pretrained(folder / "dinov2"))
    other.save_pretrained(tmp_path)
    first = build("dinov2").weights_sha256
    assert first != ENCODERS["dinov2"](tmp_path, side=28).weights_sha256
    assert len(first) == len(hashlib.sha256().hexdigest())
