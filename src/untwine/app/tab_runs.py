"""The tab Runs."""

from __future__ import annotations

from typing import Any

import gradio as gr
from PIL import Image

from untwine.app.charts import line_chart
from untwine.app.controls import told, unchecked
from untwine.app.markup import facts, note, picture, status
from untwine.app.runs import Run, curves, read_runs
from untwine.app.studio import Studio

SECONDS = 3.0
"""between two looks at a live run"""
_AXES = {
    "Loss": ("optimizer step", "loss", True),
    "Parts of the loss": ("optimizer step", "loss", True),
    "Loss by time": ("t (0 = data, 1 = noise)", "loss", True),
    "Learning rate": ("optimizer step", "learning rate", False),
    "Images per second": ("optimizer step", "images/s", False),
    "Norm of the gradient": ("optimizer step", "norm", True),
}


class RunsTab:
    """The log of a run, live, alone or beside another one."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        with gr.Row():
            self.first = unchecked(gr.Dropdown([], label="Run", elem_id="runs-first", scale=2))
            self.second = unchecked(
                gr.Dropdown([("none", "")], value="", label="Compare with", elem_id="runs-second", scale=2)
            )
            self.live = gr.Checkbox(True, label="Live", info=f"looks every {SECONDS:g} s", scale=1)
            self.refresh = gr.Button("Look again", elem_id="runs-refresh", scale=1)
        self.view = gr.HTML(elem_id="runs-view")
        self.step = unchecked(gr.Slider(0, 1, 1, step=1, label="Samples at step", visible=False, elem_id="runs-step"))
        self.sheets = gr.HTML(elem_id="runs-sheets")
        self.timer = gr.Timer(SECONDS, active=False)

    def connect(self, tab: gr.Tab) -> None:
        """The events; the timer only runs while the tab is open."""
        chosen, quick = [self.first, self.second], {"queue": False, "show_progress": "hidden"}
        shown = [self.view, self.step, self.sheets]
        tab.select(self.list, chosen, chosen, api_visibility="private", **quick).then(
            self.look, [*chosen, self.step], shown, api_visibility="private", **quick
        ).then(self.watch, self.live, self.timer, api_visibility="private", **quick)
        self.refresh.click(self.list, chosen, chosen, api_visibility="private", **quick).then(
            self.look, [*chosen, self.step], shown, api_visibility="private", **quick
        )
        for control in chosen:
            control.input(self.look, [*chosen, self.step], shown, api_visibility="private", **quick)
        self.timer.tick(self.look, [*chosen, self.step], shown, api_visibility="private", **quick)
        self.live.change(self.watch, self.live, self.timer, api_visibility="private", **quick)
        self.step.input(self.turn, [*chosen, self.step], self.sheets, api_visibility="private", **quick)

    def list(self, first: Any, second: Any) -> list[Any]:
        """The runs that there are now; the newest is chosen unless another one was."""
        names = list(self.studio.catalog.runs())
        first = first if first in names else next(iter(names), None)
        second = second if second in names else ""
        return [gr.update(choices=names, value=first), gr.update(choices=[("none", ""), *names], value=second)]

    def watch(self, live: Any) -> Any:
        """Starts or stops looking."""
        return gr.Timer(active=bool(live))

    def look(self, first: Any, second: Any, step: Any) -> list[Any]:
        """Everything about the chosen runs as it is now."""
        if not self.studio.catalog.runs():
            return [self._none(), gr.update(visible=False), ""]
        with told():
            found = read_runs(self.studio, first, second)
        steps = sorted({s for run in found for s in run.sheets})
        at = step if steps and isinstance(step, int | float) and steps[0] <= step < steps[-1] else (steps or [0])[-1]
        slider = gr.update(minimum=steps[0], maximum=steps[-1], value=at) if len(steps) > 1 else gr.update()
        return [show(found), {**slider, "visible": len(steps) > 1}, show_sheets(found, at)]

    def turn(self, first: Any, second: Any, step: Any) -> str:
        """The samples at another step."""
        with told():
            return show_sheets(read_runs(self.studio, first, second), step)

    def _none(self) -> str:
        return note(
            "There are no runs yet in the folder that the studio was started with (--runs). Make one, and it appears "
            "here while it trains:",
            "untwine train ddt-digits --out runs/digits --train.sample-every 100",
        )


def show(runs: list[Run]) -> str:
    """Where the runs stand, and their curves."""
    parts = [f"<h3>{_escape(run.name)}</h3>{facts(run.facts)}" for run in runs if run.facts]
    if not parts:
        return status("This run has not logged a step yet.")
    charts = "".join(
        line_chart(title, found, *_AXES[title][:2], log=_AXES[title][2])
        for title, found in curves(runs).items()
        if found
    )
    return f'<div class="uw-sides">{"".join(f"<section>{part}</section>" for part in parts)}</div>' + (
        f'<div class="uw-charts">{charts}</div>'
    )


def show_sheets(runs: list[Run], step: Any) -> str:
    """The samples of each run at a step, or the newest before it."""
    found = [(run, run.sheet(step)) for run in runs]
    if not any(sheet for _, sheet in found):
        return note(
            "No samples were drawn in this run. Samples of always the same noise come with:",
            "untwine train RECIPE --train.sample-every 100",
        )
    figures = []
    for run, sheet in found:
        if sheet is not None:
            at, path = sheet
            with Image.open(path) as image:
                figures.append(picture(image, f"samples of {run.name} at step {at}", f"{run.name}, step {at}"))
    return f'<div class="uw-sides">{"".join(figures)}</div>'


def _escape(text: str) -> str:
    from html import escape

    return escape(text)
