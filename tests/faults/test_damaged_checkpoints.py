"""Truncated, altered and malicious checkpoints are refused, and nothing in them runs."""

from __future__ import annotations

import builtins
import contextlib
import json
import logging
import os
import pickle
import random
import shutil
import struct
import time
import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save as to_safetensors

from tests.faults.checkpoints import blank, check_loads, put
from untwine.training import manifest
from untwine.training.checkpoint import (
    CheckpointError,
    latest,
    load,
    load_matching,
    read_state,
    verify,
)


class Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self):
        return (builtins.exec, (f"open({self.marker!r}, 'w').close()",))


def sealed(path: Path) -> Path:
    """Gives a folder a manifest that fits, as an attacker would."""
    (path / "manifest.json").unlink()
    names = [file.name for file in path.iterdir()]
    (path / "manifest.json").write_bytes(manifest.compose(1, 1, manifest.fingerprints(path, names)))
    return path


TENSORS = "shard-00001-model-00001-of-00001.safetensors"


def damaged(path: Path, copy: Path, name: str, change) -> Path:
    shutil.copytree(path, copy, dirs_exist_ok=True)
    (copy / name).write_bytes(change((path / name).read_bytes()))
    return copy


def test_every_truncation_is_found(path, tmp_path):
    for file in path.iterdir():
        size = file.stat().st_size
        for length in {*range(0, size, max(1, size // 60)), *range(min(9, size)), size - 1}:
            with pytest.raises(CheckpointError, match=file.name):
                verify(damaged(path, tmp_path / "copy", file.name, lambda raw, n=length: raw[:n]))
        shutil.rmtree(tmp_path / "copy")


def test_every_flipped_bit_is_found(path, tmp_path):
    rng = random.Random(0)
    files = sorted(path.iterdir())
    for _ in range(200):
        file = rng.choice(files)
        position, bit = rng.randrange(file.stat().st_size), 1 << rng.randrange(8)

        def flip(raw, at=position, bit=bit):
            return raw[:at] + bytes([raw[at] ^ bit]) + raw[at + 1 :]

        copy = damaged(path, tmp_path / "copy", file.name, flip)
        with pytest.raises(CheckpointError):
            load(copy, blank())
        shutil.rmtree(copy)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_change_loads_equal_or_raises_our_error(path, tmp_path, data):
    """Under a manifest made to fit, what slips through is at most the values themselves."""
    file = data.draw(st.sampled_from(sorted(path.iterdir())))
    raw = file.read_bytes()
    start = data.draw(st.integers(0, len(raw) - 1) | st.integers(0, min(1500, len(raw) - 1)))
    length = data.draw(st.integers(0, min(8, len(raw) - start)))
    new = (
        raw[:start]
        + data.draw(st.binary(min_size=length, max_size=length) | st.binary(max_size=8))
        + raw[start + length :]
    )
    copy = damaged(path, tmp_path / "copy", file.name, lambda _: new)
    try:
        if new != raw:
            with pytest.raises(CheckpointError):
                load(copy, blank())
        if file.name != "manifest.json":
            with contextlib.suppress(CheckpointError):
                load(sealed(copy), blank())
    finally:
        shutil.rmtree(copy)


def test_the_newest_undamaged_one_is_taken(root, caplog):
    put(root, 1)
    put(root, 2)
    file = next((root / "step-2").glob("*.safetensors"))
    size = file.stat().st_size
    os.truncate(file, size - 1)
    with caplog.at_level(logging.WARNING):
        assert check_loads(latest(root)) == 1
    assert f"{file}: expected {size} bytes, found {size - 1}" in caplog.text


def test_a_folder_of_damaged_ones_is_no_fresh_start(root):
    (put(root, 1) / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints"):
        latest(root)


def test_missing_files_and_strangers(path):
    (path / ".DS_Store").write_bytes(b"")
    assert check_loads(path) == 1
    (path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"does not list: \['notes.txt'\]"):
        verify(path)
    (path / "notes.txt").unlink()
    (path / "state.json").unlink()
    with pytest.raises(CheckpointError, match=r"state.json: expected \d+ bytes, found None"):
        verify(path)


def test_what_is_no_checkpoint(tmp_path):
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match=r"is no checkpoint: manifest\.json cannot be read"):
            load(place, blank())


@pytest.mark.parametrize("seal", [False, True], ids=["", "listed"])
@pytest.mark.parametrize(
    "name", [".metadata", "a.pt", "a.bin", "a.ckpt", "a.pkl", "__0_0.distcp", TENSORS, "more.safetensors"]
)
def test_pickles_are_never_opened(path, tmp_path, name, seal):
    marker = tmp_path / "executed"
    (path / name).write_bytes(pickle.dumps(Payload(marker)))
    if seal:
        sealed(path)
    for attempt in (load, load_matching):
        with pytest.raises(CheckpointError):
            attempt(path, blank())
    assert not marker.exists()
    pickle.loads(pickle.dumps(Payload(marker)))
    assert marker.exists(), "the payload works"


def test_a_pickle_is_no_state(path, tmp_path):
    (path / "state.json").write_bytes(pickle.dumps(Payload(tmp_path / "executed")))
    with pytest.raises(CheckpointError, match=r"state\.json is not JSON"):
        read_state(sealed(path))
    assert not (tmp_path / "executed").exists()


def header(entries: dict, data: bytes = b"", claim: int | None = None) -> bytes:
    raw = json.dumps(entries).encode()
    return struct.pack("<Q", len(raw) if claim is None else claim) + raw + data


def entry(shape, start, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def sharding(**offsets) -> dict:
    return {"__metadata__": {"DCP_SHARDING_INFO": json.dumps({n: {"saved_offsets": o} for n, o in offsets.items()})}}


HOSTILE = {
    "header of 2^64 bytes": header({}, claim=2**64 - 1),
    "header larger than its file": header({}, claim=10**6),
    "header of 90 MB": struct.pack("<Q", 90 * 2**20) + b" " * (90 * 2**20),
    "10^6 tiny tensors": header({f"tensor{i}": entry([0], 0, 0) for i in range(10**6)}),
    "overlapping": header({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, b"0" * 12),
    "hole": header({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, b"0" * 12),
    "size of another dtype": header({"a": entry([2], 0, 8, "F64")}, b"0" * 8),
    "unknown dtype": header({"a": entry([2], 0, 8, "X9")}, b"0" * 8),
    "beyond the end": header({"a": entry([200], 0, 800)}, b"0" * 8),
    "product that overflows": header({"a": entry([2**62, 4], 0, 8)}, b"0" * 8),
    "not JSON": struct.pack("<Q", 4) + b"{{{{",
    "deep JSON": header({}, b"")[:0] + struct.pack("<Q", 10**5) + b"[" * 10**5,
    "empty file": b"",
    "pickle": pickle.dumps({"a": 1}),
    "part far outside": header(sharding(a=[2**40]) | {"a": entry([1], 0, 4)}, b"0" * 4),
    "part before the start": header(sharding(a=[-1]) | {"a": entry([2], 0, 8)}, b"0" * 8),
    "parts of no tensor": header(sharding(b=[0]) | {"a": entry([1], 0, 4)}, b"0" * 4),
    "parts that are no numbers": header(sharding(a=["x"]) | {"a": entry([1], 0, 4)}, b"0" * 4),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_safetensors_are_refused_fast(path, name):
    (path / TENSORS).write_bytes(HOSTILE[name])
    sealed(path)
    tracemalloc.start()
    start = time.perf_counter()
    with pytest.raises(CheckpointError):
        load(path, {"a": torch.zeros(1)}, verify=False)
    seconds, peak = time.perf_counter() - start, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seconds < 1
    assert peak < 2 * max(2**20, len(HOSTILE[name]))


def test_parts_of_one_tensor_in_two_files_must_add_up(path):
    first, second = torch.zeros(2), torch.zeros(3)
    for file, part, offset in ((TENSORS, first, 0), ("b.safetensors", second, 4)):
        info = sharding(a=[offset])["__metadata__"]
        (path / file).write_bytes(to_safetensors({"a": part}, info))
    sealed(path)
    with pytest.raises(CheckpointError, match=r"the parts of a do not add up to its shape \(7,\)"):
        load(path, {"a": torch.zeros(7)})


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "..", "a/../b.safetensors", "x\x00.safetensors", ".hidden.safetensors"]
)
def test_names_that_lead_out_of_the_folder(path, name):
    entries = manifest.fingerprints(path, ["state.json", "config.json"]) | {name: {"size": 1, "sha256": ""}}
    (path / "manifest.json").write_bytes(manifest.compose(1, 1, entries))
    with pytest.raises(CheckpointError, match="lists"):
        verify(path)


@pytest.mark.parametrize("files", [None, [], {"state.json": 1}, {"state.json": {"size": "1", "sha256": ""}}])
def test_manifests_of_another_form(path, files):
    body = json.loads((path / "manifest.json").read_bytes()) | {"files": files}
    (path / "manifest.json").write_bytes(manifest._signed(body))
    with pytest.raises(CheckpointError, match="each with a size and a sha256"):
        verify(path)
