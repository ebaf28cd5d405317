"""``untwine evaluate SAMPLES|CHECKPOINT --reference REAL``: a report by a named protocol."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import FlagCreatePairsOff, Positional, arg

from untwine.cli.options import parse_known, show


@dataclass(frozen=True)
class EvaluateOptions:
    """Compares samples, or those that a checkpoint draws, with real pictures. Processes of torchrun share the work."""

    samples: Annotated[Positional[str], arg(metavar="SAMPLES|CHECKPOINT")] = ""
    """a folder of pictures, an .npz with arr_0, or anything that untwine sample takes"""
    reference: Annotated[str | None, arg(metavar="REAL")] = None
    """a folder, an .npz of ADM, a data set with options such as fashion:part=test, or the data of a recipe"""
    protocol: Annotated[str, arg(metavar="NAME")] = "fd-efflite0-1k"
    """adm-50k, fd-efflite0-1k, fd-efflite0-5k, fd-dinov2-50k, kid-efflite0-500"""
    num_samples: int | None = None
    """another number than the protocol's; the report says so"""
    out: Path = Path("out/evaluation")
    """folder for evaluation.json and nearest.png, and for the samples of a checkpoint"""
    cache: Path = Path("out/references")
    """folder that keeps the features of references"""
    encoder_weights: Annotated[Path | None, arg(metavar="PATH")] = None
    """Inception's file for adm-50k, the folder of a checkpoint for fd-dinov2-50k"""
    batch_size: int = 64
    """pictures computed at once"""
    seed: int = 0
    """of the samples of a checkpoint"""
    weights: Annotated[str, arg(metavar="ema:K|raw|posthoc:SIGMA")] = "ema:0"
    """of a run folder"""
    device: Annotated[Literal["cpu", "cuda"] | None, arg(metavar="cpu|cuda")] = None
    """default: CUDA where there is any"""
    self_check: FlagCreatePairsOff[bool] = False
    """compare nothing: do the metrics give known numbers here?"""


ALSO = """For a checkpoint the sampler's settings are flags as well, as those of untwine sample:
--num-inference-steps 50 --guidance-scale 2.0 ..."""
_TITLES = {"fid": "FID", "sfid": "sFID", "is": "IS", "kid": "KID"}


def run(args: list[str]) -> int:
    """The verb."""
    options, rest = parse_known(EvaluateOptions, "evaluate", args, ALSO)
    if options.self_check:
        return _self_check()
    if not options.samples:
        raise ValueError("SAMPLES is missing; write untwine evaluate SAMPLES --reference REAL [OPTIONS]")
    if options.reference is None and "--help" not in rest:
        raise ValueError("reference is missing; name real pictures to compare with: --reference FOLDER")

    from untwine.evaluation.protocols import find_protocol
    from untwine.evaluation.report import evaluate
    from untwine.pipelines.writing import prepare_folder
    from untwine.training.distributed import DAY, Distributed

    processes = Distributed.start(options.device, timeout_seconds=DAY)
    device = processes.device
    protocol = find_protocol(options.protocol, num_samples=options.num_samples)
    drawn = _is_checkpoint(options.samples)
    if rest and not drawn:
        raise ValueError(f"unknown option {rest[0]}; the settings of a sampler are for a checkpoint, not for samples")
    pipe, settings = _load(options, rest, device) if drawn else (None, None)
    reference = reference_named(str(options.reference))
    encoder = protocol.build_encoder(**_encoder_options(protocol.encoder, options.encoder_weights))
    folder = prepare_folder(options.out)
    samples, facts = options.samples, {}
    if pipe is not None:
        reference.pictures(pipe.sample_shape[1:])  # of another size? then nothing is drawn
        samples, facts = _draw(pipe, settings, options, protocol.num_samples, folder / "samples")
    report = evaluate(
        samples,
        reference,
        protocol,
        out=folder,
        encoder=encoder,
        device=device,
        batch_size=options.batch_size,
        cache=options.cache,
        facts=facts,
        on_batch=lambda done: _progress(done, protocol.num_samples, "encoded"),
    )
    if processes.is_main:
        _tell(options, report.values, folder)
    processes.close()
    return 0


def _is_checkpoint(samples: str) -> bool:
    """Whether ``samples`` must be drawn first: anything but an existing .npz or folder of pictures."""
    path = Path(samples)
    if path.suffix == ".npz":
        return False
    inside = ("model_index.json", "config.json", "manifest.json", "checkpoints")
    return not path.is_dir() or any((path / name).exists() for name in inside)


