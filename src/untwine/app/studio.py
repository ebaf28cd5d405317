"""What all tabs share: what can be chosen, what is made, whose turn it is, and the pipelines that are loaded."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING

from untwine.app.catalog import Catalog, Entry
from untwine.app.jobs import Jobs
from untwine.app.limits import Limits
from untwine.app.outputs import Outputs

if TYPE_CHECKING:
    from untwine.pipelines.image import ImagePipeline

_LOADED = 2


class Studio:
    """The state behind the page. It holds no state of a person, and nothing of a job outlives it.

    Args:
        root, runs, results: as of :func:`untwine.app.launch`.
    """

    def __init__(
        self,
        *,
        root: str | Path | None = None,
        runs: str | Path = "runs",
        results: str | Path = "benchmarks/results",
        outputs: str | Path = "out/app",
        limits: Limits | None = None,
    ) -> None:
        self.limits = limits or Limits()
        self.catalog = Catalog(None if root is None else Path(root), Path(runs), Path(results))
        self.outputs = Outputs(Path(outputs), int(self.limits.max_output_mib * 2**20))
        self.jobs = Jobs()
        self._loaded: OrderedDict[tuple[str, str], ImagePipeline] = OrderedDict()

    def pipe(self, entry: Entry) -> ImagePipeline:
        """The pipeline of a checkpoint, loaded once and again when a run has saved a newer one; within a job only."""
        import torch

        from untwine.pipelines.loading import load

        key = (entry.id, entry.version)
        if key not in self._loaded:
            device = "cuda" if torch.cuda.is_available() else "cpu"
            self._loaded[key] = load(entry.folder, device=device)
            while len(self._loaded) > _LOADED:
                self._loaded.popitem(last=False)
        self._loaded.move_to_end(key)
        return self._loaded[key]

    def warm_up(self) -> None:
        """Imports what drawing needs, so that the first picture does not wait for it."""
        import untwine.pipelines.loading
        import untwine.pipelines.writing  # noqa: F401
