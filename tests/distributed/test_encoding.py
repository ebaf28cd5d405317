"""A latent cache made by several processes: the files of one process, whatever happens on the way."""

from __future__ import annotations

import contextlib
import io
import json
import time

import pytest
import torch
import yaml

from tests.behaviour.pictures import folder_of
from tests.distributed import spawn
from tests.distributed.spawn import run_ranks
from tests.tiny import tiny
from tests.vaes import save_vae
from untwine.cli import main
from untwine.codecs.vae import VAECodec
from untwine.data import encoding
from untwine.data.base import CorruptImage
from untwine.data.encoding import Encoder
from untwine.data.folder import ImageFolder
from untwine.data.latents import MANIFEST, Latents
from untwine.training.distributed import Distributed, together

OPTIONS = {"batch_size": 2, "shard_size": 3}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Twenty pictures in seven shards, one of them unreadable, and the cache that one process makes of them."""
    root = tmp_path_factory.mktemp("encoding")
    save_vae(root / "vae")
    folder_of(root / "pictures" / "ant", 11)
    folder_of(root / "pictures" / "bee", 8)
    (root / "pictures" / "ant" / "5b.png").write_bytes(b"broken")
    run_ranks(by_one, 2, root, "one")
    return root


@pytest.fixture
def one_thread():
    """As the processes of the pool compute, so that results are theirs bit for bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def encoder_of(root, out, **options):
    pictures = ImageFolder(root / "pictures", 8, flip=True, **{"max_corrupt": 0.1, **options})
    return Encoder(pictures, VAECodec(str(root / "vae"), mean=(0.0,), std=(1.0,)), root / out, **OPTIONS)


def by_one(processes, root, out):
    if processes.is_main:
        encoder_of(root, out).run()


def by_all(processes, root, out, **options):
    heard = []
    encoder = encoder_of(root, out, **options)
    encoder.run(heard.append, rank=processes.rank, world_size=processes.world_size, together=together)
    return heard, encoder.manifest


def same_files(a, b):
    assert sorted(file.name for file in a.iterdir()) == sorted(file.name for file in b.iterdir())
    for file in a.iterdir():
        assert file.read_bytes() == (b / file.name).read_bytes(), file.name


def test_the_files_are_those_of_one_process(root):
    told = run_ranks(by_all, 2, root, "two")
    same_files(root / "one", root / "two")
    assert [heard for heard, _ in told] == [[6, 12, 18, 20]] * 2
    manifest = json.loads((root / "one" / MANIFEST).read_text())
    assert all(theirs == manifest for _, theirs in told)
    assert list(manifest["skipped"]) == ["7"]
    assert len(Latents(root / "two")) == 19


def break_off(processes, root, who, after):
    """Ends a run before one process gives its file number ``after`` a name; how many shards the manifest then has.

    Then one or two processes go on.
    """
    out, left, commit = f"broken-{who}-{after}", [after], encoding._commit

    def breaking(path, write):
        left[0] -= 1
        if left[0] < 0 and processes.rank == who:
            path.with_name(f".{path.name}.tmp").write_bytes(b"torn")
            raise InterruptedError("broken off")
        commit(path, write)

    encoding._commit = breaking
    try:
        with contextlib.suppress(InterruptedError):
            by_all(processes, root, out)
    finally:
        encoding._commit = commit
    path = root / out / MANIFEST
    shards = sum(map(bool, json.loads(path.read_text())["shards"])) if path.exists() else None
    processes.barrier()
    [by_one, by_all][after % 2](processes, root, out)
    return shards


def test_a_run_broken_off_at_any_moment_goes_on(root):
    # rank 0 commits shard and manifest in each of four rounds and then the statistics; rank 1 three shards
    cases = [(0, after) for after in range(10)] + [(1, after) for after in range(3)]
    shards = [run_ranks(break_off, 2, root, *case)[0] for case in cases]
    assert shards == [None, None, 2, 2, 4, 4, 6, 6, 7, 7, None, 2, 4]
    for who, after in cases:
        same_files(root / "one", root / f"broken-{who}-{after}")


def fail(processes, root, kind):
    def fails(*args):
        raise RuntimeError("no memory left on this device")

    told = []
    try:
        if kind == "device":
            encoder = encoder_of(root, kind)
            if processes.rank == 1:
                encoder._make_shard = fails
            encoder.run(told.append, rank=processes.rank, world_size=2, together=together)
        else:
            by_all(processes, root, kind, max_corrupt=0.04)
    except (RuntimeError, CorruptImage) as error:
        return type(error).__name__, str(error), told
    return None


def test_the_error_of_one_process_ends_all_with_its_message(root):
    for answers in (run_ranks(fail, 2, root, "device"), run_ranks(fail, 2, root, "corrupt")):
        assert answers[0] == answers[1]
    device, corrupt = (run_ranks(fail, 2, root, kind)[0] for kind in ("device", "corrupt"))
    assert device == ("RuntimeError", "no memory left on this device", [])
    assert corrupt[0] == "CorruptImage"
    assert "1 of 20 samples are corrupt, more than max_corrupt = 0.04" in corrupt[1]
    assert "ant/5b.png" in corrupt[1]


def command(processes: Distributed, recipe, out, *args):
    said, erred = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(erred):
        status = main(
            ["data", "encode", str(recipe), "--out", str(out), "--batch-size", "2", "--shard-size", "3", *args]
        )
    return status, said.getvalue(), erred.getvalue()


def test_the_command_is_said_once_and_leaves_the_recipe(root, tmp_path):
    data = tiny(
        data={"kind": "folder", "root": str(root / "pictures"), "resolution": 8, "flip": True, "max_corrupt": 0.1},
        codec={"kind": "vae", "path": str(root / "vae"), "mean": [0.0], "std": [1.0]},
    ).to_dict()
    recipe, out = tmp_path / "mine.yaml", tmp_path / "cache"
    recipe.write_text(yaml.safe_dump(data, sort_keys=False))
    answers = run_ranks(command, 2, recipe, out)
    assert [status for status, _, _ in answers] == [0, 0], answers
    assert f"{out}: 19 samples" in answers[0][1]
    assert answers[1][1] == ""
    assert yaml.safe_load((out / "recipe.yaml").read_text())["data"] == {"kind": "latents", "root": str(out)}
    for file in (root / "one").glob("latents-*"):
        assert file.read_bytes() == (out / file.name).read_bytes()
    wrong = run_ranks(command, 2, recipe, out, "--dtype", "bfloat16")
    assert [status for status, _, _ in wrong] == [2, 2]
    assert "holds a cache of other data or settings: dtype" in wrong[0][2]


def slowly(processes, root, out):
    make = Encoder._make_shard
    Encoder._make_shard = lambda *args: time.sleep(0.2) or make(*args)
    by_all(processes, root, out)


def test_a_killed_run_goes_on(root, one_thread):
    pool, out = spawn._pools[2], root / "killed"
    for connection in pool.connections:
        connection.send((slowly, (root, "killed")))
    deadline = time.monotonic() + 60
    while len(list(out.glob("latents-*"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    for process in pool.processes:
        process.kill()
    spawn.close()
    assert 3 <= len(list(out.glob("latents-*"))) < 7
    encoder_of(root, "killed").run()
    same_files(root / "one", out)
