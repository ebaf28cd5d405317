from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults.checkpoints import put


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def path(root: Path) -> Path:
    return put(root, 1)
