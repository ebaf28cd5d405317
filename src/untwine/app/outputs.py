"""The folder for everything that is made: generated names, and a size that it keeps to."""

from __future__ import annotations

import re
import shutil
import threading
import uuid
from pathlib import Path

_SET = re.compile(r"[0-9a-f]{32}")


class Outputs:
    """Makes one folder a request, named by a number that cannot be guessed; the oldest are removed beyond a size.

    Nothing else in the folder is touched.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"outputs: cannot write to {folder}: {error.strerror}; choose another folder") from error
        self.folder, self.max_bytes = folder.resolve(), max_bytes
        self._turn = threading.Lock()

    def new(self) -> Path:
        """A new, empty folder."""
        folder = self.folder / uuid.uuid4().hex
        folder.mkdir()
        return folder

    def sets(self) -> list[Path]:
        """The folders that were made here, the oldest first."""
        made = [f for f in self.folder.iterdir() if _SET.fullmatch(f.name) and f.is_dir() and not f.is_symlink()]
        return sorted(made, key=lambda folder: folder.stat().st_mtime_ns)

    def trim(self) -> None:
        """Removes the oldest folders until the rest keeps to the size; the newest stays in any case."""
        with self._turn:
            made = self.sets()
            sizes = {folder: sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) for folder in made}
            total = sum(sizes.values())
            for folder in made[:-1]:
                if total <= self.max_bytes:
                    break
                shutil.rmtree(folder, ignore_errors=True)
                total -= sizes[folder]


def is_made(path: str, outputs: Path) -> bool:
    """Whether ``path`` names a file, links resolved, in a folder that :class:`Outputs` made under ``outputs``."""
    try:
        found = Path(path).resolve(strict=True)
    except (OSError, ValueError, RuntimeError):  # not there, with a NUL in it, or in a circle
        return False
    if not found.is_relative_to(outputs) or not found.is_file():
        return False
    return _SET.fullmatch(found.relative_to(outputs).parts[0]) is not None
