"""From a name, a folder or a hub id to a pipeline, and from a pipeline to a set of samples."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from untwine.acceleration.sharing.plan import SharingPlan
from untwine.codecs import AUTOENCODERS
from untwine.config import to_dict
from untwine.contracts import check_labels
from untwine.diffusion.sampling import Sampling
from untwine.models import MODELS
from untwine.pipelines.image import ImagePipeline, provenance
from untwine.pipelines.text_to_image import TextToImagePipeline
from untwine.registry import did_you_mean
from untwine.training import checkpoint
from untwine.training.networks import saved_buffers
from untwine.training.posthoc import reconstruct
from untwine.training.recipe import Recipe
from untwine.training.trainer import CHECKPOINTS

ASSETS = Path(__file__).resolve().parent.parent / "assets"
_INDEX, _MANIFEST = "model_index.json", "manifest.json"
_POSTHOC = "posthoc:"


def shipped() -> list[str]:
    """Names of the checkpoints that come with untwine."""
    return sorted(file.parent.name for file in ASSETS.glob(f"*/{_INDEX}"))


def load(
    source: str | Path,
    *,
    weights: str = "ema:0",
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    text_encoder: str | Path | None = None,
) -> ImagePipeline:
    """A pipeline from a shipped name, a run or checkpoint folder, a saved pipeline or model, or a hub id.

    Args:
        source: ``ddt-digits``; ``runs/mine`` (its newest checkpoint); a folder with ``model_index.json``, or with the
            ``config.json`` of a single model, whose latents then have no codec; ``owner/name``.
        weights: of a run, ``ema:k``, ``raw``, or ``posthoc:SIGMA`` for the average of that relative width, put
            together from the run's snapshots (``train.ema_snapshots_every``).
        text_encoder: of a model of texts: folder of its encoder, where that lies elsewhere than in training.

    Raises:
        ValueError: for an unknown source, a single file (only ``untwine convert`` opens those), weights that the run
            lacks, a text encoder for a model without, or a model whose parameters are not exactly those of its class.
        CheckpointError: for a damaged checkpoint of a run.
    """
    folder = _find(str(source))
    located = {} if text_encoder is None else {"text_encoder": text_encoder}
    with _quiet_diffusers():
        if (folder / _INDEX).is_file():
            pipe = _from_saved(folder, dtype, located)
        elif (folder / "config.json").is_file() and not (folder / _MANIFEST).is_file():
            model = _read_model(folder, _read_json(folder / "config.json").get("_class_name"), dtype)
            pipe = _pipeline({"model": model}, located)
        else:
            pipe = _from_run(folder, weights, located).to(dtype=dtype)
        pipe.model.eval().requires_grad_(False)
        return pipe.to(device)  # type: ignore[return-value]


def _find(source: str) -> Path:
    """The local folder that ``source`` names; a hub id is downloaded into the hub's cache."""
    path = ASSETS / source if source in shipped() else Path(source)
    if path.is_dir():
        return path
    if path.is_file():
        raise ValueError(
            f"checkpoint {source} is a single file, and may be a pickle, which is never loaded; convert it first: "
            f"untwine convert {source} --out FOLDER"
        )
    owner, _, name = source.partition("/")
    if not owner or not name or "/" in name or owner[0] in ".~" or Path(owner).exists():
        raise ValueError(
            f"unknown checkpoint {source!r}{did_you_mean(source, shipped())}; give a shipped name, a run folder, a "
            "saved pipeline or a hub id owner/name"
        )
    try:
        with _quiet_diffusers():
            return Path(ImagePipeline.download(source, use_safetensors=True))
    except Exception as error:  # whatever the hub's client raises without a network, a right or such a repository
        raise ValueError(
            f"checkpoint {source!r} is no local folder, and the hub did not give it: {str(error).splitlines()[0]}"
        ) from error


