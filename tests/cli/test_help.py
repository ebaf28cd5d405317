"""Help and imports: quick, and without torch or diffusers."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from untwine.cli import VERBS

CHECK = "heavy = [m for m in ('torch', 'diffusers', 'numpy', 'PIL') if m in sys.modules]; assert not heavy, heavy"


def _python(program: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)


HELPS = [["--help"], ["--version"], *([verb, "--help"] for verb in VERBS), ["info"]]


@pytest.mark.parametrize("args", HELPS, ids=" ".join)
def test_needs_no_torch(args):
    call = f"try: main({args!r})\nexcept SystemExit as stop: assert not stop.code"
    done = _python(f"import sys\nfrom untwine.cli import main\n{call}\n{CHECK}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    if args[0] in VERBS and len(args) == 2:
        assert done.stdout.startswith(f"usage: untwine {args[0]}")


def test_import_needs_no_torch():
    packages = "untwine.models, untwine.diffusion, untwine.codecs, untwine.data"
    done = _python(f"import sys, untwine, {packages}\n{CHECK}")
    assert done.returncode == 0, done.stderr


def test_every_verb_is_listed(untwine):
    status, out, _ = untwine()
    assert status == 0
    assert all(f"  {verb}" in out for verb in VERBS)


def test_unknown_verb(refused):
    assert "unknown verb 'samlpe'; did you mean 'sample'?" in refused("samlpe")


def test_help_of_a_recipe_lists_its_options(untwine):
    status, out, _ = untwine("train", "ddt-digits", "--help")
    assert status == 0
    assert "--model.hidden-size INT" in out
    assert "--train.num-steps INT" in out


def test_help_of_a_checkpoint_lists_its_settings(untwine, run_folder):
    status, out, _ = untwine("sample", run_folder, "--help")
    assert status == 0
    assert "--guidance-scale FLOAT" in out


def test_interruption_and_lost_reader(untwine, monkeypatch):
    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setattr("untwine.cli.info.run", interrupt)
    assert untwine("info") == (130, "", "untwine info: interrupted\n")
    call = f"{sys.executable} -c 'from untwine.cli import main; main()' info | true"
    done = subprocess.run(call, shell=True, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""


def test_tests_reach_no_network():
    with pytest.raises(RuntimeError, match=r"tried to reach 'example.org'"):
        socket.create_connection(("example.org", 80), timeout=1)
    with pytest.raises(RuntimeError, match=r"tried to reach '192.0.2.1'"):
        socket.socket().connect(("192.0.2.1", 80))


def test_info_lists_and_describes(untwine, run_folder):
    status, out, _ = untwine("info")
    assert status == 0
    for name in ("ddt", "improved_dit", "euler", "adams_bashforth", "digits", "ddt-digits", "folder"):
        assert name in out
    _, out, _ = untwine("info", "ddt")
    assert "untwine.models.ddt.DDT" in out
    assert "encoder_depth  " in out
    _, out, _ = untwine("info", "ddt-digits")
    assert "kind: flow_matching" in out
    _, out, _ = untwine("info", run_folder)
    assert "10: 0, 1, 2, 3" in out
    assert "step 8" in out
    _, out, _ = untwine("info", "folder")
    assert "dataset folder" in out
    assert "recipe folder" in out


def test_info_of_something_unknown(refused, tmp_path):
    assert "unknown name 'ddtt'; did you mean 'ddt'?" in refused("info", "ddtt")
    assert "holds no checkpoint" in refused("info", tmp_path)
