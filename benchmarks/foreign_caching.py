"""Caching on pipelines of diffusers: a FLUX-shaped and a Wan-shaped one, with random weights, through their own call.

    python benchmarks/foreign_caching.py
    python benchmarks/foreign_caching.py --quick    # a trial

Of each way: wall time of a generation (taken in turn), floating point operations, computed and skipped solver steps and
units, memory of the cache, and how far the latents are from the exact ones. ``diffusers`` is its own TaylorSeer hook
with the same interval, order and warm-up, and factors in float32; ``fewer steps`` is the honest alternative: the exact
sampler with as many steps as the cache computes. The networks are random: times and counts carry over to trained ones
of the same shape, distances do not.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from common import paired, save
from torch.utils.flop_counter import FlopCounterMode

from untwine.integrations.diffusers import FAMILIES, cache

TEXT = 32
"""text tokens"""


def flux(heads: int, depth: int, size: int) -> tuple[Any, dict[str, Any]]:
    """``depth`` double-stream and twice as many single-stream blocks; ``size`` x ``size`` image tokens; no guidance."""
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=64,
        num_layers=depth,
        num_single_layers=2 * depth,
        num_attention_heads=heads,
        attention_head_dim=64,
        joint_attention_dim=256,
        pooled_projection_dim=128,
        axes_dims_rope=(8, 28, 28),
    )
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = diffusers.FluxPipeline(scheduler, None, None, None, None, None, transformer)
    text = {"prompt_embeds": torch.randn(1, TEXT, 256), "pooled_prompt_embeds": torch.randn(1, 128)}
    return pipe, {**text, "height": 16 * size, "width": 16 * size}


def wan(heads: int, depth: int, size: int) -> tuple[Any, dict[str, Any]]:
    """``3 * depth`` blocks; two latent frames of ``size / 2 * size`` tokens together; guidance in two calls."""
    transformer = diffusers.WanTransformer3DModel(
        num_attention_heads=heads, attention_head_dim=64, text_dim=256, ffn_dim=64 * heads * 4, num_layers=3 * depth
    )
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    pipe = diffusers.WanPipeline(None, None, None, scheduler, transformer)
    text = {"prompt_embeds": torch.randn(1, TEXT, 256), "negative_prompt_embeds": torch.randn(1, TEXT, 256)}
    return pipe, {**text, "height": 8 * size, "width": 16 * size, "num_frames": 5, "guidance_scale": 5.0}


def generate(pipe: Any, arguments: dict[str, Any], steps: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return pipe(**arguments, num_inference_steps=steps, generator=generator, output_type="latent", return_dict=False)[0]


def cached(pipe: Any, arguments: dict[str, Any], steps: int, **options: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    """Latents and the cache's report."""
    with cache(pipe, **options) as handle:
        latents = generate(pipe, arguments, steps)
        report = handle.report()
    counts = ("steps_computed", "steps_skipped", "units_computed", "units_skipped", "cache_bytes_peak")
    return latents, {name: report[name] for name in counts}


def hooked(pipe: Any, arguments: dict[str, Any], steps: int) -> tuple[torch.Tensor, dict[str, Any]]:
    """Latents under the hook of diffusers, and how many of its modules it hooked."""
    family = FAMILIES[type(pipe.transformer).__name__]
    config = diffusers.TaylorSeerCacheConfig(
        cache_interval=family.interval,
        disable_cache_before_step=family.warmup,
        max_order=family.order,
        taylor_factors_dtype=torch.float32,
    )
    pipe.transformer.enable_cache(config)
    names = [name for name, part in pipe.transformer.named_modules() if _hook(part)]
    try:
        return generate(pipe, arguments, steps), {"modules_hooked": len(names)}
    finally:
        pipe.transformer.disable_cache()


def _hook(module: torch.nn.Module) -> bool:
    registry = getattr(module, "_diffusers_hook", None)
    return registry is not None and registry.get_hook("taylorseer_cache") is not None


def ways(pipe: Any, arguments: dict[str, Any], steps: int) -> dict[str, Callable[[], tuple[torch.Tensor, dict]]]:
    """Every way of sampling, by name; the first is exact."""
    family = FAMILIES[type(pipe.transformer).__name__]
    full = family.warmup + (steps - family.warmup) // family.interval
    return {
        "exact": lambda: (generate(pipe, arguments, steps), {}),
        "taylor": lambda: cached(pipe, arguments, steps),
        "taylor, order 0": lambda: cached(pipe, arguments, steps, order=0),
        "taylor, order 2": lambda: cached(pipe, arguments, steps, order=2),
        "taylor, blocks": lambda: cached(pipe, arguments, steps, sites=("blocks",)),
        "taylor, head": lambda: cached(pipe, arguments, steps, sites=("head",)),
        "diffusers": lambda: hooked(pipe, arguments, steps),
        f"fewer steps, {full}": lambda: (generate(pipe, arguments, full), {}),
    }


def measured(pipe: Any, arguments: dict[str, Any], steps: int, repeats: int) -> dict[str, Any]:
    runs = ways(pipe, arguments, steps)
    exact = generate(pipe, arguments, steps)
    rows: dict[str, dict[str, Any]] = {}
    for name, run in runs.items():
        with FlopCounterMode(display=False) as counter:
            latents, report = run()
        difference = (latents - exact).abs()
        rows[name] = {
            **report,
            "flops": counter.get_total_flops(),
            "max_difference": float(difference.max()),
            "rms_difference": float(difference.square().mean().sqrt()),
        }
    seconds = paired(runs, repeats=repeats)
    for name, row in rows.items():
        row["seconds"] = seconds[name]
        row["flops_ratio"] = rows["exact"]["flops"] / row["flops"]
        row["speedup"] = seconds["exact"]["median"] / seconds[name]["median"]
    return {"latents_std": float(exact.std()), "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=6, help="of width 64")
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="small networks, 14 steps, one timing")
    options = parser.parse_args()
    if options.quick:
        options.heads, options.depth, options.size, options.steps, options.repeats = 2, 1, 8, 14, 1
    results: dict[str, Any] = {"settings": vars(options)}
    for make in (flux, wan):
        torch.manual_seed(0)
        pipe, arguments = make(options.heads, options.depth, options.size)
        pipe.set_progress_bar_config(disable=True)
        pipe.transformer.eval()
        results[make.__name__] = measured(pipe, arguments, options.steps, options.repeats)
    save(f"foreign_caching{'-quick' if options.quick else ''}", results)


if __name__ == "__main__":
    main()