@contextmanager
def _quiet_diffusers() -> Iterator[None]:
    """Without diffusers' progress bar and its warnings on casting, which concern none of our models."""
    from diffusers.utils import logging as settings

    logger, bar = logging.getLogger("diffusers"), settings.is_progress_bar_enabled()
    level = logger.level
    logger.setLevel(logging.ERROR)
    settings.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bar:
            settings.enable_progress_bar()


def _pipeline(parts: dict[str, Any], located: dict[str, Any]) -> ImagePipeline:
    """Of texts where the model takes them."""
    if "tokens.text" in parts["model"].accepts:
        return TextToImagePipeline(**parts, **located)
    if located:
        raise ValueError(f"text_encoder: this {type(parts['model']).__name__} takes no text; leave it out")
    return ImagePipeline(**{name: part for name, part in parts.items() if name != "condition"})


def _from_saved(folder: Path, dtype: torch.dtype, located: dict[str, Any]) -> ImagePipeline:
    """The pipeline of :meth:`ImagePipeline.save_pretrained`."""
    index = _read_json(folder / _INDEX)
    library, name = index.get("model") or (None, None)
    if index.get("_class_name") not in (ImagePipeline.__name__, TextToImagePipeline.__name__) or library != "untwine":
        raise ValueError(f"{folder} holds a {index.get('_class_name')}, not an ImagePipeline of untwine")
    parts = ("codec", "path", "sampling", "latent_shape", "class_names", "origin", "condition")
    model = _read_model(folder / "model", name, dtype)
    return _pipeline({"model": model, **{part: index[part] for part in parts if part in index}}, located)


def _read_model(folder: Path, name: Any, dtype: torch.dtype) -> Any:
    """A model folder, strictly: diffusers would fill missing parameters with random numbers."""
    cls = next((cls for cls in map(MODELS.__getitem__, MODELS) if cls.__name__ == name), None)
    if cls is None:
        raise ValueError(f"{folder} holds a {name}, which is no model of untwine (known: {', '.join(MODELS)})")
    try:
        model, loading = cls.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, dtype=dtype, output_loading_info=True
        )
    except Exception as error:  # whatever a damaged file makes the readers raise
        raise ValueError(f"{folder} cannot be loaded as a {name}: {str(error).splitlines()[0]}") from error
    if wrong := {kind.removesuffix("_keys"): names[:5] for kind, names in loading.items() if names}:
        raise ValueError(f"the parameters in {folder} are not those of its {name}: {wrong}")
    return model


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold an object, not a {type(data).__name__}")
    return data


def open_run(folder: Path, weights: str) -> Path:
    """The newest intact checkpoint of a run, or ``folder`` itself where it is one, that holds ``weights``.

    Raises:
        ValueError: where there is no checkpoint, or it has no such weights.
        CheckpointError: where every checkpoint is damaged.
    """
    inner = folder / CHECKPOINTS
    path = folder if (folder / _MANIFEST).is_file() else checkpoint.latest(inner if inner.is_dir() else folder)
    if path is None:
        raise ValueError(f"{folder} holds no checkpoint of a run; give a run folder, or a checkpoint in it")
    known = [*(f"ema:{k}" for k in range(len(checkpoint.read_config(path)["ema"]))), "raw"]
    if weights not in known:
        raise ValueError(f"weights: {folder} has no {weights!r} (known: {', '.join(known)})")
    return path


