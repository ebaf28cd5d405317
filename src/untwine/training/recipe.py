"""A recipe: everything that, with its data, determines a training run."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from untwine.adapters.base import Adapter
from untwine.codecs.base import Codec
from untwine.conditions.text import Text
from untwine.config import Component, ConfigError, from_dict, load_yaml, to_dict
from untwine.data.base import Dataset
from untwine.diffusion.sampling import Sampling
from untwine.registry import did_you_mean
from untwine.training.distributed import ParallelConfig
from untwine.training.ema import ConstantEMA, EMAProfile
from untwine.training.grading import EvaluationConfig
from untwine.training.loggers import Logger
from untwine.training.objectives.base import Objective
from untwine.training.optim import AdamW, ConstantSchedule, OptimizerConfig, Schedule
from untwine.training.parametrization import MuP

RECIPES = Path(__file__).resolve().parent.parent / "recipes"


class Model(nn.Module):
    """What a recipe trains, chosen by name: a backbone, or the autoencoder of a codec."""

    kinds: ClassVar[str] = "untwine.codecs:TRAINED"


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The loop. Every count named ``steps`` is in optimizer steps."""

    num_steps: int
    batch_size: int = 64
    """samples per optimizer step, over all processes and micro-batches"""
    accumulation: int = 1
    """micro-batches per optimizer step"""
    clip_norm: float | None = None
    """largest global gradient norm"""
    num_workers: int = 0
    """data loading processes"""
    validation: int | float = 0.1
    """held-out samples: a count, or a fraction in [0, 1)"""
    log_every: int = 20
    validate_every: int = 500
    save_every: int = 1000
    keep: int = 2
    """checkpoints kept, >= 2"""
    async_save: bool = False
    """write them in the background, from a copy of the state in the memory of the host"""
    sample_every: int | None = None
    """draw samples/step-N.png from the first EMA, always of the same noise and classes; null = never"""
    evaluate_every: int | None = None
    """judge samples of the first EMA by ``evaluation``, against the training data; null = never"""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    ema_snapshots_every: int | None = None
    """save two averages for an EMA of any width after the run (training/posthoc.py); null = never"""
    loggers: tuple[Logger, ...] = ()
    """beside log.jsonl: tensorboard, wandb, trackio"""
    deterministic: bool = False
    """replace or refuse operations whose result depends on timing"""
    timeouts: tuple[float, float] = (1800.0, 600.0)
    """seconds that processes wait for each other: until the first step is made, which compiles, and afterwards"""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        for name in ("num_steps", "batch_size", "accumulation", "log_every", "validate_every", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        for name in ("sample_every", "evaluate_every", "ema_snapshots_every"):
            if (every := getattr(self, name)) is not None and every < 1:
                raise ValueError(f"{name} must be >= 1, or null for never, got {every}")
        if self.keep < 2:
            raise ValueError(
                f"keep must be >= 2 (the previous checkpoint outlives the writing of one), got {self.keep}"
            )
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"clip_norm must be > 0 or null, got {self.clip_norm}")
        if self.num_workers < 0:
            raise ValueError(f"num_workers must be >= 0, got {self.num_workers}")
        if not min(self.timeouts) > 0:
            raise ValueError(f"timeouts must be two positive numbers of seconds, got {self.timeouts}")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A training run. ``untwine train NAME|FILE`` reads one from YAML; flags change single values."""

    name: str
    data: Component[Dataset]
    model: Component[Model]
    train: TrainConfig
    adapter: Component[Adapter] | None = None
    """parameters to add to a frozen model, which ``--init`` gives; they alone are trained"""
    condition: Component[Text] | None = None
    """encodes the captions of the data for a model of texts; null = the model takes the labels, where there are any"""
    seed: int = 0
    codec: Component[Codec] = field(default=Component(Codec.kinds, "identity"))
    objective: Component[Objective] = field(default=Component(Objective.kinds, "flow_matching"))
    optimizer: OptimizerConfig = field(default_factory=AdamW)
    mup: MuP | None = None
    """learning rates that hold at every width; null = the standard parametrization"""
    schedule: Schedule = field(default_factory=ConstantSchedule)
    ema: tuple[EMAProfile, ...] = (ConstantEMA(),)
    """profile 0 is exported and sampled by default"""
    sampling: Sampling = field(default_factory=Sampling)
    """how the trained model is sampled unless asked otherwise"""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed must be within [0, 2**64), got {self.seed}")

    def to_dict(self) -> dict[str, Any]:
        """Plain data that :meth:`from_dict` reads back; the resolved form that every checkpoint carries."""
        return to_dict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any], where: str = "recipe") -> Recipe:
        """A recipe from plain data, strictly checked."""
        return from_dict(cls, data, where)

    @classmethod
    def load(cls, source: str | Path) -> Recipe:
        """The recipe in a YAML file, or the shipped recipe of that name."""
        return cls.from_dict(load_yaml(find_recipe(source)))


def fit_to_data(recipe: Recipe, dataset: Dataset, codec: Codec) -> Recipe:
    """The recipe with what its data and condition tell filled in, where it need not repeat it: channels, classes and
    width of the text for the model, the hash of its weights for a text encoder.

    Raises:
        ValueError: where the recipe says otherwise, and for a condition that data or model do not have.
    """
    facts = {"in_channels": codec.latent_shape(dataset.sample_shape)[0], "num_classes": dataset.num_classes}
    defaults = Component(recipe.model.registry, recipe.model.kind).to_dict()
    text = None if recipe.condition is None else recipe.condition.build()
    if text is not None:
        _check_text(recipe, dataset, takes_text="text_dim" in defaults)
        recipe = replace(recipe, condition=recipe.condition.replace(sha256=text.fingerprint()))  # type: ignore[union-attr]
        facts["num_classes"] = 0
    if "text_dim" in defaults:
        facts["text_dim"] = 0 if text is None else text.dim
    facts = {name: value for name, value in facts.items() if name in defaults}  # an autoencoder has none of them
    for name, value in facts.items():
        given = recipe.model.options.get(name, value)
        if given not in (value, defaults.get(name)):
            told = "the condition" if name == "text_dim" or (text and name == "num_classes") else "the data"
            raise ValueError(f"recipe.model.{name} is {given}, but {told} has {value}; leave it out or correct it")
    return replace(recipe, model=recipe.model.replace(**facts))


def _check_text(recipe: Recipe, dataset: Dataset, *, takes_text: bool) -> None:
    if dataset.captions is None:
        raise ValueError(
            f"recipe.condition needs data with captions, and this {recipe.data.kind} has none; leave the condition "
            "out, or give captions (for a folder: x.txt beside x.png, or metadata.jsonl)"
        )
    if not takes_text:
        raise ValueError(
            f"recipe.condition: a model of kind {recipe.model.kind} takes no text; use ddt_head or lightningdit with "
            "conditioning: tokens"
        )


def find_recipe(source: str | Path) -> Path:
    """The YAML file that ``source`` names: a path, or the name of a shipped recipe."""
    path = Path(source)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise ConfigError(f"recipe file {path} does not exist")
        return path
    shipped = {file.stem: file for file in sorted(RECIPES.glob("*.yaml"))}
    if str(source) not in shipped:
        raise ConfigError(
            f"unknown recipe {str(source)!r}{did_you_mean(str(source), list(shipped))}; or give a .yaml file"
        )
    return shipped[str(source)]


# Options that may change between the parts of a resumed run; any other makes it another run.
FREE = (
    "name",
    "sampling",
    "condition.encoder",  # the same weights may lie elsewhere
    "condition.cache_mib",
    "train.num_steps",
    "train.num_workers",
    "train.log_every",
    "train.validate_every",
    "train.save_every",
    "train.keep",
    "train.async_save",
    "train.sample_every",
    "train.evaluate_every",
    "train.evaluation",
    "train.loggers",
    "train.deterministic",
    "train.timeouts",
    "train.parallel",
)


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """``path: old -> new`` for every fixed option in which two resolved recipes differ."""
    found = []
    for key in sorted({*old, *new}):
        path, a, b = f"{prefix}{key}", old.get(key), new.get(key)
        if path in FREE or a == b:
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{path}.")
        else:
            found.append(f"{path}: {a!r} -> {b!r}")
    return found
