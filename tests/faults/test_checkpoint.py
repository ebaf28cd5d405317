"""A checkpoint is whole or not there: what is promised, and what does not fit."""

from __future__ import annotations

import pytest
import torch

from tests.faults.checkpoints import CONFIG, bits, blank, check_loads, put, tensors
from untwine.training.checkpoint import (
    CheckpointError,
    latest,
    load,
    load_matching,
    read_config,
    save,
    verify,
)


def test_everything_comes_back_bitwise(path):
    assert check_loads(path) == 1
    assert read_config(path) == CONFIG
    assert {p.suffix for p in path.iterdir()} == {".json", ".safetensors"}
    sealed = verify(path)
    assert (sealed["step"], sealed["world_size"]) == (1, 1)
    assert {"torch", "untwine", "safetensors", "python"} <= sealed["versions"].keys()


def test_live_parameters_are_filled_in_place(root):
    layer = torch.nn.Linear(2, 2)
    own = {n: p.detach().clone() for n, p in layer.named_parameters()}
    path = save(root, 0, dict(layer.named_parameters()), {}, config={})
    with torch.no_grad():
        layer.weight.zero_()
    load(path, dict(layer.named_parameters()))
    assert all(torch.equal(p, own[n]) for n, p in layer.named_parameters())
    assert layer.weight.requires_grad


def test_old_ones_go_after_new_ones_came(root):
    for step in (1, 2, 10):
        put(root, step)
    assert sorted(p.name for p in root.iterdir()) == ["step-10", "step-2"]
    assert latest(root) == root / "step-10"


def test_the_same_step_is_replaced(root):
    put(root, 1)
    save(root, 1, {"other": torch.ones(1)}, {}, config={})
    assert [p.name for p in root.iterdir()] == ["step-1"]
    load(root / "step-1", {"other": torch.zeros(1)})


def test_an_abandoned_branch_is_set_aside(root, caplog):
    for step in (1, 2, 3):
        put(root, step, keep=3)
    put(root, 2)
    assert latest(root) == root / "step-2"
    (aside,) = root.glob("abandoned-step-3-*")
    assert check_loads(aside) == 3
    assert str(aside) in caplog.text


def test_nothing_there_is_none(root):
    assert latest(root) is None


@pytest.mark.parametrize(
    "change, message",
    [({"keep": 1}, "keep >= 2"), ({"step": -1}, "step >= 0"), ({"tensors": {}}, "tensors")],
)
def test_bad_arguments(root, change, message):
    arguments = {"step": 1, "tensors": tensors(1), "state": {}, "config": {}} | change
    with pytest.raises(ValueError, match=message):
        save(root, arguments.pop("step"), arguments.pop("tensors"), arguments.pop("state"), **arguments)
    assert not root.exists()


@pytest.mark.parametrize("argument", ["state", "config"])
def test_notes_must_be_json(root, argument):
    with pytest.raises(ValueError, match=f"{argument} must hold JSON"):
        save(root, 1, tensors(1), **({"state": {}, "config": {}} | {argument: {"a": torch.ones(1)}}))
    assert not root.exists()


def test_missing_and_unexpected_tensors_are_named(path):
    wanted = blank()
    wanted["model.W"] = wanted.pop("model.w")
    wanted |= {f"extra{i}": torch.zeros(1) for i in range(30)}
    with pytest.raises(CheckpointError) as caught:
        load(path, wanted)
    message = str(caught.value)
    assert "31 missing: " in message
    assert "1 unexpected: model.w (nearest: model.W)" in message
    assert message.count("extra") == 20
    assert "..." in message


@pytest.mark.parametrize("other", [torch.zeros(12), torch.zeros(4, 3, dtype=torch.float64), torch.zeros(3, 4)])
def test_other_shapes_and_dtypes(path, other):
    wanted = blank() | {"model.w": other}
    with pytest.raises(CheckpointError, match=r"model.w is \(4, 3\) torch.float32, wanted"):
        load(path, wanted)
    assert not any(bits(t).any() for t in wanted.values())


def test_fine_tuning_keeps_what_matches(root):
    path = save(
        root, 5, {"table": torch.ones(10, 2), "w": torch.ones(3).bfloat16(), "old": torch.ones(1)}, {}, config={}
    )
    for source in (path, root):
        wanted = {"table": torch.zeros(4, 2), "w": torch.zeros(3), "new": torch.zeros(1)}
        report = load_matching(source, wanted)
        assert (report.kept, report.reinitialised, report.unused) == (("w",), ("table", "new"), ("old",))
        assert torch.equal(wanted["w"], torch.ones(3))
        assert not wanted["table"].any()
    with pytest.raises(CheckpointError, match=r"nothing in .* has the name and shape"):
        load_matching(path, {"W": torch.zeros(3)})
