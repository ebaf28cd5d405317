"""The latent cache: what is stored, what is refused, and that training from it is training on the pictures."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.behaviour.pictures import folder_of, picture, save
from tests.tiny import tiny
from tests.vaes import save_vae
from untwine.codecs.identity import IdentityCodec
from untwine.codecs.vae import VAECodec
from untwine.data.base import CorruptImage
from untwine.data.encoding import Encoder
from untwine.data.folder import ImageFolder
from untwine.data.latents import MANIFEST, Latents, LatentsError
from untwine.data.loading import Loader
from untwine.diffusion.draws import Draws
from untwine.training.metering import read_log
from untwine.training.trainer import Trainer

UNIT = {"mean": (0.0,), "std": (1.0,)}


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """Factor 2, four channels; without scaling, its latents have about unit deviation."""
    return str(save_vae(tmp_path_factory.mktemp("vae") / "vae"))


@pytest.fixture
def pictures(tmp_path):
    for name, count in {"ant": 7, "bee": 6}.items():
        folder_of(tmp_path / "pictures" / name, count)
    return tmp_path / "pictures"


@pytest.fixture
def codec(vae):
    return VAECodec(vae, **UNIT)


def encode(pictures, codec, out, folder=None, **options):
    folder = {"resolution": 8, **(folder or {})}
    Encoder(ImageFolder(pictures, **folder), codec, out, **{"batch_size": 3, "shard_size": 5, **options}).run()
    return out


def moments_of(codec, x):
    encoding = codec.encode(x[None])
    return torch.cat([encoding.mean, encoding.std], 1)[0]


def test_a_cache_holds_the_posterior_of_every_sample(pictures, codec, tmp_path):
    cache, folder = Latents(encode(pictures, codec, tmp_path / "cache")), ImageFolder(pictures, 8)
    assert len(cache) == 13
    assert cache.sample_shape == (8, 4, 4)
    assert cache.names == folder.files
    assert cache.labels.tolist() == folder.labels.tolist()
    assert (cache.class_names, cache.num_classes) == (("ant", "bee"), 2)
    assert cache.captions is None
    for i in range(13):
        assert torch.allclose(cache.read(i), moments_of(codec, folder.read(i)), atol=1e-5)
    shards = sorted(file.name for file in (tmp_path / "cache").iterdir())
    assert shards == [f"latents-0000{i}-of-00003.safetensors" for i in range(3)] + [MANIFEST]
    stored = load_file(tmp_path / "cache" / shards[1])
    assert stored["position"].tolist() == [5, 6, 7, 8, 9]
    assert stored["moments"].shape == (5, 1, 2, 4, 4, 4)
    assert json.loads(json.dumps(cache.fingerprint())) == cache.fingerprint()


def test_statistics_are_those_of_the_latents(pictures, codec, tmp_path):
    cache = Latents(encode(pictures, codec, tmp_path / "cache"))
    draws = Draws(0)
    bound = cache.bind(codec)
    x = torch.stack([cache.read(i) for i in range(13)])
    drawn = torch.cat([bound.encode(x, draws=draws, index=torch.arange(13) + 13 * k).latents for k in range(300)])
    statistics = cache.manifest["statistics"]
    for got, expected in (("mean", drawn.mean((0, 2, 3))), ("std", drawn.std((0, 2, 3)))):
        assert torch.allclose(torch.tensor(statistics[got]), expected, atol=0.02), got
    assert statistics["overall_std"] == pytest.approx(float(drawn.std()), abs=0.02)


def test_captions_groups_and_bfloat16(tmp_path, codec):
    folder_of(tmp_path / "pictures", 6)
    for i in range(6):
        (tmp_path / "pictures" / f"{i}.txt").write_text(f"number {i}")
    folder = ImageFolder(tmp_path / "pictures", 8)
    folder.groups = np.array([0, 0, 1, 1, 2, 2])
    Encoder(folder, codec, tmp_path / "cache", dtype="bfloat16", shard_size=4).run()
    cache = Latents(tmp_path / "cache")
    assert cache.captions == folder.captions
    assert cache.groups.tolist() == folder.groups.tolist()
    exact = moments_of(codec, folder.read(3))
    assert torch.equal(cache.read(3), exact.bfloat16().float())
    held = cache.split(2, seed=0)[1]
    assert sorted(held.groups.tolist()) in ([0, 0], [1, 1], [2, 2])


def test_mirrored_samples_are_kept_where_the_source_flips(pictures, codec, tmp_path):
    cache = Latents(encode(pictures, codec, tmp_path / "cache", {"flip": True}))
    folder, draws = ImageFolder(pictures, 8, flip=True), Draws(3)
    assert torch.allclose(cache.read(2), moments_of(codec, folder.read(2)), atol=1e-5)
    seen = set()
    for index in range(12):
        expected = folder.read(2, draws=draws, index=index)
        seen.add(torch.equal(expected, folder.read(2)))
        assert torch.allclose(cache.read(2, draws=draws, index=index), moments_of(codec, expected), atol=1e-5)
    assert seen == {True, False}


def test_a_random_crop_cannot_be_kept(pictures, codec, tmp_path):
    with pytest.raises(ValueError, match=r"data\.crop is 'random'.*set data\.crop to center"):
        encode(pictures, codec, tmp_path / "cache", {"crop": "random"})


def test_a_deterministic_codec_keeps_one_value(pictures, tmp_path):
    codec = IdentityCodec(scale=2.0)
    cache = Latents(encode(pictures, codec, tmp_path / "cache"))
    assert cache.sample_shape == (3, 8, 8)
    x = ImageFolder(pictures, 8).read(4)
    assert torch.equal(cache.bind(codec).encode(cache.read(4)[None]).latents[0], x * 2)


def test_batches_from_the_cache_are_those_from_the_pictures(pictures, codec, tmp_path):
    cache, folder = (
        Latents(encode(pictures, codec, tmp_path / "cache", {"flip": True})),
        ImageFolder(pictures, 8, flip=True),
    )
    for workers in (0, 1):
        both = [
            iter(Loader(source, source.bind(codec), seed=5, batch_size=6, accumulation=2, num_workers=workers))
            for source in (folder, cache)
        ]
        for _ in range(4):
            for a, b in zip(*map(next, both)):
                assert torch.allclose(a.x0, b.x0, atol=1e-5)
                assert torch.equal(a.index, b.index)
                assert torch.equal(a.condition.labels, b.condition.labels)
        for stream in both:
            stream.close()


def test_training_from_the_cache_equals_training_on_the_pictures(pictures, vae, tmp_path):
    encode(pictures, VAECodec(vae, **UNIT), tmp_path / "cache", {"flip": True})
    runs = {}
    for name, data in {
        "pictures": {"kind": "folder", "root": str(pictures), "resolution": 8, "flip": True},
        "cache": {"kind": "latents", "root": str(tmp_path / "cache")},
    }.items():
        changes = {"data": data, "codec": {"kind": "vae", "path": vae, "mean": [0.0], "std": [1.0]}}
        changes |= {"train.batch_size": 6, "train.num_steps": 6, "train.validation": 4, "train.log_every": 1}
        trainer = Trainer(tiny(**changes), tmp_path / name, device="cpu")
        trainer.fit()
        runs[name] = trainer
    a, b = (dict(runs[name].networks.model.named_parameters()) for name in runs)
    moved = sum(float((a[n] - p).detach().square().sum()) for n, p in b.items()) ** 0.5
    assert moved <= 1e-4 * sum(float(p.detach().square().sum()) for p in a.values()) ** 0.5
    logs = [read_log(tmp_path / name / "log.jsonl", "train") for name in runs]
    assert [line["loss"] for line in logs[0]] == pytest.approx([line["loss"] for line in logs[1]], rel=1e-4)
    assert runs["cache"].metrics["validation_loss"] == pytest.approx(runs["pictures"].metrics["validation_loss"], 1e-4)
    assert runs["cache"].latent_shape == runs["pictures"].latent_shape == (4, 4, 4)
    assert runs["cache"].codec.codec._module is None  # the autoencoder is not even loaded


def test_pictures_are_drawn_while_training_from_a_cache(pictures, codec, vae, tmp_path):
    encode(pictures, codec, tmp_path / "cache")
    changes = {"data": {"kind": "latents", "root": str(tmp_path / "cache")}}
    changes |= {"codec": {"kind": "vae", "path": vae, "mean": [0.0], "std": [1.0]}, "train.sample_every": 2}
    changes |= {"train.batch_size": 4, "train.num_steps": 2, "train.validation": 4}
    Trainer(tiny(**changes), tmp_path / "run", device="cpu").fit()
    assert [file.name for file in (tmp_path / "run").rglob("*.png")] != []


def test_another_codec_is_refused_by_the_field_that_differs(pictures, codec, vae, tmp_path):
    cache = Latents(encode(pictures, codec, tmp_path / "cache", made_by={"kind": "vae", "path": vae}))
    other = str(save_vae(tmp_path / "other", seed=1))
    cases = {
        "weights: '": VAECodec(other, **UNIT),
        r"std: \[1\.0\] -> \[2\.0\]": VAECodec(vae, mean=(0.0,), std=(2.0,)),
        "dtype: 'float32' -> 'bfloat16'": VAECodec(vae, dtype="bfloat16", **UNIT),
        "class: 'AutoencoderKL' -> 'IdentityCodec'": IdentityCodec(),
    }
    for field, given in cases.items():
        with pytest.raises(ValueError, match=f"differs in .*{field}.*made with: .*'path': '{vae}'"):
            cache.bind(given)


def test_a_broken_off_run_goes_on(pictures, codec, tmp_path, monkeypatch):
    encoder = Encoder(ImageFolder(pictures, 8), codec, tmp_path / "cache", batch_size=3, shard_size=5)
    reads = []
    monkeypatch.setattr(encoder, "_make_shard", stop_after(2, encoder._make_shard))
    with pytest.raises(KeyboardInterrupt):
        encoder.run()
    with pytest.raises(LatentsError, match=r"is incomplete \(2 shards so far\); run the same untwine data encode"):
        Latents(tmp_path / "cache")
    (tmp_path / "cache" / ".latents-00002-of-00003.safetensors.tmp").write_bytes(b"half a shard")
    whole = encode(pictures, codec, tmp_path / "whole")
    again = Encoder(ImageFolder(pictures, 8), codec, tmp_path / "cache", batch_size=3, shard_size=5)
    monkeypatch.setattr(again, "_make_shard", lambda *args: reads.append(args) or Encoder._make_shard(again, *args))
    again.run()
    assert [positions for _, positions in reads] == [range(10, 13)]
    assert {file.name for file in whole.iterdir()} == {file.name for file in (tmp_path / "cache").iterdir()}
    for file in whole.iterdir():
        assert file.read_bytes() == (tmp_path / "cache" / file.name).read_bytes()


def stop_after(count, make):
    left = [count]

    def made(*args):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return make(*args)

    return made


def test_other_data_or_settings_are_refused(pictures, codec, tmp_path):
    encode(pictures, codec, tmp_path / "cache")
    cases = {
        r"sample_shape: \[3, 8, 8\] -> \[3, 16, 16\]": {"folder": {"resolution": 16}},
        "flips: False -> True": {"folder": {"flip": True}},
        "dtype: 'float32' -> 'bfloat16'": {"dtype": "bfloat16"},
        "shard_size: 5 -> 6": {"shard_size": 6},
        "class_names": {"folder": {"layout": "flat"}},
    }
    for field, options in cases.items():
        with pytest.raises(ValueError, match=f"holds a cache of other data or settings: .*{field}"):
            encode(pictures, codec, tmp_path / "cache", **options)
    (pictures / "ant" / "0.png").rename(pictures / "ant" / "new.png")
    with pytest.raises(ValueError, match=r"source\.names: .*gone: ant/0\.png; new: ant/new\.png"):
        encode(pictures, codec, tmp_path / "cache")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other files; choose an empty or a new folder"):
        encode(pictures, codec, tmp_path / "full")
    with pytest.raises(ValueError, match="batch_size and shard_size must be >= 1, got 0 and 5"):
        encode(pictures, codec, tmp_path / "none", batch_size=0)


def test_damage_is_named_and_repaired(pictures, codec, tmp_path):
    root = encode(pictures, codec, tmp_path / "cache")
    shard = root / "latents-00001-of-00003.safetensors"
    good = shard.read_bytes()

    def refused(message, content):
        if content is None:
            shard.unlink()
        else:
            shard.write_bytes(content)
        with pytest.raises(LatentsError, match=message):
            [Latents(root).read(i) for i in range(13)]
        encode(pictures, codec, root)
        assert shard.read_bytes() == good

    refused(r"latents-00001-of-00003\.safetensors is missing", None)
    refused(rf"latents-00001.*: expected {len(good)} bytes, found {len(good) - 9}", good[:-9])
    refused(r"latents-00001.* cannot be read", bytes(len(good)))
    tensors = load_file(shard)
    flipped = bytearray(good)
    flipped[good.index(tensors["moments"].numpy().tobytes()) + 4 * 4 * 4 * 2 * 4 * 2 + 3] ^= 0x10  # in row 2
    shard.write_bytes(flipped)
    cache = Latents(root)
    cache.read(5)
    with pytest.raises(LatentsError, match=r"latents-00001.* is damaged at row 2: remove it"):
        cache.read(7)
    save_file({k: v[:4].clone() for k, v in tensors.items()}, shard)
    manifest = json.loads((root / MANIFEST).read_text())
    manifest["shards"][1]["bytes"] = shard.stat().st_size
    (root / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(LatentsError, match="holds 4 samples, the manifest says 5"):
        Latents(root)


def test_no_cache_and_a_damaged_manifest(tmp_path):
    with pytest.raises(LatentsError, match=r"holds no cache of latents.*untwine data encode RECIPE --out"):
        Latents(tmp_path)
    for text in ("{", "[]", "{}", '{"format": "other", "shards": []}'):
        (tmp_path / MANIFEST).write_text(text)
        with pytest.raises(LatentsError, match=r"manifest\.json is damaged"):
            Latents(tmp_path)


def test_corrupt_pictures_are_left_out_and_named(pictures, codec, tmp_path, caplog):
    (pictures / "ant" / "bad.png").write_bytes(b"no image")
    cache = Latents(encode(pictures, codec, tmp_path / "cache", {"max_corrupt": 0.1}))
    assert len(cache) == 13
    assert "ant/bad.png" not in cache.names
    assert list(cache.manifest["skipped"]) == ["7"]
    assert caplog.text.count("corrupt sample left out: ") == 1
    position = cache.names.index("bee/0.png")
    assert torch.allclose(
        cache.read(position), moments_of(codec, ImageFolder(pictures, 8).read(position + 1)), atol=1e-5
    )
    with pytest.raises(CorruptImage, match=r"1 of 14 samples are corrupt, more than max_corrupt = 0\.01"):
        encode(pictures, codec, tmp_path / "strict")


def test_latents_of_an_unusual_deviation_are_warned_of(pictures, vae, tmp_path, caplog):
    root = encode(pictures, VAECodec(vae, mean=(0.0,), std=(50.0,)), tmp_path / "cache")
    assert "outside 0.5-2" in caplog.text
    caplog.clear()
    Latents(root)
    assert f"the latents in {root} have a standard deviation of" in caplog.text


def test_an_estimate_writes_nothing(pictures, codec, tmp_path):
    encoder = Encoder(ImageFolder(pictures, 8), codec, tmp_path / "cache", batch_size=3)
    told = encoder.estimate()
    assert not (tmp_path / "cache").exists()
    encoder.run()
    stored = load_file(tmp_path / "cache" / "latents-00000-of-00001.safetensors")["moments"]
    assert told.num_bytes == stored.numel() * 4
    assert (told.samples, told.seconds > 0) == (13, True)


def test_a_full_disk_is_noticed_before(pictures, codec, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 100))
    with pytest.raises(LatentsError, match=r"6656 bytes are needed for the cache, 100 are free"):
        encode(pictures, codec, tmp_path / "cache")


def test_pictures_of_any_size_come_from_the_same_preparation(tmp_path, codec):
    save(tmp_path / "pictures" / "wide.png", picture(0, 20, 50))
    cache = Latents(encode(tmp_path / "pictures", codec, tmp_path / "cache", {"max_corrupt": 0.0}))
    assert torch.allclose(cache.read(0), moments_of(codec, ImageFolder(tmp_path / "pictures", 8).read(0)), atol=1e-5)
