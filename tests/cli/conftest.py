from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tests.tiny import tiny
from untwine.cli import main
from untwine.training.trainer import Trainer


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory) -> Path:
    """A trained tiny run on digits."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    Trainer(tiny(), folder).fit()
    return folder


@pytest.fixture(scope="session")
def recipe_file(tmp_path_factory) -> Path:
    """The same recipe as a YAML file, as a user would have it."""
    data = tiny(**{"train.num_steps": 2, "train.log_every": 1}).to_dict()
    for told_by_data in ("in_channels", "num_classes"):
        del data["model"][told_by_data]
    file = tmp_path_factory.mktemp("recipes") / "mine.yaml"
    file.write_text(yaml.safe_dump(data, sort_keys=False))
    return file


@pytest.fixture
def untwine(capsys):
    """Runs a command line in this process: (exit status, standard output, standard error)."""

    def call(*args: object) -> tuple[int, str, str]:
        try:
            status = main([str(arg) for arg in args])
        except SystemExit as stop:  # help, and wrong flags
            status = int(stop.code or 0)
        out, err = capsys.readouterr()
        return status, out, err

    return call


@pytest.fixture
def refused(untwine):
    """Runs a command line that must fail as a user's error, and returns its message as one line without frames."""

    def call(*args: object) -> str:
        status, out, err = untwine(*args)
        assert status == 2, f"status {status}\n{out}\n{err}"
        assert "Traceback" not in err
        return " ".join(err.replace("│", " ").split())

    return call