def _load(options: EvaluateOptions, rest: list[str], device: Any) -> tuple[Any, Any]:
    """(pipeline of a checkpoint, its sampling settings with the flags applied)."""
    from untwine.config import apply_flags, from_dict, to_dict
    from untwine.diffusion.sampling import Sampling
    from untwine.pipelines.loading import load

    try:
        pipe = load(options.samples, weights=options.weights, device=device)
    except ValueError as error:
        if Path(options.samples).exists():
            raise
        raise ValueError(
            f"samples: {options.samples!r} is no folder of pictures and no .npz file; and as a checkpoint: {error}"
        ) from error
    if not pipe.makes_pictures:
        raise ValueError(f"samples: {options.samples} makes latents and has no codec for pictures")
    settings = apply_flags(Sampling, to_dict(pipe.sampling), rest, prog=f"untwine evaluate {options.samples}")
    return pipe, from_dict(Sampling, settings, "sampling")


def _draw(pipe: Any, settings: Any, options: EvaluateOptions, count: int, folder: Path) -> tuple[str, dict[str, Any]]:
    """Samples of a checkpoint, kept in ``folder``, and what the report says of them."""
    from untwine.pipelines.series import Series
    from untwine.pipelines.writing import draw_into, prepare_folder

    series = Series(pipe, count=count, seed=options.seed, batch_size=options.batch_size, sampling=settings)
    report = draw_into(
        prepare_folder(folder), series, pictures=False, on_batch=lambda done: _progress(done, count, "drawn")
    )
    told = ("seed", "sampling", "origin", "network_evaluations")
    return str(folder), {"checkpoint": options.samples, **{name: report[name] for name in told}}


def reference_named(name: str) -> Any:
    """The data of a recipe where ``name`` is one, else ``name`` itself."""
    from untwine.evaluation.references import Reference, from_dataset, open_reference
    from untwine.training.recipe import RECIPES, Recipe

    if Path(name).suffix in (".yaml", ".yml") or ((RECIPES / f"{name}.yaml").is_file() and not Path(name).exists()):
        dataset = Recipe.load(name).data.build()
        return Reference(name, lambda size: from_dataset(dataset, name))
    return open_reference(name)


def _encoder_options(encoder: str, path: Path | None) -> dict[str, Any]:
    """Where the weights of an encoder are; those of EfficientNet come with a package."""
    if path is None and encoder not in ("dinov2", "siglip", "clip"):
        return {}
    if path is None:
        raise ValueError(f"encoder_weights is missing: name the folder of a {encoder} checkpoint")
    if encoder not in ("inception", "dinov2", "siglip", "clip"):
        raise ValueError(f"encoder_weights: encoder {encoder} takes none, got {path}")
    return {"weights" if encoder == "inception" else "path": path}


def _tell(options: EvaluateOptions, values: dict[str, Any], folder: Path) -> None:
    """The result as a table."""
    counts, protocol = values["counts"], values["protocol"]
    modified = f" (modified: {', '.join(protocol['modified'])})" if protocol["modified"] else ""
    real = counts["reference"] or "an unknown number of"
    show(
        f"untwine evaluate {options.samples}: {counts['samples']} samples against {real} pictures of "
        f"{values['reference']['source']}, protocol {protocol['name']}{modified}",
        {**_metrics(values), **_copies(values["memorisation"])},
    )
    print(f"report: {folder / 'evaluation.json'}")
    if (folder / "nearest.png").is_file():
        print(f"samples above the real picture that each resembles most: {folder / 'nearest.png'}")


def _metrics(values: dict[str, Any]) -> dict[str, str]:
    found, floor, axes = values["metrics"], values["floor"] or {}, values["details"]["principal_axes"]
    rows = {}
    for name, value in found.items():
        if name.endswith(("_std", "_whole")):
            continue
        about = [f"+- {found[f'{name}_std']:.4g}"] if f"{name}_std" in found else []
        if name in floor:
            level = floor[name]
            told = f"{level:.4g}" if isinstance(level, float) else level
            about.append(f"(floor {told}: real against real, {floor['count']} against {floor['against']})")
        if axes is not None and name in ("fd", "fid", "sfid"):
            about.append(f"on {axes} principal axes")
        title = _TITLES.get(name, name)
        title = f"FD-{values['encoder']['name']}" if name == "fd" else title
        rows[title] = " ".join([f"{value:.4g}", *about])
    return rows


def _copies(memorisation: dict[str, Any]) -> dict[str, str]:
    if "note" in memorisation:
        return {"copies": memorisation["note"]}
    return {
        f"nearest by {space}": f"{m['median_ratio']:.2f} of a held-out picture's distance (smallest "
        f"{m['smallest_ratio']:.2f}), {m['copies']} copies"
        for space, m in memorisation.items()
    }


def _self_check() -> int:
    from untwine.evaluation.selfcheck import self_check

    checks = list(self_check())
    rows = {
        check.name: f"skipped: {check.skipped}"
        if check.skipped
        else f"{'ok' if check.passed else 'FAILED'}: {check.found:.6g}, expected {check.expected:.6g}"
        for check in checks
    }
    show("untwine evaluate --self-check", rows)
    return 0 if all(check.passed for check in checks) else 1


def _progress(done: int, count: int, what: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{done}/{count} {what}", end="\n" if done == count else "", file=sys.stderr)
