"""The tab Create."""

from __future__ import annotations

from typing import Any

import gradio as gr

from untwine.app.controls import COMPUTE, Settings, job, serving, session_of, told, unchecked
from untwine.app.create import Created, create
from untwine.app.markup import facts, status
from untwine.app.requests import Request
from untwine.app.studio import Studio

_CHOSEN = """() => {
  const items = [...document.querySelectorAll("#create-gallery .thumbnail-item")];
  return items.findIndex((item) => item.classList.contains("selected"));
}"""


class CreateTab:
    """Controls on the left, pictures on the right.

    ``made`` holds, for the person on the page, the request behind the pictures and where they are.
    """

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        with gr.Row(equal_height=False):
            with gr.Column(scale=1, min_width=320):
                self.settings = Settings(studio, many=True)
                with gr.Row():
                    self.go = gr.Button("Create", variant="primary", elem_id="create-go")
                    self.stop = gr.Button("Cancel", variant="secondary", elem_id="create-stop")
            with gr.Column(scale=2, min_width=320):
                self.gallery = serving(
                    studio,
                    gr.Gallery(
                        label="Images",
                        columns=4,
                        object_fit="contain",
                        height="auto",
                        elem_id="create-gallery",
                        elem_classes="uw-pixels",
                        buttons=["download", "fullscreen"],
                    ),
                )
                self.status = gr.HTML(
                    status("Choose a checkpoint and press Create."), elem_id="create-status", label="Status"
                )
                with gr.Column(visible=False) as self.one:
                    self.about = gr.HTML(elem_id="create-about")
                    self.watch = gr.Button("Watch this one form", elem_id="create-watch")
                with gr.Column(visible=False) as self.kept:
                    self.files = serving(studio, gr.Files(label="Keep", interactive=False, elem_id="create-files"))
                    with gr.Accordion("Report", open=False):
                        self.report = gr.JSON(label="Report", show_label=False)
        self.made = gr.State(None)
        self.chosen = unchecked(gr.Number(-1, visible=False))

    def connect(self) -> None:
        """The events."""
        quick: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        outputs = [self.gallery, self.files, self.report, self.status, self.made]
        drawing = self.go.click(
            self.create, self.settings.all, outputs, api_name="create", show_progress_on=self.gallery, **COMPUTE
        )
        drawing.success(
            lambda: [gr.update(visible=False), gr.update(visible=True)], None, [self.one, self.kept], **quick
        )
        self.stop.click(self.cancel, None, self.status, cancels=[drawing], queue=False, api_name="cancel")
        # Gradio's own event names the file, which it then refuses, as it lies outside of its own cache.
        self.gallery.select(None, None, self.chosen, js=_CHOSEN, **quick).then(
            self.select, [self.made, self.chosen], [self.about, self.one], **quick
        )

    def create(
        self,
        checkpoint: Any,
        label: Any,
        prompt: Any,
        negative_prompt: Any,
        count: Any,
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
        """Draws images and returns them with their files and a report."""
        with job(self.studio, request, progress) as running:
            wanted = Request.read(
                self.studio,
                checkpoint,
                label=label,
                prompt=prompt,
                negative_prompt=negative_prompt,
                count=count,
                steps=steps,
                seed=seed,
                solver=solver,
                guidance=guidance,
                guidance_from=guidance_from,
                guidance_to=guidance_to,
                height=height,
                width=width,
            )
            made = create(self.studio, wanted, running)
        report = made.report
        line = (
            f"{wanted.count} images in {report['seconds']:.1f} s, "
            f"{report['network_evaluations'] // wanted.count} network evaluations an image."
        )
        hint = "" if made.pictures else " The checkpoint has no codec for pictures: the latents are in samples.npz."
        pictures = [(str(path), caption) for path, caption in made.pictures]
        return [pictures, [str(path) for path in made.files], report, status(line + hint), made]

    def cancel(self, request: gr.Request) -> str:
        """Stops what the same person has running, and says after which step."""
        with told():
            stopped = self.studio.jobs.cancel(session_of(request))
        if stopped is None:
            return status("Nothing of yours is running.")
        return status(f"Stopped after step {stopped.done} of {stopped.total}." if stopped.total else "Stopped.")

    def select(self, made: Created | None, chosen: Any) -> list[Any]:
        """Shows the settings of one picture."""
        if made is None or chosen not in range(len(made.pictures)):
            return ["", gr.update(visible=False)]
        with told():
            about = made.about(int(chosen))
        sampling = about["sampling"]
        shown = {
            "image": about["image"],
            "seed": about["seed"],
            **{name: about[name] for name in ("label", "prompt") if name in about},
            "steps": sampling["num_inference_steps"],
            "guidance": sampling["guidance_scale"],
            "where guidance acts": sampling["guidance_interval"] or "everywhere",
            "solver": sampling["solver"]["kind"] if isinstance(sampling["solver"], dict) else sampling["solver"],
            "weights": ", ".join(str(about["origin"][k]) for k in ("recipe", "weights") if k in about["origin"]),
        }
        return [facts(shown), gr.update(visible=True)]
