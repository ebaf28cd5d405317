"""The trainer: steps optimizers and averages, meters, validates, checkpoints, resumes. It knows no diffusion.

A run lives in one folder: ``recipe.yaml`` (resolved), ``log.jsonl``, ``checkpoints/step-N``. The same command on the
same folder continues it, and ends with the weights that an uninterrupted run would have, bit for bit on one CPU.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from untwine.config import Component
from untwine.contracts import Batch
from untwine.data.base import Dataset
from untwine.data.loading import Loader
from untwine.diffusion.draws import Draws
from untwine.training import checkpoint
from untwine.training.checkpoint import CheckpointNotSaved, Report
from untwine.training.distributed import Distributed
from untwine.training.locking import lock
from untwine.training.metering import LossMeter, RunLog
from untwine.training.networks import Networks, seeded
from untwine.training.recipe import Recipe, differences
from untwine.training.validation import Validation

logger = logging.getLogger(__name__)
CHECKPOINTS = "checkpoints"


class TrainingDiverged(RuntimeError):
    """The loss is no longer finite."""


@dataclass(frozen=True)
class TrainResult:
    """What a run came to."""

    folder: Path
    step: int
    """optimizer steps made since the beginning of the run"""
    checkpoint: Path | None
    metrics: dict[str, Any]
    """the last training and validation numbers"""


class Trainer:
    """Trains a recipe in a folder, or continues what is there.

    Args:
        recipe: a :class:`Recipe`, the name of a shipped one, or a YAML file.
        out: the run folder; default ``runs/<recipe name>``.
        init: a run or checkpoint folder whose weights to start from (fine-tuning); ignored when the run resumes.
        init_weights: which of its weights: ``ema:k`` or ``raw``.
        device: ``cpu`` or ``cuda``; default: CUDA where there is any.

    Raises:
        ValueError: for a recipe that does not fit its data, or a folder that holds another run.
    """

    def __init__(
        self,
        recipe: Recipe | str | Path,
        out: str | Path | None = None,
        *,
        init: str | Path | None = None,
        init_weights: str = "ema:0",
        device: str | None = None,
    ) -> None:
        self.recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
        self.out = Path(out) if out is not None else Path("runs") / self.recipe.name
        self.init, self.init_weights = init, init_weights
        self.processes = Distributed.start(device)
        self.draws = Draws(self.recipe.seed)
        self.report: Report | None = None
        """after ``init``: which parameters were kept, and which were re-initialised"""
        self.codec = self.recipe.codec.build()
        self.dataset: Dataset = self.recipe.data.build()
        self.training_set, self.held_out = self.dataset.split(self.recipe.train.validation, self.recipe.seed)
        with seeded(self.recipe.seed):
            self.objective = self.recipe.objective.build()
        self.recipe = self._fit_to_data(self.recipe)
        self.networks = Networks(self.recipe, self.objective, self.recipe.model.build, self.processes)
        self.step = 0
        self.metrics: dict[str, Any] = {}

    def _fit_to_data(self, recipe: Recipe) -> Recipe:
        """The recipe with the shape and classes of its data filled into the model, where it need not repeat them."""
        facts = {
            "in_channels": self.codec.latent_shape(self.dataset.sample_shape)[0],
            "num_classes": self.dataset.num_classes,
        }
        defaults = Component(recipe.model.registry, recipe.model.kind).to_dict()
        for name, value in facts.items():
            given = recipe.model.options.get(name, value)
            if given not in (value, defaults.get(name)):
                raise ValueError(
                    f"recipe.model.{name} is {given}, but the data has {value}; leave it out or correct it"
                )
        return replace(recipe, model=recipe.model.replace(**facts))

    @property
    def checkpoints(self) -> Path:
        return self.out / CHECKPOINTS

    def fit(self, *, until: int | None = None, on_step: Callable[[int], None] | None = None) -> TrainResult:
        """Trains to ``train.num_steps``, or pauses after step ``until``; saves at the end.

        ``on_step`` hears the number of finished steps.
        """
        train = self.recipe.train
        last = train.num_steps if until is None else min(until, train.num_steps)
        self._prepare_folder()
        with lock(self.out):
            self.log = RunLog(self.out / "log.jsonl", enabled=self.processes.is_main)
            self._resume_or_start()
            validation = Validation(
                self.held_out,
                self.codec,
                seed=self.recipe.seed,
                batch_size=max(train.batch_size, 256),
                processes=self.processes,
            )
            meter = LossMeter(self.processes)
            saved = self.step if checkpoint.latest(self.checkpoints, verify=False) else -1
            for micro_batches in self._loader() if self.step < last else ():
                self._update(micro_batches, meter)
                self.step += 1
                ends = self.step == last
                if self.step % train.log_every == 0 or ends:
                    self._log(meter)
                if validation and (self.step % train.validate_every == 0 or ends):
                    self._validate(validation)
                if self.step % train.save_every == 0 or ends:
                    saved = self.step if self._save() else saved
                if on_step is not None:
                    on_step(self.step)
                if ends:
                    break
        path = self.checkpoints / f"step-{saved}" if saved >= 0 else None
        return TrainResult(self.out, self.step, path, dict(self.metrics))

    def _loader(self) -> Loader:
        train = self.recipe.train
        return Loader(
            self.training_set,
            self.codec,
            seed=self.recipe.seed,
            batch_size=train.batch_size,
            accumulation=train.accumulation,
            rank=self.processes.rank,
            world_size=self.processes.world_size,
            num_workers=train.num_workers,
            start_update=self.step,
            device=self.processes.device,
        )

    def _update(self, micro_batches: list[Batch], meter: LossMeter) -> None:
        """One optimizer step of every network that the objective updates in this step."""
        for network in self.objective.updates(self.step):
            self.networks.zero_grad()
            for m, batch in enumerate(micro_batches):
                with self.networks.micro_batch(last=m == len(micro_batches) - 1):
                    with self.networks.forward_precision():
                        loss = self.objective(
                            self.networks.modules, batch, update=network, step=self.step, draws=self.draws
                        )
                    (loss.total / len(micro_batches)).backward()
                meter.add(loss, "" if network == "model" else f"{network}/")
            norm = self.networks.update(network, self.step)
            meter.add_value("grad_norm" if network == "model" else f"{network}/grad_norm", norm)

    def _log(self, meter: LossMeter) -> None:
        values = meter.read()
        lr = self.networks.optimizers["model"].lr[0]
        line = self.log.write("train", step=self.step, images=self.step * self.recipe.train.batch_size, lr=lr, **values)
        self.metrics |= line
        loss = values.get("loss", 0.0)
        logger.info("step %d  loss %.4f  lr %.2e  %.1f s", self.step, loss, lr, line["seconds"])
        if not torch.isfinite(torch.tensor(loss)):
            raise TrainingDiverged(
                f"loss is {loss} at step {self.step}; lower the learning rate, clip gradients (train.clip_norm) or "
                f"resume from {self.checkpoints} with param_dtype float32"
            )

    def _validate(self, validation: Validation) -> None:
        if not self.networks.averages:
            return self._measure(validation, "raw")
        with self.networks.averages[0].applied(self.networks.model):
            self._measure(validation, "ema:0")

    def _measure(self, validation: Validation, weights: str) -> None:
        values = validation.measure(
            self.networks.modules, self.objective, step=self.step, precision=self.networks.forward_precision
        )
        self.log.write("validation", step=self.step, weights=weights, triples=len(validation), **values)
        self.metrics["validation_loss"] = values["loss"]
        logger.info(
            "step %d  validation loss %.4f (%s, %d triples)", self.step, values["loss"], weights, len(validation)
        )

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def _state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "updates": self.networks.updates,
            "data": self.dataset.fingerprint(),
            "latent_shape": list(self.codec.latent_shape(self.dataset.sample_shape)),
            "class_names": list(self.dataset.class_names),
        }

    def _save(self) -> bool:
        try:
            checkpoint.save(
                self.checkpoints,
                self.step,
                self.networks.tensors(),
                self._state(),
                config=self.recipe.to_dict(),
                keep=self.recipe.train.keep,
            )
        except CheckpointNotSaved as error:
            logger.error("%s; training goes on and saves again after %d steps", error, self.recipe.train.save_every)
            return False
        return True

    def _prepare_folder(self) -> None:
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            probe = self.out / f".writable-{self.processes.rank}"
            probe.write_text("")
            probe.unlink()
        except OSError as error:
            raise ValueError(f"out: cannot write to {self.out}: {error.strerror}; choose a writable folder") from error

    def _resume_or_start(self) -> None:
        checkpoint.recover(self.checkpoints)
        path = checkpoint.latest(self.checkpoints)
        if path is None:
            if self.init is not None:
                self._initialise()
            if self.processes.is_main:
                resolved = yaml.safe_dump(self.recipe.to_dict(), sort_keys=False)
                (self.out / "recipe.yaml").write_text(resolved, encoding="utf-8")
            return
        changed = differences(checkpoint.read_config(path), self.recipe.to_dict())
        if changed:
            raise ValueError(
                f"{self.out} holds another run, which differs in\n  "
                + "\n  ".join(changed)
                + "\nuse another out folder"
            )
        state = checkpoint.read_state(path)
        if state["data"] != self._state()["data"]:
            raise ValueError(f"the data of {self.out} has changed: {state['data']} -> {self._state()['data']}")
        checkpoint.load(path, self.networks.tensors(), verify=False)  # latest() has verified it
        self.networks.restored(state["updates"])
        self.step = state["step"]
        self.log.write("resume", step=self.step)
        logger.info("resumed %s at step %d", self.out, self.step)

    def _initialise(self) -> None:
        source = Path(str(self.init))
        inner = source / CHECKPOINTS
        self.report = self.networks.initialise(str(inner if inner.is_dir() else source), self.init_weights)
        logger.info(
            "initialised from %s (%s): %d tensors kept, re-initialised: %s, unused: %s",
            source,
            self.init_weights,
            len(self.report.kept),
            ", ".join(self.report.reinitialised) or "none",
            len(self.report.unused),
        )
        self.log.write(
            "init", source=str(source), kept=len(self.report.kept), reinitialised=list(self.report.reinitialised)
        )