def _from_run(folder: Path, weights: str, located: dict[str, Any]) -> ImagePipeline:
    path = open_run(folder, "ema:0" if weights.startswith(_POSTHOC) else weights)
    recipe = Recipe.from_dict(checkpoint.read_config(path))
    if recipe.model.kind in AUTOENCODERS:
        raise ValueError(
            f"{folder} trained an autoencoder, which draws nothing by itself: "
            "untwine.training.objectives.reconstruction.export makes it the codec of another recipe"
        )
    state = checkpoint.read_state(path)
    model: Any = recipe.model.build()
    adapter = recipe.adapter.build().attach(model) if recipe.adapter is not None else None
    if weights == "raw" or adapter is not None:  # what is frozen has no average
        _fill(model, path, "raw")
    if weights.startswith(_POSTHOC):
        _apply_posthoc(model, folder, weights, state["step"])
    elif weights != "raw":
        _fill(model, path, weights)
    if adapter is not None:
        adapter.bake()
    origin = {"recipe": recipe.name, "step": state["step"], "weights": weights, **provenance()}
    parts = {
        "model": model,
        "codec": recipe.codec.to_dict(),
        "path": to_dict(recipe.objective.build().path),
        "sampling": to_dict(recipe.sampling),
        "latent_shape": state["latent_shape"],
        "class_names": state["class_names"],
        "origin": origin | ({"prompts": state["prompts"]} if state.get("prompts") else {}),
        "condition": None if recipe.condition is None else recipe.condition.to_dict(),
    }
    return _pipeline(parts, located)


def _fill(model: Any, path: Path, weights: str) -> None:
    """Parameters from a checkpoint, all of them for ``raw``, those that were trained for an average; and buffers."""
    prefix = "model." if weights == "raw" else f"{weights.replace(':', '.')}."
    wanted = {n: p.detach() for n, p in model.named_parameters() if weights == "raw" or p.requires_grad}
    tensors = {prefix + name: p for name, p in wanted.items()}
    tensors |= {f"model.{name}": buffer for name, buffer in saved_buffers(model).items()}
    missing = checkpoint.load_matching(path, tensors).reinitialised
    if missing:
        raise ValueError(f"weights: {path} has no complete {weights!r}; it lacks {list(missing)[:5]}")


def _apply_posthoc(model: Any, run: Path, weights: str, step: int) -> None:
    """Weights of ``posthoc:SIGMA``, put together from the snapshots of a run."""
    try:
        sigma = float(weights.removeprefix(_POSTHOC))
    except ValueError:
        raise ValueError(f"weights must be 'posthoc:SIGMA', such as posthoc:0.12, got {weights!r}") from None
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in reconstruct(run, sigma, step=step).items():
            parameters[name].copy_(value)


@dataclass(frozen=True)
class Samples:
    """Generated images with what is needed to make them again."""

    images: np.ndarray
    """(N, H, W, C) uint8; float32 latents (N, C, H, W) where the pipeline has no codec for pictures"""
    labels: np.ndarray | None
    """(N,) int64"""
    report: dict[str, Any]
    """seconds, network evaluations, settings, seed, versions"""
    prompts: list[str] | None = None
    """one per image, of a model of texts"""

    @property
    def are_pictures(self) -> bool:
        return self.images.dtype == np.uint8


