"""What the shipped checkpoints draw."""

from __future__ import annotations

from typing import Any

from tables.results import result_of, source


def demo() -> list[str]:
    result = result_of("demo")
    return [
        "| `make demo` | measured | asked |",
        "|---|---|---|",
        f"| running time, {result['steps']} training steps and 500 samples | {result['total_seconds']:.0f} s | 360 s |",
        f"| training | {result['training_seconds']:.0f} s | about 120 s |",
        *_judged(result["checks"], "digits", "held-out", "95 %"),
        "",
        source(result, "python benchmarks/demo.py --record"),
    ]


def fashion() -> list[str]:
    result = result_of("fashion")
    return [
        f"| `ddt-fashion`, {result['checks']['images']} samples | measured | asked |",
        "|---|---|---|",
        *_judged(result["checks"], "images", "test", "90 %"),
        "",
        source(result, "python benchmarks/fashion_report.py --record"),
    ]


def _judged(checks: dict[str, Any], real: str, unseen: str, share: str) -> list[str]:
    """Rows of a table ``| what | measured | asked |`` on recognition and copies."""
    return [
        f"| recognised by a classifier of real {real} (itself {checks['classifier_accuracy']:.1%} right) | "
        f"{checks['recognised']:.1%} | {share} |",
        f"| within-class distance over that of real {real} | {checks['diversity']:.2f} | 0.8 |",
        f"| distance to the nearest training image over that of {unseen} ones | {checks['novelty']:.2f} | 0.8 |",
    ]


def checkpoints() -> list[str]:
    result = result_of("checkpoints")
    rows = []
    for name, found in result["checkpoints"].items():
        metrics, floor, near = found["metrics"], found["floor"], found["memorisation"]["features"]
        rows.append(
            f"| `{name}` | {found['counts']['samples']} | {metrics['fd']:.1f} ({floor['fd']:.1f}) | "
            f"{metrics['kid']:.4f} | {metrics['precision']:.2f} | {metrics['recall']:.2f} | "
            f"{near['median_ratio']:.2f}, {near['copies']} copies |"
        )
    return [
        "| checkpoint | samples | FD-EffLite0 (floor: real against real) | KID | precision | recall | nearest real "
        "picture, in held-out ones' distances |",
        "|---|---|---|---|---|---|---|",
        *rows,
        "",
        "On 64 principal axes of the real pictures' features. " + source(result, "python benchmarks/checkpoints.py"),
    ]


def text() -> list[str]:
    result = result_of("text_to_image")
    rows = (("real held-out emoji (the ceiling)", result["ceiling"]), ("drawn from their names", result["generated"]))
    return [
        f"| `{result['checkpoint']}`: held-out names, top-1 of 10 | right | 95 % interval | names | pictures |",
        "|---|---|---|---|---|",
        f"| chance | {result['chance']:.0%} | | | |",
        *(
            f"| {name} | {row['top1_of_10']:.1%} | {row['interval_95'][0]:.1%}-{row['interval_95'][1]:.1%} | "
            f"{row['emoji']} | {row['pictures']} |"
            for name, row in rows
        ),
        "",
        f"{result['share_of_the_way']:.0%} of the way from chance to the ceiling, by a scorer fitted to real training "
        "emoji. " + source(result, "python benchmarks/text_to_image.py --checkpoint ddt-emoji-text --record"),
    ]


def style() -> list[str]:
    result = result_of("style_transfer")
    settings = result["settings"]
    return [
        f"| style transfer of emoji, {settings['steps']} steps | KID to Twitter's set | distance to Twitter's drawing "
        "(1 = Google's) | held-out loss | size |",
        "|---|---|---|---|---|",
        *(_style_row(name, row) for name, row in result["models"].items()),
        "",
        f"{settings['held_out']} held-out emoji redrawn from t = {settings['strength']}. "
        + source(result, "python benchmarks/style_transfer.py"),
    ]


def _style_row(name: str, row: dict[str, float]) -> str:
    kid = f"{row['kid']:.3f} +- {row['kid_std']:.3f}"
    if "loss" not in row:
        return f"| {name} | {kid} | 1 | | |"
    size = f"{row['megabytes']:.2f} MB" if "megabytes" in row else ""
    return (
        f"| {name} | {kid} | {row['distance_to_target']:.3f} +- {row['interval_95']:.3f} | {row['loss']:.4f} | {size} |"
    )
