"""The cache on pipelines of diffusers, through their own ``__call__``: schedules, branches, exactness, cleaning up."""

from __future__ import annotations

import inspect
from collections import Counter

import diffusers
import pytest
import torch

from tests.foreign import MAKERS, embeddings, generate, make
from untwine.acceleration.caching.cache import CacheConfig
from untwine.acceleration.caching.calibration import measure
from untwine.acceleration.caching.predictors import Newton, Reuse, Taylor
from untwine.acceleration.caching.schedules import DynamicProgramming, ErrorGated, Explicit, Uniform, WarmUp
from untwine.integrations import diffusers as foreign
from untwine.integrations.diffusers import FAMILIES, ForeignModel, cache

CALLS = {"flux": 2, "wan": 2, "hunyuan": 2}
"""of the transformer in a step of a guided generation; 1 where both branches are one batch"""
STACK = ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.ff.net.0", "transformer_blocks.1.ff_context.net.0")
SINGLE = tuple(f"single_transformer_blocks.1.{name}" for name in ("attn.to_q", "proj_mlp", "act_mlp", "proj_out"))
INSIDE = {
    "flux": STACK + SINGLE,
    "hunyuan": STACK + SINGLE,
    "sd3": (*STACK, "transformer_blocks.0.attn2.to_q"),
    "dit": ("transformer_blocks.0.attn1.to_q", "transformer_blocks.2.ff.net.0"),
    "pixart": ("transformer_blocks.0.attn1.to_q", "transformer_blocks.0.attn2.to_q", "transformer_blocks.2.ff.net.0"),
    "wan": ("blocks.0.attn1.to_q", "blocks.1.attn2.to_q", "blocks.1.ffn.net.0"),
}
"""modules that run only where something is computed"""


def watch(pipe, paths):
    """path -> the calls of the transformer in which the module ran, filled while the pipeline generates."""
    ran = {path: [] for path in paths}
    number = Counter()
    pipe.transformer.register_forward_pre_hook(lambda *_: number.update(calls=1))

    def counted(path, plain):
        def forward(*args, **kwargs):
            ran[path].append(number["calls"] - 1)
            return plain(*args, **kwargs)

        return forward

    for path in paths:  # hooks would also hear of a module that is stood in for
        module = pipe.transformer.get_submodule(path)
        module.forward = counted(path, module.forward)
    return ran


def computed(steps, calls):
    return [step * calls + call for step in steps for call in range(calls)]


def pristine(pipe):
    """Nothing of the cache is left."""
    modules = [module for part in pipe.components.values() if hasattr(part, "modules") for module in part.modules()]
    assert not any("forward" in vars(module) or module._forward_pre_hooks for module in modules)
    assert type(pipe) is getattr(diffusers, type(pipe).__name__) and "attached" not in vars(pipe)
    assert type(pipe.scheduler) is getattr(diffusers, type(pipe.scheduler).__name__)
    return True


@pytest.mark.parametrize("kind", MAKERS)
def test_computing_every_step_changes_no_bit(kind):
    pipe = make(kind)
    exact = generate(pipe)
    for options in (
        {"interval": 1},
        {"warmup": 6},
        {"interval": 1, "sites": ("blocks",)},
        {"warmup": 6, "sites": ("head",)},
    ):
        with cache(pipe, **options) as cached:
            assert torch.equal(generate(pipe), exact)
            report = cached.report()
        assert (report["steps_computed"], report["steps_skipped"], report["units_skipped"]) == (6, 0, 0)
        assert pristine(pipe) and torch.equal(generate(pipe), exact)


@pytest.mark.parametrize("kind, steps, full", [
    ("flux", 16, (0, 1, 2, 8, 14)),
    ("hunyuan", 12, (0, 5, 10)),
    ("wan", 12, (0, 5, 10)),
    ("dit", 12, (0, 1, 5, 9)),
    ("sd3", 12, (0, 1, 5, 9)),
    ("pixart", 12, (0, 1, 5, 9)),
])  # fmt: skip
def test_units_run_at_the_steps_of_their_family(kind, steps, full):
    """The official schedules of FLUX, HunyuanVideo, Wan and DiT; a pair of calls is one step."""
    pipe, calls = make(kind), CALLS.get(kind, 1)
    ran = watch(pipe, INSIDE[kind])
    with cache(pipe) as cached:
        generate(pipe, steps)
        report = cached.report()
    assert ran == {path: computed(full, calls) for path in INSIDE[kind]}
    assert (report["steps_computed"], report["steps_skipped"]) == (len(full), steps - len(full))
    each = {"computed": calls * len(full), "skipped": calls * (steps - len(full))}
    assert all(counts == each for counts in report["sites"].values())
    assert report["units_computed"] == each["computed"] * len(report["sites"]) and report["seconds"] > 0


