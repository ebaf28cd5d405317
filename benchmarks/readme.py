"""Writes the figures of the README from ``benchmarks/results/*.json``, between its two marks.

python benchmarks/readme.py            rewrites the README
python benchmarks/readme.py --check    exits with 1 where it has drifted
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
BEGIN, END = "<!-- figures: python benchmarks/readme.py -->", "<!-- end of figures -->"


def _result(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def _source(result: dict[str, Any], script: str) -> str:
    m = result["hardware"]
    return f"`{script}`, commit `{result['commit']}`, {m['cpu']}, {m['threads']} threads, torch {m['torch']}"


def _judged(checks: dict[str, Any], real: str, unseen: str, share: str) -> list[str]:
    """Rows of a table ``| what | measured | asked |`` on recognition and copies."""
    return [
        f"| recognised by a classifier of real {real} (itself {checks['classifier_accuracy']:.1%} right) | "
        f"{checks['recognised']:.1%} | {share} |",
        f"| within-class distance over that of real {real} | {checks['diversity']:.2f} | 0.8 |",
        f"| distance to the nearest training image over that of {unseen} ones | {checks['novelty']:.2f} | 0.8 |",
    ]


def demo() -> list[str]:
    result = _result("demo")
    return [
        "| `make demo` | measured | asked |",
        "|---|---|---|",
        f"| running time, {result['steps']} training steps and 500 samples | {result['total_seconds']:.0f} s | 360 s |",
        f"| training | {result['training_seconds']:.0f} s | about 120 s |",
        *_judged(result["checks"], "digits", "held-out", "95 %"),
        "",
        _source(result, "python benchmarks/demo.py --record"),
    ]


def fashion() -> list[str]:
    result = _result("fashion")
    return [
        f"| `ddt-fashion`, {result['checks']['images']} samples | measured | asked |",
        "|---|---|---|",
        *_judged(result["checks"], "images", "test", "90 %"),
        "",
        _source(result, "python benchmarks/fashion_report.py --record"),
    ]


def sampling() -> list[str]:
    result = _result("sampling_paths")
    settings = result["settings"]
    rows = {
        "branches of weight 0 not run": "skipping",
        f"the same, encoder shared over {settings['refresh_every']} steps": "skipping_when_shared",
        "decoder modulations cached, encoder shared": "modulations",
        "both, encoder shared": "both_when_shared",
    }
    width, steps = settings["width"], settings["steps"]
    return [
        f"| sampling, DDT width {width}, 256 tokens, {steps} steps, guidance on (0, 0.7) | speed-up | difference |",
        "|---|---|---|",
        *(f"| {name} | {result[key]['speed_up']:.2f}x | {_difference(result[key])} |" for name, key in rows.items()),
        "",
        "Against evaluating both branches at every step, interleaved; largest difference over largest value. "
        + _source(result, "python benchmarks/sampling_paths.py"),
    ]


def faults() -> list[str]:
    result = _result("faults")
    return [
        "| fault | runs | go on bitwise | most steps lost |",
        "|---|---|---|---|",
        *(
            f"| {row['fault']} | {row['runs']} | {row.get('recovered_bitwise', 'stops, state untouched')} | "
            f"{row['steps_lost']} |"
            for row in result["rows"]
        ),
        "",
        f"A checkpoint every {result['save_every']} steps. " + _source(result, "python benchmarks/faults.py"),
    ]


def _difference(row: dict[str, float]) -> str:
    return f"{row['max_difference_relative']:.0e}" if row["max_difference_relative"] else "none, bitwise"


def reliability() -> list[str]:
    killed, imports = _result("kill_resume"), _result("imports")
    seconds = imports["seconds"]
    return [
        "| reliability and start-up | measured |",
        "|---|---|",
        f"| SIGKILL at random moments, AdamW and Muon, float32 and bf16 | {killed['kills']} kills, "
        f"{killed['runs_bitwise_equal']} runs end bitwise equal to the uninterrupted one |",
        f"| `import untwine` beyond Python itself | "
        f"{seconds['import untwine']['median'] - seconds['python -c pass']['median']:.3f} s |",
        f"| `untwine --help` beyond Python itself | "
        f"{seconds['untwine --help']['median'] - seconds['python -c pass']['median']:.3f} s |",
        "",
        _source(killed, "python benchmarks/kill_resume.py") + "; `python benchmarks/imports.py`",
    ]


def comparison() -> list[str]:
    result = _result("ddt_vs_dit")
    settings, means, runs = result["settings"], result["means"], result["runs"]
    return [
        f"| {settings['depth']} blocks of width {settings['width']} on {settings['data']['kind']}, "
        f"{settings['steps']} steps, {settings['seeds']} seeds | "
        "parameters | held-out loss | training loss |",
        "|---|---|---|---|",
        *(
            f"| {name} | {runs[key][0]['parameters']:,} | {means[key]['validation_loss']:.4f} | "
            f"{means[key]['training_loss']:.4f} |"
            for name, key in (("DDT", "ddt"), ("improved DiT", "improved_dit"))
        ),
        "",
        "Means over seeds; every run and its curve is in `benchmarks/results/ddt_vs_dit.json`. "
        + _source(result, "python benchmarks/ddt_vs_dit.py"),
    ]


def figures() -> str:
    return "\n\n".join("\n".join(part()) for part in (demo, fashion, sampling, reliability, faults, comparison))


def render(text: str) -> str:
    """The README with fresh figures."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    if not after:
        raise SystemExit(f"README.md lacks the marks {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n\n{figures()}\n\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    text = README.read_text(encoding="utf-8")
    fresh = render(text)
    if options.check:
        sys.exit(fresh != text)
    README.write_text(fresh, encoding="utf-8")


if __name__ == "__main__":
    main()