def sample(
    source: str | Path | ImagePipeline = "ddt-digits",
    *,
    count: int = 16,
    labels: Sequence[int] | None = None,
    prompts: Sequence[str] | None = None,
    negative_prompt: str | None = None,
    seed: int = 0,
    batch_size: int = 64,
    size: tuple[int, int] | None = None,
    sampling: Sampling | None = None,
    plan: SharingPlan | str | Path | None = None,
    on_batch: Callable[[int], None] | None = None,
    **changes: Any,
) -> Samples:
    """``count`` images; without labels the classes come in turn, and image k is the same for every batch size.

    Args:
        source: anything :func:`load` takes, or a pipeline.
        labels: one per image, or fewer, repeated in turn.
        prompts: likewise, for a model of texts; default: those that its checkpoint carries as examples.
        negative_prompt: what guidance leads away from, instead of the empty prompt.
        size: (height, width) in pixels, where it differs from the training size.
        sampling: all settings; ``changes`` are single fields of it, such as ``guidance_scale=2.0``.
        plan: a sharing plan or its file (``untwine accelerate``), which brings all settings.
        on_batch: hears how many images are done.

    Raises:
        ValueError: for a value out of range, before anything is computed.
    """
    _check_positive(count=count, batch_size=batch_size)
    pipe = source if isinstance(source, ImagePipeline) else load(source)
    settings = pipe.settings(sampling, plan, **changes)
    takes_text = isinstance(pipe, TextToImagePipeline)
    wanted = (_prompts if takes_text else _labels)(pipe, labels, prompts, negative_prompt)
    wanted = None if wanted is None else np.resize(wanted, count)
    request = {"seed": seed, "sampling": settings, "size": size}
    request |= {"negative_prompt": negative_prompt} if takes_text else {}
    parts, evaluations, refreshes = [], 0, 0
    started = time.perf_counter()
    for first in range(0, count, batch_size):
        part = min(batch_size, count - first)
        chosen = {"num_images": part} if wanted is None else {"wanted": wanted[first : first + part].tolist()}
        parts.append(_draw(pipe, first_image=first, **chosen, **request))
        evaluations += pipe.last_run["network_evaluations"] * part
        refreshes += pipe.last_run["encoder_passes"] * part
        if on_batch is not None:
            on_batch(first + part)
    report = {
        "count": count,
        "seed": seed,
        "seconds": round(time.perf_counter() - started, 3),
        "network_evaluations": evaluations,
        "encoder_passes": refreshes,
        "sampling": to_dict(settings),
        **_circumstances(pipe),
    }
    if takes_text:
        report |= {"prompts": list(wanted), "negative_prompt": negative_prompt}  # type: ignore[arg-type]
    return Samples(np.concatenate(parts), None if takes_text else wanted, report, report.get("prompts"))


def _check_positive(**counts: Any) -> None:
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer >= 1, got {value!r}")


def _labels(pipe: ImagePipeline, labels: Sequence[int] | None, *texts: str | Sequence[str] | None) -> np.ndarray | None:
    """The labels that come in turn, checked all at once."""
    if any(text is not None for text in texts):
        instead = "give labels" if pipe.num_classes else "it is unconditional"
        raise ValueError(f"prompts: this {type(pipe.model).__name__} takes no text; {instead}")
    if labels is not None and not len(labels):
        raise ValueError("labels must name at least one class, got none; leave them out to draw all classes in turn")
    if labels is None:
        return np.arange(pipe.num_classes) if pipe.num_classes else None
    return check_labels(labels, pipe.num_classes).numpy() if pipe.num_classes else np.asarray(labels)


def _prompts(pipe: Any, labels: Any, prompts: Sequence[str] | None, negative: str | None) -> np.ndarray:
    """The prompts that come in turn, checked all at once."""
    if labels is not None:
        raise ValueError(f"labels: this {type(pipe.model).__name__} is conditioned on texts; give prompts instead")
    found = pipe.example_prompts if prompts is None else [prompts] if isinstance(prompts, str) else list(prompts)
    if not found:
        raise ValueError("prompts must be at least one text; this checkpoint carries no examples to draw instead")
    pipe.text.encode([*found, negative or ""])
    return np.asarray(found, dtype=object)


def _circumstances(pipe: ImagePipeline) -> dict[str, Any]:
    return {
        "space": "pixels" if pipe.makes_pictures else "latents",
        "origin": pipe.origin,
        "versions": provenance(),
        "threads": torch.get_num_threads(),
        "device": str(pipe.device),
        "dtype": str(pipe.dtype).removeprefix("torch."),
    }


def _draw(pipe: ImagePipeline, wanted: list[Any] | None = None, **request: Any) -> np.ndarray:
    if not pipe.makes_pictures:
        return pipe(wanted, output_type="latent", **request).images.cpu().numpy()  # type: ignore[union-attr]
    images = pipe(wanted, output_type="np", **request).images  # type: ignore[union-attr]
    return (np.asarray(images) * 255).round().astype(np.uint8)
