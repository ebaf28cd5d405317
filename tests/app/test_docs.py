"""docs/studio.md does what it shows."""

from __future__ import annotations

import re

import pytest

from tests.docs.pages import DOCS, blocks
from untwine.cli.app import AppOptions, run

pytestmark = pytest.mark.xdist_group("studio")
PAGE = DOCS / "studio.md"


def test_the_python_of_the_page_runs(server, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for language, code in blocks(PAGE):
        if language == "python":
            exec(code.replace("http://127.0.0.1:7860/", server.url), names)
    assert names["report"]["count"] == 4 and names["report"]["sampling"]["num_inference_steps"] == 25
    assert len(names["images"]) == 4 and "4 images in" in names["told"]
    printed = capsys.readouterr().out
    assert "'ddt-digits': ['0', '1'," in printed and re.search(r"http://127\.0\.0\.1:\d+/$", printed)


def test_the_endpoints_it_names_exist(server):
    named = set(re.findall(r"`/(\w+)`", PAGE.read_text(encoding="utf-8"))) | {"create", "checkpoints"}
    known = {fn.api_name for fn in server.page.fns.values() if fn.api_visibility == "public"}
    assert named == known


def test_the_flags_it_names_exist(capsys):
    with pytest.raises(SystemExit):
        run(["--help"])
    printed = capsys.readouterr().out
    for flag in re.findall(r"--[a-z-]+", PAGE.read_text(encoding="utf-8")):
        assert flag in printed or flag in ("--plan", "--train"), flag
    assert AppOptions().limits.max_count == 16


def test_a_wrong_flag_and_an_open_host_are_errors(capsys, tmp_path):
    from untwine.cli import main

    assert main(["app", "--host", "0.0.0.0", "--outputs", str(tmp_path / "out")]) == 2
    assert "set auth" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit):
        main(["app", "--max-cuont", "3"])
