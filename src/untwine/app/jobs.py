"""One job at a time, that can be stopped between two steps; errors as messages that give nothing away."""

from __future__ import annotations

import logging
import re
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

logger = logging.getLogger(__name__)
Tell = Callable[[int, int, str], None]
"""(done, of how many, what)"""
_PATH = re.compile(r"(?<![\w.<])(?:~?/|\\\\|[A-Za-z]:\\)[\w.]")


class Stopped(Exception):
    """A job was stopped; ``step`` is the number of steps it had finished."""

    def __init__(self, step: int, num_steps: int) -> None:
        super().__init__(
            f"Stopped after step {step} of {num_steps}." if num_steps else "Stopped before the first step."
        )
        self.step, self.num_steps = step, num_steps


class Job:
    """A running job: hears each step, tells how far it is, and raises :class:`Stopped` when it was asked to stop."""

    def __init__(self, session: str, tell: Tell | None = None) -> None:
        self.session, self._tell = session, tell or (lambda done, total, what: None)
        self.stop, self.finished = threading.Event(), threading.Event()
        self.what, self.done, self.total = "", 0, 0

    def begin(self, what: str) -> None:
        """Names what comes next."""
        self.what = what
        self.check()

    def check(self) -> None:
        """Raises Stopped where the job was asked to stop."""
        if self.stop.is_set():
            raise Stopped(self.done, self.total)

    def at(self, done: int, total: int) -> None:
        """So much is done."""
        self.done, self.total = done, total
        self.check()
        self._tell(done, total, self.what)

    def step(self, at: Any, x: Any) -> None:
        """The ``on_step`` of a sampling."""
        self.at(at.step + 1, at.num_steps)


class Jobs:
    """Runs one job at a time, whoever asks; the queue in front of it is the server's."""

    def __init__(self) -> None:
        self._turn, self._running = threading.Lock(), None

    @contextmanager
    def run(self, session: str = "", tell: Tell | None = None) -> Iterator[Job]:
        """Waits for its turn, and is the running job inside."""
        with self._turn:
            job = self._running = Job(session, tell)
            try:
                yield job
            finally:
                self._running = None
                job.finished.set()

    def cancel(self, session: str, *, wait_seconds: float = 30.0) -> Job | None:
        """Stops the running job of ``session`` and returns it when it has ended; None where it has none."""
        job = self._running
        if job is None or job.session != session:
            return None
        job.stop.set()
        job.finished.wait(wait_seconds)
        return job


def explain(error: Exception) -> str:
    """What the page may say of an error: the library's own message, or an id under which the log has the traceback."""
    if isinstance(error, Stopped):
        return str(error)
    told = str(error)
    ours = isinstance(error, ValueError | ImportError) and type(error).__module__.startswith(("untwine", "builtins"))
    if ours and 0 < len(told) < 1000 and not _PATH.search(told):
        return told[0].upper() + told[1:]
    number = uuid.uuid4().hex[:8]
    logger.error("error %s", number, exc_info=error)
    return f"Something went wrong here. The log has the details under error {number}."
