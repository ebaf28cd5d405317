"""The tab Share."""

from __future__ import annotations

from typing import Any

import gradio as gr

from untwine.app.charts import heat_map
from untwine.app.controls import COMPUTE, Settings, job, serving, told, unchecked
from untwine.app.limits import whole
from untwine.app.markup import note, picture, status, table
from untwine.app.requests import Request
from untwine.app.share import COSTS, PREDICTORS, Compared, Measured, compare, measure
from untwine.app.studio import Studio

EMPTY = note(
    "A decoupled model spends most of its work in the encoder, whose state changes slowly. Press Measure to see how "
    "alike the states of the steps are; then choose how often the encoder runs, and compare."
)


class ShareTab:
    """Similarity, plan, and what the plan saves and costs. The measurement is kept for the person on the page."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        with gr.Row(equal_height=False):
            with gr.Column(scale=1, min_width=320):
                self.settings = Settings(studio, many=True)
                with gr.Row():
                    self.go = gr.Button("Measure", variant="primary", elem_id="share-go")
                    self.stop = gr.Button("Cancel", variant="secondary", elem_id="share-stop")
            with gr.Column(scale=2, min_width=320):
                self.status = gr.HTML(elem_id="share-status", label="Status")
                self.map = gr.HTML(EMPTY, elem_id="share-map", label="Similarity")
                with gr.Row():
                    most = studio.limits.max_steps
                    budget = gr.Slider(1, most, 10, step=1, label="Budget", info="encoder runs")
                    order = gr.Dropdown(
                        list(PREDICTORS.items()), value=2, label="In between", info="what the decoder is given"
                    )
                    cost = gr.Dropdown(
                        list(COSTS), value=COSTS[0], label="Steps chosen by", info="as published, or evenly"
                    )
                self.budget, self.order, self.cost = map(unchecked, (budget, order, cost))
                self.compare_ = gr.Button("Compare with the exact run", elem_id="share-compare")
                self.sides = gr.HTML(elem_id="share-sides", label="Comparison")
                with gr.Column(visible=False) as self.kept:
                    plan = gr.File(label="Plan, for untwine sample --plan", interactive=False, elem_id="share-plan")
                    self.plan = serving(studio, plan)
        self.measured = gr.State(None)

    def connect(self, cancel: Any) -> None:
        """The events."""
        wanted = [self.measured, self.budget, self.cost]
        measuring = self.go.click(
            self.measure,
            [*self.settings.all, self.budget, self.cost],
            [self.map, self.measured, self.budget, self.sides, self.status],
            api_name="measure_sharing",
            show_progress_on=self.map,
            **COMPUTE,
        )
        comparing = self.compare_.click(
            self.compare,
            [*wanted, self.order],
            [self.sides, self.plan, self.status],
            api_name="compare_sharing",
            show_progress_on=self.sides,
            **COMPUTE,
        )
        quick: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        measuring.success(lambda: gr.update(visible=False), None, self.kept, **quick)
        comparing.success(lambda: gr.update(visible=True), None, self.kept, **quick)
        for control in (self.budget, self.cost):
            control.change(self.redraw, wanted, self.map, trigger_mode="always_last", **quick)
        self.stop.click(
            cancel, None, self.status, cancels=[measuring, comparing], queue=False, api_visibility="private"
        )

    def measure(
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
        budget: Any,
        cost: Any,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> list[Any]:
        """Measures how alike the encoder states of the steps are."""
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
            budget = min(whole("budget", budget, 1, self.studio.limits.max_steps), wanted.steps)
            found = measure(self.studio, wanted, running)
            drawn = show(found, budget, cost)
        told_line = f"{wanted.entry.label}, {wanted.steps} steps: choose a budget, and compare."
        slider = gr.update(value=budget, maximum=wanted.steps)
        return [drawn, found, slider, "", status(told_line)]

    def redraw(self, measured: Measured | None, budget: Any, cost: Any) -> Any:
        """The frames of another budget."""
        if measured is None:
            return gr.skip()
        with told():
            return show(measured, min(whole("budget", budget, 1, 10**6), measured.request.steps), cost)

    def compare(
        self,
        measured: Measured | None,
        budget: Any,
        cost: Any,
        order: Any,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> list[Any]:
        """Draws the same images exactly and by the plan, and returns them, the numbers and the plan's file."""
        with job(self.studio, request, progress) as running:
            found = compare(self.studio, measured, budget, order, cost, running)
        saved = 1 - found.shared.seconds / found.exact.seconds
        line = f"The encoder ran at {len(found.refresh)} steps; {abs(saved):.0%} of the time {_gained(saved)}."
        return [show_sides(found), str(found.plan), status(line)]


def _gained(saved: float) -> str:
    return "was saved" if saved >= 0 else "was lost"


def show(measured: Measured, budget: int, cost: Any) -> str:
    """The heat map with a frame around the steps that share one state."""
    refresh = measured.refresh(budget, cost)
    title = f"Encoder states of {len(measured.similarity)} steps; a frame: steps that share one"
    return heat_map(title, measured.similarity, refresh, "cosine similarity")


def show_sides(found: Compared) -> str:
    """Exact, accelerated and what differs, side by side, above the numbers."""
    from untwine.pipelines.writing import make_grid

    columns, scale = min(4, len(found.exact.images)), max(1, 48 // found.exact.images.shape[1])
    difference = found.difference
    amplified = (difference.astype("uint16") * 8).clip(0, 255).astype("uint8")
    shown = ((found.exact.images, "exact"), (found.shared.images, "accelerated"), (amplified, "difference, 8 x"))
    figures = "".join(picture(make_grid(images, columns=columns, scale=scale), name, name) for images, name in shown)
    exact, shared = found.exact, found.shared
    rows = [
        ["seconds", f"{exact.seconds:.2f}", f"{shared.seconds:.2f}"],
        ["encoder passes an image", str(exact.encoder_passes), str(shared.encoder_passes)],
        ["network evaluations an image", str(exact.network_evaluations), str(shared.network_evaluations)],
        ["difference, grey levels of 255", "0", f"{difference.mean():.2f} (largest {difference.max()})"],
    ]
    return f'<div class="uw-sides">{figures}</div>{table("", ["", "exact", "accelerated"], rows)}'