def test_sites_are_the_official_units():
    def units(kind):
        return Counter(foreign._pattern(site) for site in cache(make(kind)).sites)

    single = dict.fromkeys((f"single_transformer_blocks.*.{name}" for name in ("attn", "proj_mlp", "act_mlp")), 2)
    double = dict.fromkeys((f"transformer_blocks.*.{name}" for name in ("attn", "ff", "ff_context")), 2)
    both = {**double, "single_transformer_blocks.*.proj_out": 2, **single}  # the last three feed it alone
    assert units("flux") == units("hunyuan") == both
    assert units("wan") == dict.fromkeys(("blocks.*.attn1", "blocks.*.attn2", "blocks.*.ffn"), 2)
    assert units("dit") == dict.fromkeys(("transformer_blocks.*.attn1", "transformer_blocks.*.ff"), 3)
    settings = {name: (f.interval, f.order, f.warmup) for name, f in FAMILIES.items() if f.published}
    assert settings == {
        "FluxTransformer2DModel": (6, 1, 3),
        "HunyuanVideoTransformer3DModel": (5, 1, 1),
        "WanTransformer3DModel": (5, 1, 1),
        "DiTTransformer2DModel": (4, 4, 2),
    }


@pytest.mark.parametrize("kind", MAKERS)
def test_forecasts_are_close_and_closer_than_reuse_on_smooth_networks(kind):
    """Rectified flows: order 1 is closer. The noise predictors (DiT, PixArt) are left to be close: with random weights
    their first steps multiply the sample, so that no feature is a line in the step."""
    pipe = make(kind)
    exact = generate(pipe, 12)
    distance = {}
    for order in (0, 1):
        with cache(pipe, interval=3, warmup=2, order=order):
            found = generate(pipe, 12)
        distance[order] = float((found - exact).square().mean().sqrt() / exact.std())
    assert 0 < max(distance.values()) < 0.02
    if kind not in ("dit", "pixart"):
        assert distance[1] < 0.75 * distance[0]
    with cache(pipe, CacheConfig(schedule=WarmUp(3, 2), predictor=Reuse())):
        reused = generate(pipe, 12)
    with cache(pipe, interval=3, warmup=2, order=0):
        assert torch.equal(generate(pipe, 12), reused)


@pytest.mark.parametrize("unit", ["blocks", "head"])
@pytest.mark.parametrize("kind", MAKERS)
def test_whole_stacks_are_left_out(kind, unit):
    pipe, calls = make(kind), CALLS.get(kind, 1)
    exact, ran = generate(pipe, 8), watch(pipe, INSIDE[kind])
    with cache(pipe, interval=3, warmup=2, sites=(unit,)):
        found = generate(pipe, 8)
    assert ran == {path: computed((0, 1, 4, 7), calls) for path in INSIDE[kind]}
    assert 0 < (found - exact).abs().max() < 0.2 * exact.abs().max()


def test_branches_in_one_call_and_in_two_are_the_same():
    class OneByOne(diffusers.SD3Transformer2DModel):
        def __call__(self, *, joint_attention_kwargs, return_dict, **inputs):
            halves = zip(*(value.chunk(2) for value in inputs.values()))
            outs = [super(OneByOne, self).__call__(**dict(zip(inputs, half)), return_dict=False)[0] for half in halves]
            return (torch.cat(outs),)

    pipe = make("sd3")
    with cache(pipe, interval=3) as cached:
        batched, one = generate(pipe, 9), cached.report()
    pipe.transformer.__class__ = OneByOne
    with cache(pipe, interval=3) as cached:
        separate, two = generate(pipe, 9), cached.report()
    torch.testing.assert_close(separate, batched, atol=1e-5, rtol=1e-5)
    assert (one["steps_computed"], one["steps_skipped"]) == (two["steps_computed"], two["steps_skipped"]) == (4, 5)
    assert two["units_computed"] == 2 * one["units_computed"] and two["cache_bytes_peak"] == one["cache_bytes_peak"]


