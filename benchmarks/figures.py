"""Writes the tables of the README, of the page of results and of others from ``benchmarks/results/*.json``.

python benchmarks/figures.py            rewrites all
python benchmarks/figures.py --check    exits with 1 where one has drifted
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from tables import quality, reliability, sharing, speed, training
from tables.results import RESULTS, ROOT

README, DOCS = ROOT / "README.md", ROOT / "docs"
BEGIN, END = "<!-- figures: python benchmarks/figures.py -->", "<!-- end of figures -->"
Part = Callable[[], list[str]]

SECTIONS: dict[str, dict[Part, str]] = {
    "What the shipped checkpoints draw": {
        quality.demo: "demo",
        quality.fashion: "fashion",
        quality.checkpoints: "checkpoints",
        quality.text: "text_to_image",
        quality.style: "style_transfer",
    },
    "Backbones and objectives": {
        training.comparison: "ddt_vs_dit",
        training.backbones_fashion: "ddt_vs_dit_backbones_fashion",
        training.backbones_emoji: "ddt_vs_dit_backbones_emoji",
        training.aligned_fashion: "representation_fashion",
        training.aligned_emoji: "representation_emoji",
        training.masked: "umd_digits",
        training.coordinates: "mup_coordinates_digits",
        training.rates: "mup_transfer_fashion",
        training.claims: "rae_noise",
    },
    "Sharing and caching": {
        sharing.sharing: "sharing-ddt-digits",
        sharing.sharing_fashion: "sharing-ddt-fashion",
        sharing.sharing_emoji: "sharing-ddt-emoji",
        sharing.foreign: "foreign_caching",
    },
    "Speed and economy": {
        speed.speed: "speed_training",
        speed.speed_sampling: "speed_sampling",
        speed.sampling: "sampling_paths",
        speed.economy: "plan_check",
        speed.studio: "studio",
    },
    "What a run survives, and how it scales": {
        reliability.reliability: "kill_resume",
        reliability.faults: "faults",
        reliability.scale: "scaling",
    },
}
"""heading -> table -> the result without which it is left out"""
HIGHLIGHTS = (
    quality.demo,
    quality.checkpoints,
    quality.text,
    speed.speed_sampling,
    sharing.sharing_fashion,
    training.backbones_fashion,
)
"""what the README shows"""
PAGES: dict[str, tuple[Part, ...]] = {
    "learn-faster.md": (training.aligned_fashion, training.aligned_emoji, training.coordinates, training.rates),
    "masked-diffusion.md": (training.masked,),
}
"""what pages beside that of all results show"""


def tables(parts: dict[Part, str]) -> str:
    return "\n\n".join("\n".join(part()) for part, name in parts.items() if (RESULTS / f"{name}.json").is_file())


def some(parts: tuple[Part, ...]) -> str:
    known = {part: name for parts in SECTIONS.values() for part, name in parts.items()}
    return tables({part: known[part] for part in parts})


def everything() -> str:
    return "\n\n".join(f"## {heading}\n\n{tables(parts)}" for heading, parts in SECTIONS.items())


def render(page: Path, figures: str) -> str:
    """The text of ``page`` with these figures between its marks."""
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    if not after:
        raise SystemExit(f"{page.name} lacks the marks {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n\n{figures}\n\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    figures = {"results.md": everything()} | {name: some(parts) for name, parts in PAGES.items()}
    fresh = {DOCS / name: render(DOCS / name, text.replace("](docs/", "](")) for name, text in figures.items()}
    fresh[README] = render(README, some(HIGHLIGHTS))
    if options.check:
        sys.exit(any(page.read_text(encoding="utf-8") != text for page, text in fresh.items()))
    for page, text in fresh.items():
        page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
