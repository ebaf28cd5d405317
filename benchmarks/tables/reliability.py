"""What a run survives, and how it scales."""

from __future__ import annotations

from typing import Any

from tables.results import result_of, source


def reliability() -> list[str]:
    killed, imports = result_of("kill_resume"), result_of("imports")
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
        source(killed, "python benchmarks/kill_resume.py") + "; `python benchmarks/imports.py`",
    ]


def faults() -> list[str]:
    result = result_of("faults")
    return [
        "| `make faults`: fault | runs | go on bitwise | refused | most steps lost | worst |",
        "|---|---|---|---|---|---|",
        *(
            f"| {row['fault']} | {row['runs']} | {row.get('survived', '')} | {row.get('refused', '')} | "
            f"{row.get('steps_lost', '')} | {_seconds(row)} |"
            for row in result["rows"]
        ),
        "",
        f"A checkpoint every {result['save_every']} steps; {result['kills_save_every']} in the first row. "
        + source(result, "python benchmarks/faults.py"),
    ]


def _seconds(row: dict[str, Any]) -> str:
    return f"{row['worst_seconds']:.2g} s" if "worst_seconds" in row else ""


def scale() -> list[str]:
    result, saved = result_of("scaling"), result_of("saving")
    speeds, seconds = result["throughput"], saved["seconds"]
    one = speeds["one process, 1 thread"]["images_per_second"]
    return [
        f"| against one process | sample order | SGD, 50 steps: largest difference | AdamW, 20 steps: relative "
        f"distance | largest gap of the loss in {result['steps']} steps |",
        "|---|---|---|---|---|",
        *(
            f"| {name} | {'identical' if row['sgd']['order_identical'] else 'DIFFERS'} | {row['sgd']['largest']:.0e} | "
            + (f"{row['adamw']['relative']:.0e} | {row['largest_gap']:.0e} |" if "adamw" in row else "| |")
            for name, row in list(result["layouts"].items())[1:]
        ),
        "",
        "![the curves over each other](docs/images/scaling.png)",
        "",
        "| on the same two cores | images/s | of twice one thread |",
        "|---|---|---|",
        *(
            f"| {name} | {row['images_per_second']:.0f} | {row['images_per_second'] / one / 2:.0%} |"
            for name, row in speeds.items()
        ),
        "",
        f"| a checkpoint of {saved['gigabytes']:.2f} GB | seconds |",
        "|---|---|",
        f"| training waits, written at once | {seconds['at_once']:.2f} |",
        f"| training waits, `train.async_save` | {seconds['stall']:.3f} |",
        f"| hashes checked before reading | {seconds['verify']:.2f} ({saved['verify_seconds_per_gb']:.2f} s/GB) |",
        "",
        source(result, "python benchmarks/scaling.py") + "; `python benchmarks/saving.py`",
    ]
