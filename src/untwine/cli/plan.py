"""``untwine plan RECIPE``: memory, arithmetic and time of a run before any of it is spent."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from untwine.cli.options import parse_known, show


@dataclass(frozen=True)
class PlanOptions:
    """Says what a recipe needs on a number of devices; nothing is trained, and no data is needed with --latent."""

    recipe: Annotated[Positional[str], arg(metavar="RECIPE")]
    """name of a shipped recipe (untwine info lists them) or a YAML file"""
    device: str = "cpu"
    """a100, h100, h200, b200, l40s, rtx4090, or cpu: this machine, whose peak is measured"""
    count: int = 1
    """devices"""
    efficiency: float = 0.4
    """assumed share of the peak, the one guess in the table; public training of small transformers reaches 0.12-0.46"""
    network: Annotated[tuple[float, float] | None, arg(metavar="INSIDE BETWEEN")] = None
    """GB/s that a device sends inside its machine and to others; default: the makers' figures for the device"""
    latent: Annotated[tuple[int, ...], arg(metavar="C H W")] = ()
    """what the model sees; default: read from the data of the recipe"""
    num_classes: Annotated[int | None, arg(metavar="N")] = None
    """with --latent: classes; default: the recipe's model"""
    out: Annotated[Path | None, arg(metavar="FILE")] = None
    """also write the plan as JSON"""


ALSO = """Any option of the recipe is a flag as well, such as --train.batch-size 1024 --model.hidden-size 1152
--train.parallel.param-dtype bfloat16 --train.parallel.checkpointing."""


def run(args: list[str]) -> int:
    """The verb."""
    options, rest = parse_known(PlanOptions, "plan", args, ALSO)

    from untwine.config import apply_flags, load_yaml
    from untwine.training.communication import Links
    from untwine.training.planning import plan
    from untwine.training.recipe import Recipe, find_recipe

    data = load_yaml(find_recipe(options.recipe))
    recipe = Recipe.from_dict(apply_flags(Recipe, data, rest, prog=f"untwine plan {options.recipe}"))
    recipe, latent = _of_data(recipe) if not options.latent else _as_told(recipe, options)
    links = None if options.network is None else Links(*options.network)
    found = plan(recipe, latent, device=options.device, count=options.count, efficiency=options.efficiency, links=links)
    show(f"untwine plan {recipe.name}: {options.count} x {options.device}, latents {latent}", _rows(found, options))
    if options.out is not None:
        record = {**asdict(found), "memory": found.memory, "hours": found.hours, "options": asdict(options)}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=2, default=str) + "\n", encoding="utf-8")
    return 0


def _of_data(recipe: Any) -> tuple[Any, tuple[int, ...]]:
    """The recipe as its data completes it, and the shape of a latent."""
    from untwine.training.recipe import fit_to_data

    try:
        dataset = recipe.data.build()
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"the data of the recipe cannot be read ({error}); tell its shape with --latent C H W"
        ) from error
    codec = dataset.bind(recipe.codec.build())
    return fit_to_data(recipe, dataset, codec), codec.latent_shape(dataset.sample_shape)


def _as_told(recipe: Any, options: PlanOptions) -> tuple[Any, tuple[int, ...]]:
    from dataclasses import replace

    if any(size < 1 for size in options.latent):
        raise ValueError(f"--latent must be sizes >= 1 (channels first), got {options.latent}")
    told = {"in_channels": options.latent[0]}
    if options.num_classes is not None:
        told["num_classes"] = options.num_classes
    return replace(recipe, model=recipe.model.replace(**told)), options.latent


def _rows(found: Any, options: PlanOptions) -> dict[str, str]:
    room = "" if found.fits is None else f" of {found.memory_gib:g} GiB: {'fits' if found.fits else 'DOES NOT FIT'}"
    return {
        "parameters": f"{found.parameters:,}",
        "weights, gradients": f"{_size(found.weights)} + {_size(found.gradients)} a device",
        "optimizer, averages": f"{_size(found.optimizer)} + {_size(found.averages)} a device",
        "activations": f"{_size(found.activations)} for a micro-batch of {found.micro_batch}",
        "memory": f"{_size(found.memory)} a device{room}; work space of the kernels comes on top",
        "arithmetic": _work(found),
        "time": f"{1000 * found.step_seconds:,.1f} ms a step, {found.hours:,.2f} h for {found.num_steps} steps, "
        f"if {options.efficiency:.0%} of the peak is reached",
        **_sent(found),
    }


def _sent(found: Any) -> dict[str, str]:
    """The rows on communication, with what they assume."""
    sent = found.communication
    if sent is None:
        return {}
    spread = f"{sent.strategy}, {sent.copies} copies" + (f" of {sent.shards} shards" if sent.shards > 1 else "")
    weights = f"{_size(sent.gathered)} of weights + " if sent.gathered else ""
    rows = {"communication": f"{weights}{_size(sent.reduced)} of gradients sent a step by each device ({spread})"}
    scaling = sent.scaling(found.step_seconds)
    if scaling is None:
        return rows | {"scaling": "not known: tell what a device sends with --network INSIDE BETWEEN (GB/s)"}
    apart, hidden = scaling
    return rows | {
        "scaling": f"{1000 * sent.seconds:,.1f} ms a step if rings reach the links' full speed: {apart:.0%} of ideal "
        f"if none of it overlaps with arithmetic, {hidden:.0%} if all does"
    }


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _work(found: Any) -> str:
    total = found.step_flops * found.num_steps
    return f"{found.step_flops / 1e12:,.3f} TFLOP a step, {total / 1e15:,.1f} PFLOP in all"
