"""The trainer: steps optimizers and averages, meters, validates, checkpoints, resumes. It knows no diffusion.

A run lives in one folder: ``recipe.yaml`` (resolved), ``log.jsonl``, ``checkpoints/step-N``, ``samples/step-N.png``.
The same command on the same folder continues it, and ends with the weights that an uninterrupted run would have, bit
for bit on one CPU.
"""

from __future__ import annotations

import json
import logging
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console

from untwine.conditions.text import Text
from untwine.contracts import Batch, Loss
from untwine.data.base import Dataset
from untwine.data.features import FrozenFeatures
from untwine.data.loading import Loader, lines_of
from untwine.diffusion.draws import Draws
from untwine.training import checkpoint
from untwine.training.checkpoint import Report
from untwine.training.control import Profiler, StopSignals, deterministic, leave
from untwine.training.distributed import Distributed
from untwine.training.grading import Grading
from untwine.training.locking import lock
from untwine.training.metering import LossMeter
from untwine.training.networks import Networks, seeded
from untwine.training.nonfinite import TrainingDiverged, is_nonfinite, write_dump
from untwine.training.posthoc import save_snapshot
from untwine.training.preview import Drawing, Preview, prompts_in_turn
from untwine.training.recipe import Recipe, fit_to_data
from untwine.training.saving import CHECKPOINTS, Keeper, prepare_folder
from untwine.training.speed import Speed, flops
from untwine.training.storage import LOCAL, Storage
from untwine.training.validation import Validation
from untwine.training.watching import Watch

