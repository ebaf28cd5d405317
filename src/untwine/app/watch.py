"""Watch: how one image forms, step by step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from untwine.app.jobs import Job
from untwine.app.limits import Refused
from untwine.app.requests import Request
from untwine.app.studio import Studio

if TYPE_CHECKING:
    from PIL.Image import Image

FRAMES = 24
"""steps that are shown at most"""


@dataclass(frozen=True)
class Frame:
    """One step: what the network saw, and what it would have ended at."""

    step: int
    t: float
    x_t: Image
    x0: Image


@dataclass(frozen=True)
class Watched:
    """The denoising of one image."""

    frames: list[Frame]
    final: Image
    times: list[float]
    """of every step"""
    speeds: list[float]
    """root mean square of the guided velocity at every step"""
    guided: list[bool]
    """whether guidance was active"""
    animation: Path
    """x_t beside the x0 prediction, as an animated WebP"""


def watch(studio: Studio, request: Request, job: Job) -> Watched:
    """Draws the image ``request.first_image`` and records what the network predicts at each step.

    The image is the one that Create draws, bit for bit where both draw it alone.
    """
    from untwine.app.observing import Observed
    from untwine.contracts import StepInfo

    job.begin("denoising")
    pipe = studio.pipe(request.entry)
    if not pipe.makes_pictures:
        raise Refused("this checkpoint makes latents and has no codec for pictures; choose one that has")
    settings = request.settings(pipe)
    seen: list[tuple[float, Any, Any]] = []

    def see(i: int, stage: int, x: Any, t: Any, prediction: Any) -> None:
        if stage == 0:
            seen.append((float(t), x, prediction))

    observed = replace(settings, solver=Observed(settings.solver, see))
    asked: dict[str, Any] = {**request.one(pipe), "sampling": observed, "output_type": "latent", "on_step": job.step}
    latents: Any = pipe(**asked).images  # type: ignore[union-attr]
    job.begin("decoding")
    steps = _spread(len(seen), FRAMES)
    frames = [Frame(i, seen[i][0], *pipe.to_images(_pair(seen[i]))) for i in steps]
    weights = settings.weights(conditional=bool(pipe.model.accepts))
    active = [len(weights(StepInfo(i, 0, len(seen)), t)) > 1 for i, (t, _, _) in enumerate(seen)]
    speeds = [float(prediction.velocity.float().square().mean().sqrt()) for _, _, prediction in seen]
    final = pipe.to_images(latents)[0]
    path = studio.outputs.new() / "denoising.webp"
    animate(frames, final, path)
    studio.outputs.trim()
    return Watched(frames, final, [t for t, _, _ in seen], speeds, active, path)


def _pair(seen: tuple[float, Any, Any]) -> Any:
    """(2, C, H, W): x_t and the predicted x0."""
    import torch

    return torch.cat([seen[1], seen[2].x0.to(seen[1].dtype)])


def _spread(count: int, most: int) -> list[int]:
    """At most ``most`` of the steps, evenly spread, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return [round(k * (count - 1) / (most - 1)) for k in range(most)]


def animate(frames: list[Frame], final: Image, path: Path) -> None:
    """x_t and the x0 prediction side by side, step after step; the last picture stays for a while."""
    import PIL.Image as pil

    scale = max(1, 192 // final.height)
    width, height = final.width * scale, final.height * scale

    def sheet(*pair: Image) -> Image:
        both = pil.new("RGB", (2 * width + 8, height), (128, 128, 128))
        for k, picture in enumerate(pair):
            both.paste(picture.convert("RGB").resize((width, height), pil.Resampling.NEAREST), (k * (width + 8), 0))
        return both

    sheets = [sheet(f.x_t, f.x0) for f in frames] + [sheet(final, final)]
    durations = [120] * len(frames) + [1500]
    sheets[0].save(path, save_all=True, append_images=sheets[1:], duration=durations, loop=0, lossless=True)
