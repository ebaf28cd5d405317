"""What several tabs have in common: the settings of a request, and a handler's job."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import gradio as gr

from untwine.app.jobs import Job, explain
from untwine.app.requests import IN_TURN, MAX_SEED, defaults
from untwine.app.studio import Studio
from untwine.diffusion import SOLVERS

COMPUTE: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "compute"}
"""of every event that computes: one at a time, the others wait in the queue"""
FIRST = "ddt-digits"


@contextmanager
def told() -> Iterator[None]:
    """Turns an error inside into a message of the page."""
    from html import escape

    try:
        yield
    except gr.Error:
        raise
    except Exception as error:
        raise gr.Error(escape(explain(error)), print_exception=False, title="Not done") from None


@contextmanager
def job(studio: Studio, request: gr.Request | None, progress: gr.Progress) -> Iterator[Job]:
    """A job of the person who asks, whose progress the page shows."""

    def tell(done: int, total: int, what: str) -> None:
        progress((done, total), desc=what, unit="steps")

    with told(), studio.jobs.run(session_of(request), tell) as found:
        yield found


def session_of(request: gr.Request | None) -> str:
    """Who asks."""
    return str(getattr(request, "session_hash", None) or "")


def unchecked(component: Any) -> Any:
    """The component, passing on what it receives: the limits check it, and say what to do where it does not fit."""
    component.preprocess = lambda payload: payload
    return component


def serving(studio: Studio, component: Any) -> Any:
    """The component, showing files of the outputs where they lie instead of copying them elsewhere."""
    component.GRADIO_CACHE = str(studio.outputs.folder)
    return component


def checkpoint_choices(studio: Studio) -> list[tuple[str, str]]:
    """(label, id) of everything that can be chosen."""
    return [(entry.label, entry.id) for entry in studio.catalog.checkpoints().values()]


def label_choices(classes: tuple[str, ...]) -> list[tuple[str, int]]:
    """(name, label) of the classes, all in turn first."""
    return [("all, in turn", IN_TURN), *((name, k) for k, name in enumerate(classes))]


def follow_choice(
    checkpoint: gr.Dropdown, followed: gr.State, follow: Callable[[Any], list[Any]], controls: list[Any]
) -> None:
    """``controls`` take what ``follow`` says of another checkpoint; Tab out of the list is an input of the same one."""

    def changed(chosen: Any, before: Any) -> Any:
        return gr.skip() if chosen == before else [*follow(chosen), chosen]

    checkpoint.input(
        changed,
        [checkpoint, followed],
        [*controls, followed],
        queue=False,
        show_progress="hidden",
        api_visibility="private",
    )


class Settings:
    """The controls of a request, which follow the chosen checkpoint.

    Args:
        many: ask for a number of images, else for the number of one image.
        short: leave out what only a single picture needs: negative prompt and size.
    """

    def __init__(self, studio: Studio, *, many: bool, short: bool = False) -> None:
        entry = studio.catalog.checkpoint(FIRST)
        own, limits = defaults(entry), studio.limits
        self.studio = studio
        self.checkpoint = unchecked(gr.Dropdown(checkpoint_choices(studio), value=FIRST, label="Checkpoint"))
        self.label = unchecked(gr.Dropdown(label_choices(entry.classes), value=IN_TURN, label="Class"))
        empty = "empty: the checkpoint's examples, in turn"
        self.prompt = gr.Textbox("", label="Prompt", info=empty, visible=False, max_lines=3)
        self.negative = gr.Textbox("", label="Negative prompt", visible=False, max_lines=2)
        with gr.Row():
            if many:
                self.number = unchecked(gr.Slider(1, limits.max_count, 8, step=1, label="Images"))
            else:
                self.number = unchecked(gr.Number(0, label="Image", info="its number", precision=0, minimum=0))
            self.steps = unchecked(gr.Slider(1, limits.max_steps, own["steps"], step=1, label="Steps"))
        with gr.Row():
            self.seed = unchecked(gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, min_width=100))
            self.solver = unchecked(gr.Dropdown(list(SOLVERS), value=own["solver"], label="Solver", min_width=120))
        self.guidance = unchecked(gr.Slider(0, 10, own["guidance"], step=0.05, label="Guidance scale", info="1 = none"))
        with gr.Accordion("More settings", open=False):
            with gr.Row():
                low = gr.Slider(0, 1, own["from"], step=0.01, label="Guidance from t", info="0 = data")
                high = gr.Slider(0, 1, own["to"], step=0.01, label="Guidance to t", info="1 = noise")
            self.low, self.high = unchecked(low), unchecked(high)
            with gr.Row(visible=not short):
                told_size = {"precision": 0, "minimum": 0, "maximum": limits.max_side, "info": "0: as in training"}
                self.height = unchecked(gr.Number(0, label="Height", **told_size))
                self.width = unchecked(gr.Number(0, label="Width", **told_size))
        self.followed = gr.State(FIRST)
        follows = [self.label, self.prompt, self.negative, self.steps, self.guidance, self.low, self.high, self.solver]
        follow_choice(self.checkpoint, self.followed, self._follow, follows)

    def _follow(self, checkpoint: Any) -> list[Any]:
        """Puts the settings of another checkpoint in place."""
        with told():
            entry = self.studio.catalog.checkpoint(checkpoint)
        own, hint = defaults(entry), f"such as: {entry.prompts[0]}" if entry.prompts else ""
        return [
            gr.update(choices=label_choices(entry.classes), value=IN_TURN, visible=bool(entry.classes)),
            gr.update(value="", placeholder=hint, visible=entry.takes_text),
            gr.update(value="", visible=entry.takes_text),
            own["steps"],
            own["guidance"],
            own["from"],
            own["to"],
            own["solver"],
        ]

    @property
    def all(self) -> list[Any]:
        """The controls in the order of the handlers' parameters."""
        about = [self.checkpoint, self.label, self.prompt, self.negative, self.number, self.steps, self.seed]
        return [*about, self.solver, self.guidance, self.low, self.high, self.height, self.width]
