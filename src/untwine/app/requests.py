"""A request from outside as checked values, and what it asks a pipeline for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from untwine.app.catalog import Entry
from untwine.app.limits import Refused, one_of, real, text, whole
from untwine.app.studio import Studio
from untwine.diffusion import SOLVERS

if TYPE_CHECKING:
    from untwine.diffusion.sampling import Sampling
    from untwine.pipelines.image import ImagePipeline
    from untwine.pipelines.series import Series

MAX_SEED, MAX_GUIDANCE, MAX_IMAGE = 2**32 - 1, 30.0, 10**9
IN_TURN = -1
"""the label that stands for all classes in turn"""


@dataclass(frozen=True)
class Request:
    """Images to draw, checked against the limits and against what the checkpoint's files say of it."""

    entry: Entry
    label: int | None
    prompt: str
    negative_prompt: str
    count: int
    first_image: int
    steps: int
    guidance: float
    interval: tuple[float, float] | None
    solver: str
    seed: int
    size: tuple[int, int] | None

    @classmethod
    def read(
        cls,
        studio: Studio,
        checkpoint: Any,
        *,
        label: Any = IN_TURN,
        prompt: Any = "",
        negative_prompt: Any = "",
        count: Any = 1,
        first_image: Any = 0,
        steps: Any = None,
        guidance: Any = None,
        guidance_from: Any = None,
        guidance_to: Any = None,
        solver: Any = None,
        seed: Any = 0,
        height: Any = None,
        width: Any = None,
    ) -> Request:
        """From whatever the page or the API sent; None stands for the checkpoint's own setting.

        Raises:
            Refused: for a value out of range; the message names it, its range and what to do.
        """
        limits, entry = studio.limits, studio.catalog.checkpoint(checkpoint)
        own = defaults(entry)
        given = {"steps": steps, "guidance": guidance, "from": guidance_from, "to": guidance_to, "solver": solver}
        given = {name: own[name] if value in (None, "") else value for name, value in given.items()}
        last = len(entry.classes) - 1 if entry.classes else IN_TURN
        label = whole("label", IN_TURN if label is None or not entry.classes else label, IN_TURN, last)
        return cls(
            entry,
            None if label == IN_TURN else label,
            text("prompt", prompt, limits.max_prompt) if entry.takes_text else "",
            text("negative prompt", negative_prompt, limits.max_prompt) if entry.takes_text else "",
            whole("count", count, 1, limits.max_count),
            whole("image", first_image, 0, MAX_IMAGE),
            whole("steps", given["steps"], 1, limits.max_steps),
            real("guidance", given["guidance"], 0, MAX_GUIDANCE),
            _interval(given["from"], given["to"]),
            one_of("solver", given["solver"], SOLVERS),
            whole("seed", seed, 0, MAX_SEED),
            _size(studio, height, width, int(count)),
        )

    def settings(self, pipe: ImagePipeline) -> Sampling:
        """The sampler that is asked for: the checkpoint's, with the request's values; every state recomputed."""
        from untwine.acceleration.sharing.probe import unshared

        kept = pipe.sampling.solver
        return replace(
            unshared(pipe.sampling),
            solver=kept if SOLVERS.name_of(type(kept)) == self.solver else SOLVERS[self.solver](),
            num_inference_steps=self.steps,
            guidance_scale=self.guidance,
            guidance_interval=self.interval,
        )

    def series(self, pipe: ImagePipeline, *, sampling: Sampling | None = None) -> Series:
        """The images as one batch, so that they depend on this request alone."""
        from untwine.pipelines.series import Series

        prompts = {"prompts": [self.prompt] if self.prompt else None, "negative_prompt": self.negative_prompt or None}
        wanted: dict[str, Any] = prompts if self.entry.takes_text else {"labels": self._labels}
        return Series(
            pipe,
            count=self.count,
            seed=self.seed,
            batch_size=self.count,
            size=self.size,
            sampling=sampling or self.settings(pipe),
            **wanted,
        )

    @property
    def _labels(self) -> list[int] | None:
        return None if self.label is None else [self.label]

    def one(self, pipe: ImagePipeline) -> dict[str, Any]:
        """Arguments of the pipeline's call for the image ``first_image`` alone."""
        k = self.first_image
        shared = {"first_image": k, "seed": self.seed, "size": self.size}
        if self.entry.takes_text:
            found = [self.prompt] if self.prompt else list(self.entry.prompts)
            if not found:
                raise Refused("prompt is empty, and this checkpoint carries no examples; write what to draw")
            return {"prompt": found[k % len(found)], "negative_prompt": self.negative_prompt or None, **shared}
        if not pipe.num_classes:
            return {"num_images": 1, **shared}
        return {"class_labels": [k % pipe.num_classes if self.label is None else self.label], **shared}


def defaults(entry: Entry) -> dict[str, Any]:
    """A checkpoint's own settings, by the names of the page; from its files, without loading it."""
    sampling = entry.sampling
    low, high = sampling.get("guidance_interval") or (0.0, 1.0)
    solver = sampling.get("solver") or "euler"
    return {
        "steps": sampling.get("num_inference_steps", 50),
        "guidance": sampling.get("guidance_scale", 1.0),
        "from": low,
        "to": high,
        "solver": solver if isinstance(solver, str) else solver.get("kind", "euler"),
    }


def _interval(low: Any, high: Any) -> tuple[float, float] | None:
    low, high = real("guidance from", low, 0, 1), real("guidance to", high, 0, 1)
    if low >= high:
        raise Refused(f"guidance from must be below guidance to, got {low:g} and {high:g}; 0 and 1 is everywhere")
    return None if (low, high) == (0, 1) else (low, high)


def _size(studio: Studio, height: Any, width: Any, count: int) -> tuple[int, int] | None:
    """(height, width), None for the size of the training."""
    if height in (None, 0, "") and width in (None, 0, ""):
        return None
    most = studio.limits.max_side
    size = whole("height", height, 1, most), whole("width", width, 1, most)
    studio.limits.check_size(size, count)
    return size
