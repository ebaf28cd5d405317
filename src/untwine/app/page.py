"""The page: five tabs over the functions of this package, and nothing of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr
from gradio import themes
from gradio.events import api

from untwine.app.controls import COMPUTE, checkpoint_choices, label_choices, session_of, told
from untwine.app.create import Created
from untwine.app.requests import IN_TURN
from untwine.app.studio import Studio
from untwine.app.tab_create import CreateTab
from untwine.app.tab_measure import MeasureTab
from untwine.app.tab_runs import RunsTab
from untwine.app.tab_share import ShareTab
from untwine.app.tab_watch import WatchTab

CSS = Path(__file__).with_name("style.css")
_HEAD = (
    '<header class="uw-head"><h1>untwine studio</h1>'
    "<p>decoupled diffusion transformers: make pictures, see them form, see what the encoder shares</p></header>"
)


def theme() -> Any:
    """System fonts, a calm ground, one accent; light and dark as the reader's system has it."""
    fonts = [themes.Font(name) for name in ("ui-sans-serif", "system-ui", "sans-serif")]
    mono = [themes.Font(name) for name in ("ui-monospace", "monospace")]
    calm = themes.Default(primary_hue="teal", neutral_hue="slate", font=fonts, font_mono=mono)
    return calm.set(  # darker than the defaults, whose teal and greys are hard to read on white
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_600",
        body_text_color_subdued="*neutral_500",
        block_info_text_color="*neutral_500",
        block_label_text_color="*neutral_600",
        block_title_text_color="*neutral_600",
        slider_color="*primary_600",
        color_accent="*primary_600",
    )


def build(studio: Studio) -> gr.Blocks:
    """The whole page."""
    with gr.Blocks(title="untwine studio", analytics_enabled=False, fill_width=True) as page:
        gr.HTML(_HEAD)
        with gr.Tabs(selected="create") as tabs:
            with gr.Tab("Create", id="create"):
                create = CreateTab(studio)
            with gr.Tab("Watch", id="watch"):
                watch = WatchTab(studio)
            with gr.Tab("Share", id="share"):
                share = ShareTab(studio)
            with gr.Tab("Runs", id="runs") as runs_tab:
                runs = RunsTab(studio)
            with gr.Tab("Measure", id="measure") as measure_tab:
                measure = MeasureTab(studio)
        create.connect()
        watch.connect(create.cancel)
        share.connect(create.cancel)
        runs.connect(runs_tab)
        measure.connect(measure_tab, create.cancel)
        _hand_over(create, watch, tabs)
        _offer(page, studio, create, watch, share, measure)

        def leave(request: gr.Request) -> None:
            studio.jobs.cancel(session_of(request), wait_seconds=0)

        page.unload(leave)
    return page


def _hand_over(create: CreateTab, watch: WatchTab, tabs: gr.Tabs) -> None:
    """Watch this one form: the settings of the chosen picture go to the other tab, which draws it again."""

    def settings(made: Created | None, chosen: Any) -> list[Any]:
        with told():
            if made is None:
                raise ValueError("nothing is chosen; create images and choose one")
            r = made.request
        label = gr.update(
            choices=label_choices(r.entry.classes),
            value=IN_TURN if r.label is None else r.label,
            visible=bool(r.entry.classes),
        )
        texts = [gr.update(value=v, visible=r.entry.takes_text) for v in (r.prompt, r.negative_prompt)]
        low, high = r.interval or (0, 1)
        height, width = r.size or (0, 0)
        rest = [r.steps, r.seed, r.solver, r.guidance, low, high, height, width]
        return [r.entry.id, label, *texts, int(chosen), *rest, r.entry.id, gr.Tabs(selected="watch")]

    create.watch.click(
        settings,
        [create.made, create.chosen],
        [*watch.settings.all, watch.settings.followed, tabs],
        queue=False,
        api_visibility="private",
    ).success(
        watch.watch, watch.settings.all, watch.outputs, api_visibility="private", show_progress_on=watch.film, **COMPUTE
    )


def _offer(page: gr.Blocks, studio: Studio, *tabs: Any) -> None:
    """Each visit sees the checkpoints that there are then; the API lists them by ``/checkpoints``."""
    lists = [getattr(tab, "settings", tab).checkpoint for tab in tabs]

    def choices() -> list[Any]:
        found = checkpoint_choices(studio)
        return [gr.update(choices=found) for _ in lists]

    def checkpoints() -> dict[str, list[str]]:
        """Ids of the checkpoints, each with the names of its classes."""
        return {entry.id: list(entry.classes) for entry in studio.catalog.checkpoints().values()}

    page.load(choices, None, lists, queue=False, show_progress="hidden", api_visibility="private")
    api(checkpoints, api_name="checkpoints", queue=False)