def test_branches_that_come_and_go_keep_their_own_history():
    """Skip-layer guidance: a third branch in some steps, without some blocks."""
    pipe = make("sd3")
    extra = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.1, "skip_layer_guidance_stop": 0.7}
    plain, guided = generate(pipe, 10), generate(pipe, 10, **extra)
    ran = watch(pipe, ["transformer_blocks.0.attn.to_q"])
    with cache(pipe, interval=4):
        found = generate(pipe, 10, **extra)
    calls = [1, 1, 2, 2, 2, 2, 2, 1, 1, 1]  # steps 2 to 6 call twice
    first = [sum(calls[:step]) for step in (0, 1, 5, 9)]
    late = [sum(calls[:step]) + 1 for step in (2, 5)]  # computed when it comes, then by the schedule
    assert ran["transformer_blocks.0.attn.to_q"] == sorted(first + late)
    assert (found - guided).abs().max() < 0.5 * (guided - plain).abs().max()


def test_both_evaluations_of_a_second_order_scheduler_are_one_step():
    pipe = make("sd3")
    pipe.scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
    exact, ran = generate(pipe, 8), watch(pipe, ["transformer_blocks.0.attn.to_q"])
    with cache(pipe, interval=3) as cached:
        found = generate(pipe, 8)
        report = cached.report()
    assert ran["transformer_blocks.0.attn.to_q"] == [
        0,
        1,
        2,
        3,
        8,
        9,
        14,
    ]  # steps 0, 1, 4, 7; the last is one evaluation
    assert (report["steps_computed"], report["steps_skipped"]) == (4, 4)
    assert (found - exact).abs().max() < 0.02
    with cache(pipe, interval=1):
        assert torch.equal(generate(pipe, 8), exact)


def test_two_transformers_share_the_steps():
    """Wan 2.2: the second one takes over at a boundary and starts with a computed step."""
    pipe = make("wan", second=True)
    exact, ran = generate(pipe, 12), watch(pipe, ["blocks.0.ffn.net.0"])
    boundary = sum(bool(t >= 700) for t in pipe.scheduler.timesteps)
    with cache(pipe) as cached:
        found, report = generate(pipe, 12), cached.report()
    assert 1 < boundary < 11 and ran["blocks.0.ffn.net.0"] == computed([s for s in (0, 5, 10) if s < boundary], 2)
    computed_of_second = len({boundary, *(s for s in (0, 5, 10) if s > boundary)})
    assert report["sites"]["transformer_2.blocks.0.ffn"]["computed"] == 2 * computed_of_second
    assert (found - exact).abs().max() < 0.2


def test_image_to_image_counts_from_where_it_starts():
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=2, latent_channels=4)
    pipe = diffusers.StableDiffusion3Img2ImgPipeline.from_pipe(make("sd3"), vae=vae)
    prompt, pooled = embeddings(1, 5, 24, seed=0), embeddings(1, 12, seed=1)
    text = {"prompt_embeds": prompt, "pooled_prompt_embeds": pooled, "guidance_scale": 1.0}
    with cache(pipe, interval=3) as cached:
        pipe(**text, image=embeddings(1, 4, 8, 8, seed=2), strength=0.5, num_inference_steps=12, output_type="latent")
        assert (cached.report()["steps_computed"], cached.report()["steps_skipped"]) == (3, 3)  # 0, 1, 4 of 6


class Stopped(Exception):
    pass


@pytest.mark.parametrize("kind", ["flux", "sd3", "wan", "hunyuan"])
def test_exceptions_and_interrupts_leave_nothing(kind):
    def stop(pipe, step, t, values):
        if step == 3:
            raise Stopped
        return values

    def interrupt(pipe, step, t, values):
        pipe._interrupt = step == 3
        return values

    pipe = make(kind)
    exact = generate(pipe)
    with cache(pipe, interval=3) as cached:
        first = generate(pipe)
        for callback in (stop, interrupt):
            try:
                generate(pipe, callback_on_step_end=callback)
            except Stopped:
                assert callback is stop
            assert cached.at is None and not cached._stores and not pipe.transformer._forward_pre_hooks
            assert type(pipe.scheduler) is getattr(diffusers, type(pipe.scheduler).__name__)
            assert torch.equal(generate(pipe), first)
    assert pristine(pipe) and torch.equal(generate(pipe), exact)
    with pytest.raises(Stopped), cache(pipe):
        generate(pipe, callback_on_step_end=stop)
    assert pristine(pipe) and torch.equal(generate(pipe), exact)


