"""Help and imports: quick, and without torch or diffusers."""

from __future__ import annotations

import subprocess
import sys

import pytest

from untwine.cli import VERBS

CHECK = "heavy = [m for m in ('torch', 'diffusers', 'numpy', 'PIL') if m in sys.modules]; assert not heavy, heavy"


def _python(program: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("args", [["--help"], ["--version"], *([verb, "--help"] for verb in VERBS), ["info"]], ids=" ".join)
def test_needs_no_torch(args):
    program = f"import sys\nfrom untwine.cli import main\ntry: main({args!r})\nexcept SystemExit as e: assert not e.code\n{CHECK}"
    done = _python(program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    if args[0] in VERBS and len(args) == 2:
        assert done.stdout.startswith(f"usage: untwine {args[0]}")


def test_import_needs_no_torch():
    done = _python(f"import sys, untwine\nimport untwine.models, untwine.diffusion, untwine.codecs, untwine.data\n{CHECK}")
    assert done.returncode == 0, done.stderr


def test_every_verb_is_listed(untwine):
    status, out, _ = untwine()
    assert status == 0
    assert all(f"  {verb}" in out for verb in VERBS)


def test_unknown_verb(refused):
    assert "unknown verb 'sampel'; did you mean 'sample'?" in refused("sampel")


def test_help_of_a_recipe_lists_its_options(untwine):
    status, out, _ = untwine("train", "ddt-digits", "--help")
    assert status == 0
    assert "--model.hidden-size INT" in out
    assert "--train.num-steps INT" in out


def test_help_of_a_checkpoint_lists_its_settings(untwine, run_folder):
    status, out, _ = untwine("sample", run_folder, "--help")
    assert status == 0
    assert "--guidance-scale FLOAT" in out


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
    assert "unknown name 'dtt'; did you mean 'ddt'?" in refused("info", "dtt")
    assert "holds no checkpoint" in refused("info", tmp_path)
