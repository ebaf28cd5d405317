"""The encoder shared between steps, and caches in pipelines of others."""

from __future__ import annotations

from typing import Any

from tables.results import result_of, source

_WAYS = {
    "reuse, uniform": "reuse",
    "reuse, similarity": "reuse, published dynamic programme",
    "forecast 1, uniform": "forecast, order 1",
    "forecast 2, uniform": "forecast, order 2",
    "forecast 2, similarity": "forecast, order 2, dynamic programme",
    "forecast 2, velocity": "forecast, order 2, steps by the velocity's error",
    "fewer steps": "fewer Euler steps at equal FLOPs",
    "fewer steps, adams_bashforth": "fewer Adams-Bashforth steps at equal FLOPs",
}


def sharing() -> list[str]:
    return _shared("sharing-ddt-digits", "python benchmarks/sharing.py --reference digits")


def sharing_fashion() -> list[str]:
    return _shared(
        "sharing-ddt-fashion", "python benchmarks/sharing.py --checkpoint ddt-fashion --reference fashion --without ..."
    )


def sharing_emoji() -> list[str]:
    return _shared(
        "sharing-ddt-emoji", "python benchmarks/sharing.py --checkpoint ddt-emoji --reference emoji --without ..."
    )


def _shared(name: str, command: str) -> list[str]:
    """A row for every budget: the distance of each way, with its Frechet distance where that was measured."""
    result = result_of(name)
    found, exact, floor = result["rows"], result["exact"], result.get("floor")
    budgets = sorted({int(name.split(":")[0]) for name in found}, reverse=True)
    names = [way for way in _WAYS if f"{budgets[0]}: {way}" in found]
    judged = (
        f"; in brackets FD-EffLite0, of the exact ones {exact['fd']:.1f}, its floor {floor['fd']:.1f}" if floor else ""
    )
    return [
        f"| `{result['settings']['checkpoint']}`, 50 steps: refreshes | " + " | ".join(_WAYS[w] for w in names) + " |",
        "|---" * (len(names) + 1) + "|",
        *(
            f"| {budget} ({1 - budget / 50:.0%} shared) | "
            + " | ".join(_moved(found[f"{budget}: {way}"]) for way in names)
            + " |"
            for budget in budgets
        ),
        "",
        f"Mean squared distance of the final latents to the exact ones, {result['settings']['images']} images x "
        f"{result['settings']['seeds']} seeds{judged}. " + source(result, command),
    ]


def _moved(row: dict[str, Any]) -> str:
    return f"{row['distance']:.1e}" + (f" ({row['fd']:.1f})" if "fd" in row else "")


def foreign() -> list[str]:
    result = result_of("foreign_caching")
    rows = []
    for family in ("flux", "wan"):
        for name, row in result[family]["rows"].items():
            told = f"{row['flops_ratio']:.2f}x | {row['speedup']:.2f}x | {row['rms_difference']:.1e}"
            rows.append(f"| {family.upper() if family == 'flux' else 'Wan'}-shaped | {name} | {told} |")
    return [
        f"| pipelines of diffusers, random weights, {result['settings']['steps']} steps | way | fewer FLOPs | "
        "speed-up | RMS difference |",
        "|---|---|---|---|---|",
        *rows,
        "",
        source(result, "python benchmarks/foreign_caching.py"),
    ]
