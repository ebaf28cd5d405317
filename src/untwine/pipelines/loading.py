"""From a name, a folder or a hub id to a pipeline."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from untwine.codecs import AUTOENCODERS
from untwine.config import to_dict
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
            f"{folder} trained an autoencoder, which draws nothing by itself; make it the codec of another recipe: "
            f"untwine convert {folder} --out FOLDER"
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
