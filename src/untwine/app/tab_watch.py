"""The tab Watch."""

from __future__ import annotations

from typing import Any

import gradio as gr

from untwine.app.charts import line_chart
from untwine.app.controls import COMPUTE, Settings, job, serving
from untwine.app.markup import film, note, status
from untwine.app.requests import Request
from untwine.app.studio import Studio
from untwine.app.watch import Watched, watch

EMPTY = note(
    "Press Watch to see one image form: what the network sees at each step (x_t), what it would end at (x0), how fast "
    "it moves, and where guidance acts. Or choose an image in Create and press Watch this one form."
)


class WatchTab:
    """One image, step by step."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        with gr.Row(equal_height=False):
            with gr.Column(scale=1, min_width=320):
                self.settings = Settings(studio, many=False)
                with gr.Row():
                    self.go = gr.Button("Watch", variant="primary", elem_id="watch-go")
                    self.stop = gr.Button("Cancel", variant="secondary", elem_id="watch-stop")
            with gr.Column(scale=2, min_width=320):
                self.status = gr.HTML(elem_id="watch-status", label="Status")
                self.film = gr.HTML(EMPTY, elem_id="watch-film", label="Film strip")
                with gr.Row(visible=False) as self.more:
                    with gr.Column(min_width=280):
                        animation = gr.Image(
                            label="Animation: x_t on the left, the predicted x0 on the right",
                            show_label=False,
                            type="filepath",
                            format="webp",
                            interactive=False,
                            buttons=["download", "fullscreen"],
                            elem_classes="uw-pixels",
                            elem_id="watch-animation",
                        )
                        self.animation = serving(studio, animation)
                        gr.HTML(status("Left: x_t, what the network sees. Right: the x0 that it predicts there."))
                    with gr.Column(min_width=280):
                        self.speed = gr.HTML(elem_id="watch-speed", label="Velocity")

    @property
    def outputs(self) -> list[Any]:
        """What the handler fills."""
        return [self.film, self.animation, self.speed, self.status]

    def connect(self, cancel: Any) -> None:
        """The events; ``cancel`` is the handler that stops a job."""
        drawing = self.go.click(
            self.watch, self.settings.all, self.outputs, api_name="watch", show_progress_on=self.film, **COMPUTE
        )
        self.animation.change(
            lambda: gr.update(visible=True),
            None,
            self.more,
            queue=False,
            show_progress="hidden",
            api_visibility="private",
        )
        self.stop.click(cancel, None, self.status, cancels=[drawing], queue=False, api_visibility="private")

    def watch(
        self,
        checkpoint: Any,
        label: Any,
        prompt: Any,
        negative_prompt: Any,
        image: Any,
        steps: Any,
        seed: Any,
        solver: Any,
        guidance: Any,
        guidance_from: Any,
        guidance_to: Any,
        height: Any,
        width: Any,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> list[Any]:
        """Draws one image and returns its film strip, animation and curve as HTML, a file and HTML."""
        with job(self.studio, request, progress) as running:
            wanted = Request.read(
                self.studio,
                checkpoint,
                label=label,
                prompt=prompt,
                negative_prompt=negative_prompt,
                first_image=image,
                steps=steps,
                seed=seed,
                solver=solver,
                guidance=guidance,
                guidance_from=guidance_from,
                guidance_to=guidance_to,
                height=height,
                width=width,
            )
            seen = watch(self.studio, wanted, running)
        share = sum(seen.guided) / len(seen.guided)
        line = f"{len(seen.times)} steps; guidance was active in {share:.0%} of them."
        return [film(seen.frames, seen.final), str(seen.animation), speed_chart(seen), status(line)]


def speed_chart(seen: Watched) -> str:
    """The size of the velocity over time, and where guidance was active."""
    return line_chart(
        "Velocity",
        {"size of the velocity": list(zip(seen.times, seen.speeds))},
        "t (1 = noise, 0 = data)",
        "root mean square",
        marked=_intervals(seen),
        mark="guidance is active",
        falling=True,
    )


def _intervals(seen: Watched) -> list[tuple[float, float]]:
    """The times of neighbouring steps with guidance; a step lasts until the next one's time."""
    ends = [*seen.times[1:], 0.0]
    found: list[tuple[float, float]] = []
    for t, end, active in zip(seen.times, ends, seen.guided):
        if not active:
            continue
        if found and found[-1][1] == t:
            found[-1] = (found[-1][0], end)
        else:
            found.append((t, end))
    return found
