"""Damaged, hostile and foreign files, and folders that are taken: the rows of ``faults.py`` about what lies on disk.

Each function returns ``runs``, how many of them were ``refused`` (or survived), the longest time that took, and what
the fault cost.
"""

from __future__ import annotations

import pickle
import random
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tests.faults.checkpoints import blank, put
from tests.faults.test_damaged_checkpoints import HOSTILE, TENSORS, Payload, sealed
from tests.tiny import tiny

from untwine.data.loading import Loader
from untwine.training.checkpoint import CheckpointError, load, verify
from untwine.training.locking import FolderInUse, lock
from untwine.training.trainer import Trainer

PICKLES = (".metadata", "a.pt", "a.bin", "a.ckpt", "a.pkl", "__0_0.distcp", TENSORS, "more.safetensors")


def refused(attempts: Iterable[Callable[[], Any]], *errors: type[Exception]) -> dict[str, Any]:
    """How many attempts end in one of ``errors``, and how long the slowest takes."""
    counts, slowest = [], 0.0
    for attempt in attempts:
        started = time.perf_counter()
        try:
            attempt()
        except errors:
            counts.append(True)
        else:
            counts.append(False)
        slowest = max(slowest, time.perf_counter() - started)
    return {"runs": len(counts), "refused": sum(counts), "worst_seconds": round(slowest, 3)}


def _altered(path: Path, work: Path, name: str, change: Callable[[bytes], bytes]) -> Callable[[], Any]:
    """An attempt to verify a copy of the checkpoint in which one file is another."""

    def attempt() -> None:
        copy = work / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(path, copy)
        (copy / name).write_bytes(change((path / name).read_bytes()))
        verify(copy)

    return attempt


def truncations(work: Path) -> dict[str, Any]:
    """Every file of a small checkpoint, cut at every byte."""
    path = put(work, 1)
    return refused(
        (
            _altered(path, work, file.name, lambda raw, n=length: raw[:n])
            for file in sorted(path.iterdir())
            for length in range(file.stat().st_size)
        ),
        CheckpointError,
    )


def flipped_bits(work: Path) -> dict[str, Any]:
    """A thousand single bits, anywhere in a checkpoint."""
    path, rng = put(work, 1), random.Random(0)
    files = sorted(path.iterdir())

    def flip() -> Callable[[], Any]:
        file = rng.choice(files)
        at, bit = rng.randrange(file.stat().st_size), 1 << rng.randrange(8)
        return _altered(path, work, file.name, lambda raw: raw[:at] + bytes([raw[at] ^ bit]) + raw[at + 1 :])

    return refused((flip() for _ in range(1000)), CheckpointError)


def pickles(work: Path) -> dict[str, Any]:
    """Code in a pickle, under eight names, under a manifest that lists it or not."""
    marker = work / "executed"

    def attempt(name: str, seal: bool) -> None:
        folder = work / f"{name}-{seal}"
        path = put(folder, 1)
        (path / name).write_bytes(pickle.dumps(Payload(marker)))
        load(sealed(path) if seal else path, blank())

    attempts = (lambda n=name, s=seal: attempt(n, s) for name in PICKLES for seal in (False, True))
    return {**refused(attempts, CheckpointError), "code_ran": marker.exists()}


def hostile(work: Path) -> dict[str, Any]:
    """Headers of 2^64 bytes, overlaps, holes, a million tensors, deep JSON and the like, without hashes."""

    def attempt(number: int, raw: bytes) -> Callable[[], Any]:
        path = put(work / str(number), 1)
        (path / TENSORS).write_bytes(raw)
        sealed(path)
        return lambda: load(path, {"a": torch.zeros(1)}, verify=False)

    return refused([attempt(number, raw) for number, raw in enumerate(HOSTILE.values())], CheckpointError)


def folders(work: Path) -> dict[str, Any]:
    """A folder that cannot be written, and one in which another run lives."""
    (work / "file").write_text("")

    def second() -> None:
        with lock(work / "taken"):
            Trainer(tiny(), work / "taken").fit()

    return refused([lambda: Trainer(tiny(), work / "file" / "run").fit(), second], ValueError, FolderInUse)


def other_runs(work: Path) -> dict[str, Any]:
    """The same folder with another batch size, seed or learning rate, and after the data set has changed."""
    _pictures(work)
    data = {"data": {"kind": "folder", "root": str(work / "pictures"), "resolution": 16}, "train.validation": 0}
    data |= {"model.patch_size": 4}
    Trainer(tiny(**data, **{"train.num_steps": 2}), work / "run").fit()
    longer = {**data, "train.num_steps": 4}

    def changed_data() -> None:
        shutil.copy(work / "pictures" / "class-0" / "000.png", work / "pictures" / "class-0" / "another.png")
        Trainer(tiny(**longer), work / "run").fit()

    others = ({"train.batch_size": 32}, {"seed": 4}, {"optimizer.lr": 2e-3})
    attempts = [lambda c=change: Trainer(tiny(**longer, **c), work / "run").fit() for change in others]
    return refused([*attempts, changed_data], ValueError)


def corrupt_images(work: Path) -> dict[str, Any]:
    """Five of a hundred pictures are cut, empty or no pictures: batches stay full, and each is named once."""
    broken = {3: b"", 20: b"no picture", 41: b"\x89PNG\r\n\x1a\n", 60: None, 99: None}
    for k, file in enumerate(_pictures(work)):
        if k in broken:
            whole = file.read_bytes()
            file.write_bytes(broken[k] if broken[k] is not None else whole[: len(whole) // 2])
    data = {"kind": "folder", "root": str(work / "pictures"), "resolution": 16, "max_corrupt": 0.1}
    steps, started = 12, time.perf_counter()
    changes = {"data": data, "train.validation": 0, "train.num_steps": steps, "model.patch_size": 4}
    trainer = Trainer(tiny(**changes), work / "run")
    loader = Loader(trainer.training_set, trainer.codec, seed=3, batch_size=16)
    sizes = {len(batch.x0) for _, (batch,) in zip(range(steps), loader)}
    trainer.fit()
    return {
        "runs": 1,
        "survived": int(trainer.step == steps and sizes == {16}),
        "named": len(loader.corrupt),
        "steps_lost": 0,
        "worst_seconds": round(time.perf_counter() - started, 2),
    }


def _pictures(work: Path) -> list[Path]:
    """A hundred pictures of two classes."""
    files = [work / "pictures" / f"class-{k % 2}" / f"{k:03d}.png" for k in range(100)]
    for k, file in enumerate(files):
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (k, 255 - k, 128)).save(file)
    return files


ROWS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "checkpoint cut at every byte": truncations,
    "1000 flipped bits": flipped_bits,
    "code in pickles, 8 names, listed or not": pickles,
    "hostile safetensors": hostile,
    "folder read-only, or in use by another run": folders,
    "resumed with another batch size, seed, rate or data": other_runs,
    "5 corrupt pictures of 100": corrupt_images,
}
