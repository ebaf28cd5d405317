"""A studio over a small root, two short runs and a page that is served once for the session."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

pytest.importorskip("gradio", reason="needs untwine[app]")

from tests.tiny import tiny
from untwine.app.catalog import ASSETS
from untwine.app.limits import Limits
from untwine.app.studio import Studio
from untwine.training.trainer import Trainer

CHROMIUM = next((p for p in ("/usr/bin/chromium", "/usr/bin/chromium-browser") if Path(p).exists()), None)
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"),
    *("--disable-sync", "--no-first-run"),
)
SECRET = "the-secret-outside-of-the-root"


@pytest.fixture(scope="session")
def ground(tmp_path_factory) -> Path:
    """Folders: ``root`` with one saved pipeline, ``runs`` with two runs, and beside them a file nobody may read."""
    ground = tmp_path_factory.mktemp("studio")
    (ground / "root").mkdir()
    shutil.copytree(ASSETS / "ddt-digits", ground / "root" / "mine")
    changes = {"train.num_steps": 8, "train.log_every": 2, "train.validate_every": 4, "train.sample_every": 4}
    for name, seed in (("first", 3), ("second", 4)):
        few = {"num_inference_steps": 3}
        Trainer(tiny(**changes, seed=seed, sampling=few), ground / "runs" / name).fit()
    shutil.copytree(ASSETS / "ddt-digits", ground / "outside" / "stolen")
    (ground / "outside" / "secret.txt").write_text(SECRET)
    (ground / "root" / "linked").symlink_to(ground / "outside" / "stolen")
    shutil.copytree(ASSETS / "ddt-digits", ground / "root" / "inner")
    (ground / "root" / "inner" / "extra.txt").symlink_to(ground / "outside" / "secret.txt")
    return ground


def make_studio(ground: Path, outputs: Path, **limits: float) -> Studio:
    """A studio over the ground, with outputs of its own."""
    results = Path(__file__).parents[2] / "benchmarks" / "results"
    return Studio(root=ground / "root", runs=ground / "runs", results=results, outputs=outputs, limits=Limits(**limits))


@pytest.fixture
def studio(ground, tmp_path) -> Studio:
    return make_studio(ground, tmp_path / "outputs")


@pytest.fixture(scope="session")
def server(ground, tmp_path_factory):
    """The page, served for the whole session; its queue takes the fifty requests of one test."""
    from untwine.app.server import serve

    with serve(make_studio(ground, tmp_path_factory.mktemp("served"), max_queue=64)) as server:
        yield server


@pytest.fixture(scope="session")
def browser():
    """A real Chromium without a screen."""
    required = os.environ.get("UNTWINE_REQUIRE_BROWSER") == "1"
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        if required:
            raise
        pytest.skip("needs playwright (untwine[test])")
    if CHROMIUM is None:
        assert not required, "UNTWINE_REQUIRE_BROWSER=1, and there is no Chromium in /usr/bin"
        pytest.skip("needs Chromium in /usr/bin (apt install chromium)")
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield found
        found.close()