@pytest.mark.parametrize("kind", MAKERS)
def test_every_generation_starts_anew(kind):
    """At another resolution, number of steps or scheduler as well; outside of a generation nothing is cached."""
    larger = {} if kind == "dit" else {"height": 128, "width": 64}
    pipe = make(kind)
    with cache(pipe, interval=3, warmup=1) as cached:
        first, large = generate(pipe), generate(pipe, 4, **larger)
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
        assert torch.equal(generate(pipe), first) and torch.equal(generate(pipe, 4, **larger), large)
        assert cached.at is None and not cached._stores and cached.report()["steps_computed"] == 4 * len((0, 3))


def test_other_tokens_midway_start_a_new_history():
    def more(pipe, step, t, values):
        longer = step == 4
        return {"prompt_embeds": embeddings(2, 7, 24, seed=5)} if longer else {}

    pipe = make("sd3")
    ran = watch(pipe, ["transformer_blocks.0.ff_context.net.0"])
    options = {"callback_on_step_end": more, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    with cache(pipe, interval=4):
        assert torch.isfinite(generate(pipe, 10, **options)).all()
    assert ran["transformer_blocks.0.ff_context.net.0"] == [0, 1, 5, 9]
    ran["transformer_blocks.0.ff_context.net.0"].clear()
    with cache(pipe, interval=7):
        generate(pipe, 10, **options)
    assert [call - 10 for call in ran["transformer_blocks.0.ff_context.net.0"]] == [0, 1, 5, 8]


@pytest.mark.parametrize("kind", ["flux", "wan"])
def test_against_the_hook_of_diffusers(kind):
    """Its full steps are 0 1 2 4 9 14 where the published ones are 0 1 2 7 12 17, its units attention without the MLPs,
    and on Wan none at all. At the same steps and units the forecasts are the same."""
    pipe = make(kind)
    exact = generate(pipe, 18)
    ran = watch(pipe, INSIDE[kind])
    config = {
        "cache_interval": 5,
        "disable_cache_before_step": 3,
        "max_order": 1,
        "taylor_factors_dtype": torch.float32,
    }
    pipe.transformer.enable_cache(diffusers.TaylorSeerCacheConfig(**config))
    theirs = generate(pipe, 18)
    pipe.transformer.disable_cache()
    steps, all_steps = (0, 1, 2, 4, 9, 14), range(18)
    if kind == "wan":
        assert torch.equal(theirs, exact) and all(calls == computed(all_steps, 2) for calls in ran.values())
        return
    attention = [path for path in ran if "attn" in path]
    assert all(ran[path] == computed(steps if path in attention else all_steps, 2) for path in ran)
    sites = ("transformer_blocks.*.attn", "single_transformer_blocks.*.attn")
    with cache(pipe, CacheConfig(schedule=Explicit(steps), sites=sites, predictor=Taylor(1))):
        ours = generate(pipe, 18)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    for calls in ran.values():
        calls.clear()
    with cache(pipe, interval=5, warmup=3):
        generate(pipe, 18)
    before = 2 * 2 * 18
    assert all([call - before for call in calls] == computed((0, 1, 2, 7, 12, 17), 2) for calls in ran.values())


def test_the_whole_algebra_applies():
    """Error gates, measured costs, Newton's form over the time."""
    pipe = make("flux")
    exact = generate(pipe, 10)
    gated = CacheConfig(schedule=ErrorGated(0.0, indicator="transformer_blocks.0"), predictor=Taylor(1))
    with cache(pipe, gated) as cached:
        assert torch.equal(generate(pipe, 10), exact) and cached.report()["units_skipped"] == 0
    gated = CacheConfig(
        schedule=ErrorGated(0.1, indicator="transformer_blocks.0"), sites=("single_transformer_blocks.*.proj_out",)
    )
    with cache(pipe, gated) as cached:
        assert (generate(pipe, 10) - exact).abs().max() < 0.05
        assert 0 < cached.report()["sites"]["single_transformer_blocks.0.proj_out"]["skipped"] < 20
    error = measure(ForeignModel(pipe), lambda: generate(pipe, 10), ["transformer_blocks.*.attn"])
    assert error.shape == (10, 10) and (error.triu(1).sum() > 0) and pristine(pipe)
    newton = Newton(2, coordinate="t")
    with cache(pipe, CacheConfig(schedule=DynamicProgramming(4, error), predictor=newton)) as cached:  # type: ignore
        assert (generate(pipe, 10) - exact).abs().max() < 0.05 and cached.report()["steps_computed"] == 4


def test_unknown_classes_need_their_sites(monkeypatch):
    pipe = make("dit")
    with cache(pipe, interval=3, order=1) as cached:
        known, sites = generate(pipe), cached.sites
    monkeypatch.delitem(FAMILIES, "DiTTransformer2DModel")  # type: ignore
    with pytest.raises(
        ValueError, match=r"DiTTransformer2DModel has no known sites \(known: Flux.*transformer_blocks.\*.attn1"
    ):
        cache(pipe)
    with pytest.raises(ValueError, match="no known sites"):
        cache(pipe, sites=("blocks",))
    with pytest.raises(ValueError, match=r"'transformer_blocks.\*.attn' matches no module; did you mean"):
        cache(pipe, sites=("transformer_blocks.*.attn",))
    with cache(pipe, interval=3, order=1, sites=("transformer_blocks.*.attn1", "transformer_blocks.*.ff")) as cached:
        assert torch.equal(generate(pipe), known) and sorted(cached.sites) == sorted(sites)


def test_bad_requests_are_refused():
    pipe = make("flux")
    with pytest.raises(ValueError, match=r"matches no module; did you mean 'transformer_blocks.\*.attn'"):
        cache(pipe, sites=("transformer_blocks.*.attn1",))
    with pytest.raises(ValueError, match=r"config states .* without sites, interval, order or warmup"):
        cache(pipe, CacheConfig(schedule=Uniform(2)), order=2)
    with pytest.raises(ValueError, match="order must be 0, 1, 2, 3 or 4"):
        cache(pipe, order=9)
    with pytest.raises(ValueError, match="every must be at least 1"):
        cache(pipe, interval=0)
    with pytest.raises(ValueError, match="with a transformer and a scheduler, got DDPMPipeline"):
        cache(diffusers.DDPMPipeline(torch.nn.Identity(), diffusers.DDPMScheduler()))
    with cache(pipe, sites=("single_transformer_blocks.*.proj_out",)) as cached:
        with pytest.raises(ValueError, match="an attached Cache has claimed"):
            cache(pipe)
        with pytest.raises(ValueError, match="attached already"):
            cached.attach(ForeignModel(pipe))
        with cache(pipe, sites=("transformer_blocks.*.attn",), interval=2) as other:  # disjoint sites
            generate(pipe)
            assert (cached.report()["steps_computed"], other.report()["steps_computed"]) == (3, 4)
        network, pipe.transformer = pipe.transformer, make("flux").transformer
        with pytest.raises(ValueError, match="transformer was replaced"):
            generate(pipe)
        pipe.transformer = network
    assert pristine(pipe)
    pipe = make("sd3")
    pipe.transformer.enable_forward_chunking(2, 1)
    with pytest.raises(ValueError, match="chunks"):
        cache(pipe)
    for compiled in (torch.compile(make("sd3").transformer), make("sd3").transformer):
        compiled.compile()
        pipe.transformer = compiled
        with pytest.raises(ValueError, match="compiled as a whole"):
            cache(pipe)
    pipe = make("flux")
    pipe.transformer.compile_repeated_blocks()
    with pytest.raises(ValueError, match=r"lies inside transformer_blocks\.0, which is compiled"):
        cache(pipe)
    with cache(pipe, sites=("blocks",)) as cached:
        blocks = [f"{stack}transformer_blocks.{i}" for stack in ("", "single_") for i in range(2)]
        assert sorted(cached.sites) == sorted(blocks)


def test_schedulers_that_never_step_are_noticed(monkeypatch):
    pipe = make("dit")
    other = diffusers.DDIMScheduler(clip_sample=False)
    other.set_timesteps(9)
    monkeypatch.setattr(pipe.scheduler, "step", other.step)
    with cache(pipe), pytest.raises(ValueError, match=r"ran 8 times without a step of pipe\.scheduler"):
        generate(pipe, 9)
    assert "attached" not in vars(pipe)


def test_an_accelerated_pipeline_keeps_its_class_its_signature_and_its_files(tmp_path):
    pipe = make("dit")
    signature = inspect.signature(pipe.__call__)
    with cache(pipe):
        assert isinstance(pipe, diffusers.DiTPipeline) and inspect.signature(pipe.__call__) == signature
        pipe.save_pretrained(tmp_path)
    back = diffusers.DiTPipeline.from_pretrained(tmp_path)
    back.set_progress_bar_config(disable=True)
    assert torch.equal(generate(back), generate(pipe))
