"""The records of long runs that published tables are made from."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("common").kept


def test_a_recorded_run_is_not_run_again(kept: Any, tmp_path: Path):
    file = tmp_path / "records" / "run.json"
    first = kept(file, {"lr": 0.1, "widths": (32, 64)}, lambda: {"loss": 1.5})
    again = kept(file, {"lr": 0.1, "widths": (32, 64)}, lambda: pytest.fail("run again"))
    assert first == again and first["loss"] == 1.5 and first["commit"]
    assert [found.name for found in file.parent.iterdir()] == ["run.json"]


def test_a_record_of_other_settings_is_refused(kept: Any, tmp_path: Path):
    kept(tmp_path / "run.json", {"lr": 0.1}, lambda: {"loss": 1.5})
    with pytest.raises(SystemExit, match=r"run\.json is of a run of other settings"):
        kept(tmp_path / "run.json", {"lr": 0.2}, lambda: {"loss": 1.0})


def test_a_run_that_fails_leaves_no_record(kept: Any, tmp_path: Path):
    def fail() -> dict[str, Any]:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        kept(tmp_path / "run.json", {}, fail)
    assert not list(tmp_path.iterdir())
