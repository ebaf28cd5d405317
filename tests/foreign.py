"""Tiny pipelines of diffusers with random weights, and calls of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers.models.embeddings import TimestepEmbedding

FLOW = diffusers.FlowMatchEulerDiscreteScheduler
HEADS = {"attention_head_dim": 16, "num_attention_heads": 2}
TEXT = 5
"""text tokens"""


def embeddings(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def flux() -> Any:
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, joint_attention_dim=24,
        pooled_projection_dim=12, axes_dims_rope=(4, 4, 8), **HEADS,
    )  # fmt: skip
    return diffusers.FluxPipeline(FLOW(), None, None, None, None, None, transformer)


def sd3() -> Any:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=3, joint_attention_dim=24, caption_projection_dim=32,
        pooled_projection_dim=12, out_channels=4, pos_embed_max_size=16, dual_attention_layers=(0,), **HEADS,
    )  # fmt: skip
    return diffusers.StableDiffusion3Pipeline(transformer, FLOW(), *[None] * 7)


def dit() -> Any:
    transformer = diffusers.DiTTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=8, num_layers=3, num_embeds_ada_norm=1000,
        attention_bias=True, **HEADS,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=2, latent_channels=4)
    return diffusers.DiTPipeline(transformer, vae, diffusers.DDIMScheduler(clip_sample=False))


def pixart() -> Any:
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=8, num_layers=3, cross_attention_dim=32,
        caption_channels=24, use_additional_conditions=False, **HEADS,
    )  # fmt: skip
    scheduler = diffusers.DPMSolverMultistepScheduler()
    return diffusers.PixArtAlphaPipeline(None, None, None, transformer, scheduler)


def wan(*, second: bool = False) -> Any:
    def transformer() -> Any:
        return diffusers.WanTransformer3DModel(
            in_channels=4, out_channels=4, text_dim=24, freq_dim=16, ffn_dim=48, num_layers=2, **HEADS
        )

    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    two = {"transformer_2": transformer(), "boundary_ratio": 0.7} if second else {}
    return diffusers.WanPipeline(None, None, None, scheduler, transformer(), **two)


def hunyuan() -> Any:
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_layers=2, num_single_layers=2, num_refiner_layers=1, text_embed_dim=24,
        pooled_projection_dim=12, rope_axes_dim=(4, 4, 8), **HEADS,
    )  # fmt: skip
    return diffusers.HunyuanVideoPipeline(None, None, transformer, None, FLOW(shift=7.0), None, None)


def _text(**named: tuple[int, ...]) -> dict[str, torch.Tensor]:
    return {name: embeddings(1, *shape, seed=i) for i, (name, shape) in enumerate(named.items())}


def _call(kind: str) -> dict[str, Any]:
    """Arguments of a guided call, by the pipeline; ``guidance_scale`` of Wan, DiT, PixArt and SD3 is 3."""
    prompt, pooled, mask = (TEXT, 24), (12,), torch.ones(1, TEXT)
    both = {"prompt_embeds": prompt, "negative_prompt_embeds": prompt}
    pools = {"pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": pooled}
    masks = {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask}
    square, clip = {"height": 64, "width": 64}, {"height": 32, "width": 32, "num_frames": 5}
    return {
        "flux": {**_text(**both, **pools), **square, "true_cfg_scale": 2.0},
        "sd3": {**_text(**both, **pools), **square, "guidance_scale": 3.0},
        "dit": {"class_labels": [3], "guidance_scale": 3.0},
        "pixart": {
            **_text(**both), **masks, **square, "guidance_scale": 3.0, "negative_prompt": None,
            "use_resolution_binning": False,
        },
        "wan": {**_text(**both), **clip, "guidance_scale": 3.0},
        "hunyuan": {**_text(**both, **pools), **masks, **clip, "true_cfg_scale": 2.0},
    }[kind]  # fmt: skip


MAKERS: dict[str, Callable[..., Any]] = {
    "flux": flux, "sd3": sd3, "dit": dit, "pixart": pixart, "wan": wan, "hunyuan": hunyuan,
}  # fmt: skip


KINDS = {
    "FluxPipeline": "flux", "StableDiffusion3Pipeline": "sd3", "DiTPipeline": "dit", "PixArtAlphaPipeline": "pixart",
    "WanPipeline": "wan", "HunyuanVideoPipeline": "hunyuan",
}  # fmt: skip


def make(kind: str, **options: Any) -> Any:
    """A pipeline with random weights, smooth in time."""
    torch.manual_seed(0)
    pipe = MAKERS[kind](**options)
    pipe.set_progress_bar_config(disable=True)
    for name in ("transformer", "transformer_2"):
        if (network := getattr(pipe, name, None)) is not None:
            network.eval()
            for module in network.modules():
                if isinstance(module, TimestepEmbedding):
                    _slow(module.linear_1.weight)
    return pipe


@torch.no_grad()
def _slow(weight: torch.Tensor) -> None:
    """Leaves out the sines and cosines that turn by more than a radian in a step: only training makes them harmless."""
    half = weight.shape[1] // 2
    weight.view(len(weight), 2, half)[:, :, : int(0.6 * half)] = 0


def generate(pipe: Any, steps: int = 6, **changes: Any) -> torch.Tensor:
    """What the pipeline's own ``__call__`` returns; float32."""
    kind = KINDS[type(pipe).__name__]
    output = {"output_type": "pt" if kind == "dit" else "latent"}
    arguments = {**_call(kind), **output, "generator": torch.Generator().manual_seed(1), **changes}
    return pipe(num_inference_steps=steps, return_dict=False, **arguments)[0]