logger = logging.getLogger(__name__)
EXAMPLES = 8
"""prompts that a checkpoint carries, to sample where none are given"""


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
        init: a run or checkpoint folder, or a model's state dict, whose weights to start from (fine-tuning); ignored
            when the run resumes.
        init_weights: which weights of a run: ``ema:k`` or ``raw``.
        device: ``cpu`` or ``cuda``; default: CUDA where there is any.

    Raises:
        ValueError: for a recipe that does not fit its data, or a folder that holds another run.
    """

    def __init__(
        self,
        recipe: Recipe | str | Path,
        out: str | Path | None = None,
        *,
        init: str | Path | Mapping[str, torch.Tensor] | None = None,
        init_weights: str = "ema:0",
        device: str | None = None,
    ) -> None:
        self.recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
        self.out = Path(out) if out is not None else Path("runs") / self.recipe.name
        self.init, self.init_weights = init, init_weights
        self.processes = Distributed.start(device, timeout_seconds=self.recipe.train.timeouts[0])
        self.draws = Draws(self.recipe.seed)
        self.report: Report | None = None
        """after ``init``: which parameters were kept, and which were re-initialised"""
        self.dataset: Dataset = self.recipe.data.build()
        self.codec = self.dataset.bind(self.recipe.codec.build())
        self.training_set, self.held_out = self.dataset.split(self.recipe.train.validation, self.recipe.seed)
        with seeded(self.recipe.seed):
            self.objective = self.recipe.objective.build()
        self.recipe = fit_to_data(self.recipe, self.dataset, self.codec)
        self.text: Text | None = None
        self.prompts: list[str] = []
        """of the samples drawn during training, which come in turn"""
        if self.recipe.condition is not None:
            self.text = self.recipe.condition.build().to(self.processes.device)
            self.prompts = prompts_in_turn(self.held_out, self.training_set, self.recipe.seed)
        self.networks = Networks(self.recipe, self.objective, self.recipe.model.build, self.processes)
        self.dataset.check(self.codec, self.networks.model)
        self.storage: Storage = LOCAL
        self.step = 0
        """optimizer steps made"""
        self.metrics: dict[str, Any] = {}

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(C, *grid) of what the model sees."""
        return self.codec.latent_shape(self.dataset.sample_shape)

    def fit(
        self,
        *,
        until: int | None = None,
        on_step: Callable[[int], None] | None = None,
        profile: int | None = None,
        console: Console | None = None,
    ) -> TrainResult:
        """Trains to ``train.num_steps``, or pauses after step ``until``; saves at the end.

        SIGTERM and SIGINT end it after the step in progress, with a checkpoint and exit status 143 or 130.

        Args:
            on_step: hears the number of finished steps.
            profile: steps to profile, into ``profile.json`` of the run folder.
            console: where the live panel goes, if it is a terminal; default standard error.

        Raises:
            TrainingDiverged: before an update whose loss or gradient is not finite.
            SavingFailed: where checkpoints could not be saved time after time.
        """
        num_steps = self.recipe.train.num_steps
        last = num_steps if until is None else min(until, num_steps)
        prepare_folder(self.out, self.processes.rank)
        with (
            lock(self.out),
            deterministic(self.recipe.train.deterministic),
            StopSignals(self.processes) as signals,
            Watch(self.out, self.recipe, self.processes, console) as self.watch,
        ):
            self._resume_or_start()
            if self.step < last:
                self._prepare()
                with self.keeper, Profiler(profile, self.out, self.processes) as profiler:
                    self.processes.set_timeout(self.recipe.train.timeouts[0])
                    first = self.step
                    for micro_batches in self._batches(signals):
                        self._update(micro_batches)
                        if self.step == first:
                            self.processes.set_timeout(self.recipe.train.timeouts[1])
                        self.step += 1
                        profiler.step()
                        self._do_what_is_due(last)
                        if on_step is not None:
                            on_step(self.step)
                        if self.step == last:
                            break
                self._save_adapter()
        return TrainResult(self.out, self.step, self.keeper.path, dict(self.metrics))

    def _prepare(self) -> None:
        """Everything that training needs besides the networks; errors of the recipe come to light here."""
        train, seed, processes = self.recipe.train, self.recipe.seed, self.processes
        if self.text is not None:
            self.text.prepare(line for k in range(len(self.dataset)) for line in ("", *lines_of(self.dataset, k)))
        self.validation = Validation(
            self.held_out,
            self.codec,
            seed=seed,
            batch_size=max(train.batch_size, 256),
            processes=processes,
            text=self.text,
            features=FrozenFeatures(self.objective.encoders(), self.held_out),
        )
        self.preview = Preview(self._drawing("train.sample_every")) if train.sample_every is not None else None
        self.grading = None
        if train.evaluate_every is not None:
            self.grading = Grading(train.evaluation, self._drawing("train.evaluate_every"))
        self.watch.open_loggers(self.step)
        self.meter = LossMeter(processes)
        dtype = getattr(torch, train.parallel.param_dtype)
        work = flops(self.networks.model, self.latent_shape, 0 if self.text is None else self.text.max_tokens)
        self.speed = Speed(processes, train.batch_size, work, dtype)

    def _drawing(self, option: str) -> Drawing:
        path, seed = getattr(self.objective, "path", None), self.recipe.seed
        sampling, processes = self.recipe.sampling, self.processes
        return Drawing(
            self.dataset,
            self.codec,
            path,
            sampling,
            seed=seed,
            processes=processes,
            option=option,
            text=self.text,
            prompts=self.prompts,
        )

    def _batches(self, signals: StopSignals) -> Iterator[list[Batch]]:
        """The micro-batches of each update, until a signal ends the program."""
        loader = iter(self._loader(self.processes.rank, self.processes.world_size, self.recipe.train.accumulation))
        while True:
            micro_batches: list[Batch] = []
            try:
                micro_batches = next(loader)
            except RuntimeError:  # a signal to the process group has ended the loader's workers as well
                if not signals.received:
                    raise
            if number := signals.agreed():
                self._save(last=False)
                logger.warning("%s: the same command continues at step %d", signal.Signals(number).name, self.step)
                leave(number)
            yield micro_batches

    def _loader(self, rank: int, world_size: int, accumulation: int) -> Loader:
        return Loader(
            self.training_set,
            self.codec,
            seed=self.recipe.seed,
            batch_size=self.recipe.train.batch_size,
            accumulation=accumulation,
            rank=rank,
            world_size=world_size,
            num_workers=self.recipe.train.num_workers,
            start_update=self.step,
            text=self.text,
            features=FrozenFeatures(self.objective.encoders(), self.training_set),
            device=self.processes.device,
        )

    def _update(self, micro_batches: list[Batch]) -> None:
        """One optimizer step of every network that the objective updates in this step."""
        for network in self.objective.updates(self.step):
            prefix = "" if network == "model" else f"{network}/"
            self.networks.zero_grad()
            losses = []
            for m, batch in enumerate(micro_batches):
                with self.networks.micro_batch(last=m == len(micro_batches) - 1):
                    loss = self._loss(batch, network)
                    (loss.total / len(micro_batches)).backward()
                self.meter.add(loss, prefix)
                losses.append(loss)
            norm = self.networks.clip(network)
            if self.processes.agree(bool(is_nonfinite(losses, norm))):
                self._diverged(network, micro_batches, losses, norm)
            self.networks.update(network, self.step)
            self.meter.add_value(f"{prefix}grad_norm", norm)

    def _loss(self, batch: Batch, network: str) -> Loss:
        with self.networks.forward_precision():
            return self.objective(self.networks.modules, batch, update=network, step=self.step, draws=self.draws)

    def _do_what_is_due(self, last: int) -> None:
        """Logs, validates, samples and saves at their intervals, and at the end."""
        train, ends = self.recipe.train, self.step == last
        self.watch.step(self.step)
        self.speed.step()
        if self.step % train.log_every == 0 or ends:
            self._log()
        tasks = (
            (train.validate_every if len(self.validation) else None, self._validate),
            (train.sample_every, self._sample),
            (train.evaluate_every, self._evaluate),
            (train.ema_snapshots_every, self._snapshot),
            (train.save_every, lambda: self._save(last=ends, in_background=not ends)),
        )
        for every, task in tasks:
            if every is not None and (self.step % every == 0 or ends):
                with self.speed.paused():
                    task()

    def _log(self) -> None:
        train = self.recipe.train
        values = {"step": self.step, "images": self.step * train.batch_size, **self.meter.read()}
        values |= {"lr": self.networks.optimizers["model"].lr[0], **self.speed.read(train.num_steps - self.step)}
        self.metrics |= self.watch.train(**values)

    def _validate(self) -> None:
        with self.networks.averaged() as weights:
            values = self.validation.measure(
                self.networks.modules, self.objective, step=self.step, precision=self.networks.forward_precision
            )
        self.metrics["validation_loss"] = values["loss"]
        self.watch.validation(step=self.step, weights=weights, triples=len(self.validation), **values)

    def _sample(self) -> None:
        assert self.preview is not None
        with self.networks.averaged():
            images = self.preview.draw(self.networks.model, self.networks.forward_precision)
        if self.processes.is_main:
            path = self.out / "samples" / f"step-{self.step}.png"
            try:
                path.parent.mkdir(exist_ok=True)
                self.preview.sheet(images).save(path)
            except OSError as error:
                logger.error("%s not written: %s", path, error)
            else:
                self.watch.picture(self.step, "samples", path)

    def _evaluate(self) -> None:
        assert self.grading is not None
        with self.networks.averaged() as weights:
            values = self.grading.measure(self.networks.model, self.networks.forward_precision)
        self.watch.evaluation(step=self.step, weights=weights, **values)

    def _snapshot(self) -> None:
        try:
            save_snapshot(self.out, self.step, self.networks.tracked)
        except OSError as error:
            logger.error("%s", error)

    def _save(self, *, last: bool, in_background: bool = False) -> None:
        self.keeper.save(self.step, self.networks, last=last, in_background=in_background)

    def _diverged(self, network: str, batches: list[Batch], losses: list[Loss], norm: torch.Tensor) -> None:
        """Leaves a record of the update that must not be made, and the state before it; raises TrainingDiverged."""
        self.networks.zero_grad()
        untouched = network == self.objective.updates(self.step)[0]
        if untouched:
            self._save(last=False)
        path = self.out / f"nonfinite-step-{self.step}.json"
        about = {
            "step": self.step,
            "update": network,
            "seed": self.recipe.seed,
            "checkpoint": f"{CHECKPOINTS}/step-{self.step}" if untouched and self.keeper.saved == self.step else None,
        }
        record = write_dump(path, about, batches, losses, norm)
        told = sorted({str(piece["loss"]) for piece in record["micro_batches"]}, key=len)[:5]
        raise TrainingDiverged(
            f"after step {self.step} the loss of {network} is {', '.join(told)} and the gradient norm "
            f"{record['grad_norm']}; nothing was updated. The samples are in {path}. Lower the learning rate, clip "
            "gradients (train.clip_norm) or compute in float32 (train.parallel.param_dtype)"
        )

    def replay(self, dump: str | Path) -> list[Loss]:
        """The losses of the micro-batches that a ``nonfinite-step-N.json`` of this run names, computed once more.

        Loads the checkpoint before that update; one process does for all ranks.

        Raises:
            ValueError: where the dump is of another run, or came without a checkpoint.
        """
        record = json.loads(Path(dump).read_text(encoding="utf-8"))
        if record["checkpoint"] is None or record["seed"] != self.recipe.seed or self.processes.world_size > 1:
            raise ValueError(f"dump: {dump} needs its checkpoint, a recipe of seed {record['seed']} and one process")
        checkpoint.load(self.out / record["checkpoint"], self.networks.tensors())
        self.step = record["step"]
        with torch.no_grad():
            batches = next(iter(self._loader(0, 1, len(record["micro_batches"]))))
            return [self._loss(batch, record["update"]) for batch in batches]

    def _resume_or_start(self) -> None:
        about = {
            "data": self.dataset.fingerprint(),
            "latent_shape": list(self.latent_shape),
            "class_names": [] if self.text is not None else list(self.dataset.class_names),
            "prompts": self.prompts[:EXAMPLES],
        }
        self.keeper = Keeper(self.out, self.recipe, about, self.storage)
        step = self.keeper.restore(self.networks)
        if step is not None:
            self.step = step
            self.watch.event("resume", step=self.step)
            logger.info("resumed %s at step %d", self.out, self.step)
            return
        if self.init is not None:
            self._initialise(self.init)
        elif self.recipe.adapter is not None:
            raise ValueError("init: an adapter needs a trained model to be added to; give --init")
        if self.processes.is_main:
            resolved = yaml.safe_dump(self.recipe.to_dict(), sort_keys=False)
            (self.out / "recipe.yaml").write_text(resolved, encoding="utf-8")

    def _initialise(self, source: str | Path | Mapping[str, torch.Tensor]) -> None:
        told = "a state dict" if isinstance(source, Mapping) else str(source)
        if not isinstance(source, Mapping):
            inner = Path(source) / CHECKPOINTS
            source = str(inner if inner.is_dir() else source)
        self.report = self.networks.initialise(source, self.init_weights)
        reinitialised = list(self.report.reinitialised)
        logger.info(
            "initialised from %s (%s): %d tensors kept, re-initialised: %s, unused: %d",
            told,
            self.init_weights,
            len(self.report.kept),
            ", ".join(reinitialised) or "none",
            len(self.report.unused),
        )
        self.watch.event("init", source=told, kept=len(self.report.kept), reinitialised=reinitialised)

    def _save_adapter(self) -> None:
        """The adapter alone, averaged, beside the checkpoints."""
        if self.networks.adapter is not None and self.processes.is_main:
            with self.networks.averaged():
                self.networks.adapter.save(self.out / "adapter")
