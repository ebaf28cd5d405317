"""A plan against what training really takes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.tiny import tiny
from untwine.cli import main
from untwine.contracts import Condition
from untwine.training.planning import plan
from untwine.training.recipe import Recipe
from untwine.training.trainer import Trainer


def trained(tmp_path, **train) -> tuple[Recipe, Trainer]:
    recipe = tiny()
    recipe = replace(recipe, train=replace(recipe.train, num_steps=2, **train))
    trainer = Trainer(recipe, tmp_path / "run")
    trainer.fit()
    return trainer.recipe, trainer


def kept_for_backward(model, batch: int, shape: tuple[int, ...]) -> int:
    """Bytes of the distinct storages that autograd keeps, parameters apart."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(torch.randn(batch, *shape), torch.rand(batch), Condition(labels=torch.zeros(batch, dtype=torch.int64)))
    return sum(size for size, _ in kept.values())


def test_bytes_are_those_of_a_real_run(tmp_path):
    recipe, trainer = trained(tmp_path)
    found, networks = plan(recipe, trainer.latent_shape), trainer.networks
    size = 4 * sum(p.numel() for p in networks.model.parameters())
    assert (found.parameters, found.weights, found.gradients) == (size // 4, size, size)
    optimizer = networks.optimizers["model"].tensors()
    assert found.optimizer == sum(t.numel() * t.element_size() for t in optimizer.values())
    averages = [t for average in networks.averages for t in average.tensors().values()]
    assert found.averages == 4 * sum(t.numel() for t in averages)
    assert found.micro_batch == recipe.train.batch_size
    measured = kept_for_backward(networks.model, found.micro_batch, trainer.latent_shape)
    assert found.activations == pytest.approx(measured, rel=0.02)


def test_devices_share_work_and_shards(tmp_path):
    recipe, trainer = trained(tmp_path)
    shape = trainer.latent_shape
    sharded = replace(recipe, train=replace(recipe.train, parallel=replace(recipe.train.parallel, strategy="fsdp")))
    one, four = plan(recipe, shape, device="h100"), plan(sharded, shape, device="h100", count=4)
    assert four.step_seconds == pytest.approx(one.step_seconds / 4)
    assert four.step_flops == one.step_flops
    assert four.optimizer == one.optimizer // 4
    assert four.weights == one.weights // 4
    assert four.activations == pytest.approx(one.activations / 4, rel=0.1)
    assert one.fits


def test_checkpointing_trades_memory_for_time(tmp_path):
    recipe, trainer = trained(tmp_path)
    shape = trainer.latent_shape
    again = replace(recipe, train=replace(recipe.train, parallel=replace(recipe.train.parallel, checkpointing=True)))
    plain, checkpointed = plan(recipe, shape, device="a100"), plan(again, shape, device="a100")
    assert checkpointed.activations < plain.activations / 2
    assert checkpointed.step_seconds == pytest.approx(4 / 3 * plain.step_seconds)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "h10"}, "did you mean 'h100'"),
        ({"count": 0}, "count must be >= 1"),
        ({"efficiency": 1.5}, r"efficiency within \(0, 1\], got 1 and 1.5"),
        ({"count": 7}, "does not divide over 7 devices"),
    ],
)
def test_impossible_plans(changes, message):
    recipe = tiny()
    with pytest.raises(ValueError, match=message):
        plan(recipe, (1, 8, 8), **changes)


def test_command_needs_no_data_with_a_shape(tmp_path, capsys):
    out = tmp_path / "plan.json"
    told = ["--latent", "4", "32", "32", "--num-classes", "1000", "--device", "h100", "--count", "8"]
    assert main(["plan", "ddt-fashion", *told, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "fits" in printed and "a device" in printed
    assert out.read_text().startswith("{")


def test_command_says_how_to_go_on_without_data(capsys):
    assert main(["plan", "folder", "--data.root", "missing"]) == 2
    assert "--latent C H W" in capsys.readouterr().err
