"""The tab Measure."""

from __future__ import annotations

from typing import Any

import gradio as gr

from untwine.app.controls import COMPUTE, FIRST, checkpoint_choices, follow_choice, job, serving, told, unchecked
from untwine.app.markup import facts, folded, note, status, table
from untwine.app.measure import DEFAULT_PROTOCOL, HOW, Evaluated, evaluate, protocols, read_results, references
from untwine.app.requests import MAX_SEED, Request
from untwine.app.studio import Studio

EMPTY = note(
    "Press Evaluate to draw samples of all classes in turn and compare them with real pictures by the protocol. The "
    "column real against real is what perfect samples would reach, about."
)


class MeasureTab:
    """An evaluation by protocol, and the tables of the benchmarks."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio
        with gr.Row(equal_height=False):
            with gr.Column(scale=1, min_width=320):
                most = studio.limits.max_samples
                checkpoint = gr.Dropdown(checkpoint_choices(studio), value=FIRST, label="Checkpoint")
                reference = gr.Dropdown(references(), value=FIRST, label="Compare with the data of")
                protocol = gr.Dropdown([DEFAULT_PROTOCOL], value=DEFAULT_PROTOCOL, label="Protocol")
                count = gr.Slider(2, most, min(500, most), step=1, label="Samples", elem_id="measure-count")
                steps = gr.Slider(1, studio.limits.max_steps, 50, step=1, label="Steps")
                seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED)
                self.checkpoint, self.reference, self.protocol = map(unchecked, (checkpoint, reference, protocol))
                self.count, self.steps, self.seed = map(unchecked, (count, steps, seed))
                with gr.Row():
                    self.go = gr.Button("Evaluate", variant="primary", elem_id="measure-go")
                    self.stop = gr.Button("Cancel", variant="secondary", elem_id="measure-stop")
            with gr.Column(scale=2, min_width=320):
                self.status = gr.HTML(elem_id="measure-status", label="Status")
                self.report = gr.HTML(EMPTY, elem_id="measure-report", label="Metrics")
                with gr.Column(visible=False) as self.kept:
                    nearest = gr.Image(
                        label="Nearest pairs",
                        show_label=False,
                        type="filepath",
                        format="png",
                        interactive=False,
                        elem_classes="uw-pixels",
                        buttons=["download", "fullscreen"],
                        elem_id="measure-nearest",
                    )
                    self.nearest = serving(studio, nearest)
                    gr.HTML(status("The samples that resemble a real picture most, above that picture."))
                    file = gr.File(label="Report", interactive=False, elem_id="measure-file")
                    self.file = serving(studio, file)
        gr.HTML("<h2>Results of the benchmarks</h2>")
        self.result = unchecked(gr.Dropdown([], label="Benchmark", elem_id="measure-result"))
        self.tables = gr.HTML(elem_id="measure-tables")

    def connect(self, tab: gr.Tab, cancel: Any) -> None:
        """The events."""
        quick: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        evaluating = self.go.click(
            self.evaluate,
            [self.checkpoint, self.reference, self.protocol, self.count, self.steps, self.seed],
            [self.report, self.nearest, self.file, self.status],
            api_name="evaluate",
            show_progress_on=self.report,
            **COMPUTE,
        )
        evaluating.success(lambda: gr.update(visible=True), None, self.kept, **quick)
        self.stop.click(cancel, None, self.status, cancels=[evaluating], queue=False, api_visibility="private")
        follow_choice(self.checkpoint, gr.State(FIRST), self.follow, [self.reference, self.steps])
        tab.select(self.list, self.result, [self.protocol, self.result], **quick).then(
            self.read, self.result, self.tables, **quick
        )
        self.result.input(self.read, self.result, self.tables, **quick)

    def follow(self, checkpoint: Any) -> list[Any]:
        """The data and the steps of another checkpoint."""
        with told():
            wanted = Request.read(self.studio, checkpoint)
        recipe = wanted.entry.recipe
        return [recipe if recipe in references() else gr.skip(), wanted.steps]

    def list(self, result: Any) -> list[Any]:
        """The protocols and the results that there are."""
        names = list(self.studio.catalog.results())
        chosen = result if result in names else next(iter(names), None)
        return [gr.update(choices=protocols()), gr.update(choices=names, value=chosen)]

    def read(self, result: Any) -> str:
        """One file of results as tables."""
        if not self.studio.catalog.results():
            return note(
                "There are no results in the folder that the studio was started with (--results). Make some:",
                "python benchmarks/demo.py",
            )
        with told():
            found = read_results(self.studio.catalog.result(result))
        drawn = {part.title: table(part.title, part.columns, part.rows) for part in found}
        return "".join(folded(HOW, html) if title == HOW else html for title, html in drawn.items())

    def evaluate(
        self,
        checkpoint: Any,
        reference: Any,
        protocol: Any,
        samples: Any,
        steps: Any,
        seed: Any,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> list[Any]:
        """Compares samples of a checkpoint with real pictures and returns the report."""
        with job(self.studio, request, progress) as running:
            wanted = Request.read(self.studio, checkpoint, steps=steps, seed=seed)
            found = evaluate(self.studio, wanted, reference, protocol, samples, running)
        nearest = None if found.nearest is None else str(found.nearest)
        line = f"{found.values['counts']['samples']} samples against {found.values['counts']['reference']} pictures."
        return [show(found), nearest, str(found.file), status(line)]


def show(found: Evaluated) -> str:
    """The metrics, what they stand on, and whether anything was copied."""
    values = found.values
    rows = [list(row.values()) for row in found.rows]
    protocol, copied = values["protocol"], values["memorisation"]
    told_of = {
        "protocol": protocol["name"]
        + (f" (modified: {', '.join(protocol['modified'])})" if protocol["modified"] else ""),
        "encoder": str(values["encoder"].get("name", protocol["encoder"])),
        "seed": str(values["samples"]["seed"]),
    }
    if "features" in copied:
        told_of["copies of real pictures"] = str(copied["features"]["copies"])
    return table("", ["metric", "value", "real against real"], rows) + facts(told_of)
