"""What the site says is true of the source: quoted messages, printed help, links; and it builds."""

from __future__ import annotations

import ast
import importlib.util
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.docs.pages import DOCS, blocks
from untwine.codecs import CODECS
from untwine.config.schema import _schema
from untwine.diffusion import SOLVERS
from untwine.training.objectives import OBJECTIVES

ROOT = DOCS.parent
PAGES = sorted(DOCS.rglob("*.md"))
FIXED = 12  # letters of a message that must be in the source as they are


def _templates() -> list[re.Pattern[str]]:
    """Every text of the source, docstrings apart, with at least FIXED fixed characters, as what its messages match."""
    found = []
    for file in (ROOT / "src").rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            fixed = _fixed_parts(node)
            if id(node) not in docstrings and sum(map(len, fixed)) >= FIXED:
                found.append(re.compile(".*?".join(map(_expression, fixed)), re.DOTALL))
    return found


def _fixed_parts(node: ast.AST) -> list[str]:
    """What is fixed before, between and after the values of an f-string or of a format of the log."""
    if isinstance(node, ast.JoinedStr):
        texts = [v.value if isinstance(v, ast.Constant) else "\0" for v in node.values]
        return "".join(map(str, texts)).split("\0")
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.split(r"%[.\w]*[sdfg]", node.value)
    return []


def _expression(text: str) -> str:
    """Words of a fixed part, with any space between them: pages break lines."""
    return r"\s+".join(map(re.escape, re.split(r"\s+", text)))


def _share_from_source(message: str, templates: list[re.Pattern[str]]) -> float:
    """How much of a message the texts of the source account for."""
    covered = set()
    for template in templates:
        if match := template.search(message):
            covered |= set(range(*match.span()))
    return len(covered) / len(message.strip())


@pytest.fixture(scope="module")
def templates():
    return _templates()


def _quoted(page: Path) -> list[str]:
    """The messages on a page: its ``text`` blocks, and the output of its commands that failed."""
    shown = [code for language, code in blocks(page) if language == "text"]
    said = re.compile(r"^untwine \w+: (.*?)(?=^\$ |\Z)", re.MULTILINE | re.DOTALL)
    return shown + [text for language, code in blocks(page) if language == "console" for text in said.findall(code)]


def test_every_quoted_message_is_in_the_source(templates):
    messages = _quoted(DOCS / "troubleshooting.md")
    assert len(messages) >= 20
    for message in messages:
        assert _share_from_source(message, templates) > 0.5, f"no message of the source reads like this:\n{message}"


def test_the_check_of_messages_can_fail(templates):
    altered = "labels had better be within [0, 9], got [11]; this model has 10 kinds"
    assert _share_from_source(altered, templates) < 0.5


def test_troubleshooting_answers_all_fifteen():
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    sections = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    assert [int(section.split(".")[0]) for section in sections[:15]] == list(range(1, 16))
    for section in sections[:15]:
        assert re.search(r"Code: .*`[\w/.]+`", section), f"no link to code:\n{section[:80]}"
    for path in re.findall(r"`((?:src|tests|benchmarks)/[\w/.]+)`", text):
        assert (ROOT / path).exists(), f"{path} is named, and does not exist"


def test_the_printed_help_is_what_the_commands_print():
    page = runpy.run_path(str(DOCS / "write_cli.py"))["page"]
    shown = (DOCS / "reference" / "cli.md").read_text(encoding="utf-8")
    assert shown.split() == page().split(), "run python docs/write_cli.py"


def test_flags_that_are_named_exist():
    """Any ``--flag`` in the text of a page is one of a verb, of a recipe, or of a solver, codec or objective."""
    known = set(re.findall(r"--[a-z][\w.-]*", (DOCS / "reference" / "cli.md").read_text(encoding="utf-8")))
    for group, registry in (("solver", SOLVERS), ("codec", CODECS), ("objective", OBJECTIVES)):
        known |= {f"--{group}.{name}".replace("_", "-") for kind in registry for name in _schema(registry[kind])}
    known |= {flag.rpartition(".")[0] for flag in known}
    known |= set(re.findall(r"`(--[a-z][\w.-]*)", _columns_of_others()))
    known |= {"--no-python", "--nproc-per-node", "--max-restarts", "--no_python", "--num_processes"}  # launchers'
    for page in PAGES:
        if page.name not in ("cli.md", "contributing.md"):
            text = re.sub(r"`python benchmarks/[^`]+`", "", page.read_text(encoding="utf-8"))  # flags of their own
            named = set(re.findall(r"(?<![\w-])--[a-z][\w.-]*[a-z]", text))
            assert named <= known, page.name


def _columns_of_others() -> str:
    """The part of each table row of coming-from.md that is not about untwine."""
    text = (DOCS / "tutorials" / "coming-from.md").read_text(encoding="utf-8")
    return "\n".join(row.rstrip("| ").rpartition("|")[0] for row in text.splitlines() if row.startswith("|"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_links_and_pictures_exist(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (page.parent / target).is_file(), f"{page.name} links to {target}"


def test_every_page_is_in_the_navigation():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    assert set(_leaves(nav)) == {str(page.relative_to(DOCS)) for page in PAGES}


def _leaves(nav: list) -> list[str]:
    values = [value for entry in nav for value in (entry.values() if isinstance(entry, dict) else [entry])]
    return [leaf for value in values for leaf in (_leaves(value) if isinstance(value, list) else [value])]


@pytest.mark.skipif(importlib.util.find_spec("mkdocstrings_handlers") is None, reason="needs untwine[docs]")
def test_the_site_builds_without_a_warning_and_without_other_hosts(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for file in (tmp_path / "site").rglob("*.html"):
        html = file.read_text(encoding="utf-8")
        loaded = re.findall(r'<(?:script|img|source)[^>]+src="(https?:[^"]+)', html)
        loaded += re.findall(r'<link[^>]+rel="stylesheet"[^>]+href="(https?:[^"]+)', html)
        assert not loaded, f"{file.name} loads {loaded[0]} from elsewhere"
        assert not re.search(r":(?:class|func|meth|mod|data|attr|exc):<code>", html), f"{file.name} shows a Sphinx role"
