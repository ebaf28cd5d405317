"""Pipelines of diffusers as something to attach to: ``with cache(pipe) as cached: pipe(...); cached.report()``.

A generation is one call of the pipeline; its steps are those of ``pipe.scheduler``, and ``set_timesteps`` begins one.
Within a step every call of the transformer is a guidance branch of its own, by its order: Wan and HunyuanVideo call it
once for each branch, DiT, PixArt and Stable Diffusion 3 once for both. A scheduler of order 2 evaluates twice a step:
two stages, as with our own solvers.

Differs from the reference (TaylorSeer, arXiv 2503.06923): factors are float32; the units are found in the modules of
diffusers, so that the modulation and the concatenations of a skipped single-stream block still run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, Literal

from torch import Tensor, nn

from untwine.acceleration.base import matches
from untwine.acceleration.caching.cache import UNITS, Cache, CacheConfig
from untwine.acceleration.caching.predictors import Taylor
from untwine.acceleration.caching.schedules import WarmUp
from untwine.contracts import Site, StepInfo
from untwine.registry import did_you_mean

_MAX_CALLS = 8  # of the transformer within a step; real pipelines make 1 to 3
_STREAMS = {"attn": "joint", "ff_context": "text"}


@dataclass(frozen=True, kw_only=True)
class Family:
    """The sites of a transformer class, as patterns of module paths, and TaylorSeer's settings for it."""

    block: tuple[str, ...] = ()
    attention: tuple[str, ...] = ()
    """outputs before the gate"""
    mlp: tuple[str, ...] = ()
    """outputs before the gate; of a single-stream block the joint projection of its attention and MLP"""
    head: tuple[str, ...] = ("proj_out",)
    feeders: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """site -> its siblings that nothing else reads"""
    interval: int = 4
    order: int = 1
    warmup: int = 2
    published: bool = False
    """whether interval, order and warmup are the official ones"""

    def kind(self, pattern: str) -> Literal["block", "attention", "mlp", "head"] | None:
        """The kind of the sites of a pattern."""
        for kind in ("block", "attention", "mlp", "head"):
            if pattern in getattr(self, kind):
                return kind
        return None


_DOUBLE_AND_SINGLE: dict[str, Any] = {
    "block": ("transformer_blocks.*", "single_transformer_blocks.*"),
    "attention": ("transformer_blocks.*.attn",),
    "mlp": ("transformer_blocks.*.ff", "transformer_blocks.*.ff_context", "single_transformer_blocks.*.proj_out"),
    "feeders": {"single_transformer_blocks.*.proj_out": ("attn", "proj_mlp", "act_mlp")},
}
FAMILIES: Mapping[str, Family] = {
    "FluxTransformer2DModel": Family(**_DOUBLE_AND_SINGLE, interval=6, order=1, warmup=3, published=True),
    "HunyuanVideoTransformer3DModel": Family(**_DOUBLE_AND_SINGLE, interval=5, order=1, warmup=1, published=True),
    "SD3Transformer2DModel": Family(
        block=("transformer_blocks.*",),
        attention=("transformer_blocks.*.attn", "transformer_blocks.*.attn2"),
        mlp=("transformer_blocks.*.ff", "transformer_blocks.*.ff_context"),
    ),
    "DiTTransformer2DModel": Family(
        block=("transformer_blocks.*",),
        attention=("transformer_blocks.*.attn1",),
        mlp=("transformer_blocks.*.ff",),
        head=("proj_out_2",),
        interval=4,
        order=4,
        warmup=2,
        published=True,
    ),
    "PixArtTransformer2DModel": Family(
        block=("transformer_blocks.*",),
        attention=("transformer_blocks.*.attn1", "transformer_blocks.*.attn2"),
        mlp=("transformer_blocks.*.ff",),
    ),
    "WanTransformer3DModel": Family(
        block=("blocks.*",),
        attention=("blocks.*.attn1", "blocks.*.attn2"),
        mlp=("blocks.*.ffn",),
        interval=5,
        order=1,
        warmup=1,
        published=True,
    ),
}
"""transformer class of diffusers (subclasses included) -> its sites; where nothing is published for caching a class,
``Family``'s own interval, order and warm-up are offered"""


def cache(
    pipe: Any,
    config: CacheConfig | None = None,
    *,
    sites: Sequence[str] = ("sublayers",),
    interval: int | None = None,
    order: int | None = None,
    warmup: int | None = None,
) -> Cache:
    """A cache attached to a pipeline; leaving its ``with`` block, or ``detach()``, restores the pipeline.

    Without ``config`` it is TaylorSeer with the units and settings of the pipeline's family (:data:`FAMILIES`), the
    latter overridden by ``interval``, ``order`` and ``warmup``.

    Args:
        pipe: a pipeline with a ``scheduler`` and a ``transformer`` (and perhaps a ``transformer_2``).
        config: any schedule, sites and predictor.
        sites: ``sublayers``, ``blocks``, ``head`` or patterns of module paths; for a class that is not in
            :data:`FAMILIES` patterns of modules that return a sublayer's output before its gate.

    Raises:
        ValueError: for an unknown transformer class without ``sites``, for ``sites`` that match no module, for what
            another attachment has claimed, or for ``config`` together with the other options.
    """
    given = {"interval": interval, "order": order, "warmup": warmup}
    given = {name: value for name, value in given.items() if value is not None}
    if config is None:
        model = ForeignModel(pipe, sites)
        settings = {name: getattr(model.family, name) for name in ("interval", "order", "warmup")} | given
        schedule = WarmUp(settings["interval"], settings["warmup"])
        predictor = Taylor(settings["order"])
        return Cache(CacheConfig(schedule=schedule, sites=tuple(sites), predictor=predictor)).attach(model)
    if given or tuple(sites) != ("sublayers",):
        raise ValueError(
            "config states schedule, sites and predictor; give it without sites, interval, order or warmup"
        )
    indicator = getattr(config.schedule, "indicator", None)
    return Cache(config).attach(ForeignModel(pipe, (*config.sites, *([indicator] if indicator else []))))


class ForeignModel:
    """The transformer of a pipeline with the ``sites`` and the steps that attachments need.

    ``Cache(config).attach(ForeignModel(pipe))``, ``measure(ForeignModel(pipe), lambda: pipe(...), sites)``: while
    something is attached, ``pipe(...)`` tells it the steps. Sites of a second transformer (Wan 2.2) start with
    ``transformer_2.``.
    """

    def __init__(self, pipe: Any, sites: Sequence[str] = ()) -> None:
        names = [name for name in ("transformer", "transformer_2") if getattr(pipe, name, None) is not None]
        if not names or not hasattr(getattr(pipe, "scheduler", None), "step"):
            raise ValueError(f"pipe must be a pipeline with a transformer and a scheduler, got {type(pipe).__name__}")
        self.pipe = pipe
        self.modules: dict[str, nn.Module] = {name: getattr(pipe, name) for name in names}
        self.family, *_ = (_family(module, sites) for module in self.modules.values())
        self._prefixes = {"" if name == names[0] else f"{name}.": module for name, module in self.modules.items()}
        self._sites: dict[str, Site] = {}
        patterns = [site for site in sites if site not in UNITS]
        self.feeders: dict[str, list[str]] = {}
        """site -> modules whose output nothing else reads"""
        for prefix, module in self._prefixes.items():
            for path, part in module.named_modules():
                self._add(prefix, path, part, patterns)
        for pattern in patterns:
            if not any(matches(site, pattern) for site in self._sites):
                known = _patterns(self._sites) or _patterns(self._paths())
                raise ValueError(f"sites: {pattern!r} matches no module{did_you_mean(pattern, [*UNITS, *known])}")

    def _add(self, prefix: str, path: str, module: nn.Module, wanted: Sequence[str]) -> None:
        if getattr(module, "_chunk_size", None) is not None:
            raise ValueError(f"{prefix}{path} runs its feed-forward in chunks; disable_forward_chunking() first")
        site, pattern, last = prefix + path, _pattern(path), path.rpartition(".")[2]
        kind = self.family.kind(pattern)
        if kind is None and any(matches(site, word) for word in wanted):
            kind = "attention" if "att" in last else "mlp"
        if kind is None:
            return
        index = next((int(name) for name in path.split(".") if name.isdigit()), 0)
        self._sites[site] = Site(kind, prefix.rstrip(".") or "trunk", index, _STREAMS.get(last, "sample"))
        if pattern in self.family.feeders:
            self.feeders[site] = [f"{site.rpartition('.')[0]}.{name}" for name in self.family.feeders[pattern]]

    def _paths(self) -> list[str]:
        return [prefix + path for prefix, module in self._prefixes.items() for path, _ in module.named_modules()]

    def sites(self) -> dict[str, Site]:
        """Every known place by module path, and those that were asked for."""
        return self._sites

    def get_submodule(self, path: str) -> nn.Module:
        """The module of a site."""
        first, _, rest = path.partition(".")
        if f"{first}." in self._prefixes:
            return self._prefixes[f"{first}."].get_submodule(rest)
        return self._prefixes[""].get_submodule(path)

    @property
    def attached(self) -> Sequence[Any]:
        """What is attached to the pipeline."""
        return self.pipe.__dict__.get("attached", ())

    @attached.setter
    def attached(self, attachments: Sequence[Any]) -> None:
        if not self.attached:
            _override(self.pipe, __call__=self._generates)
        self.pipe.attached = attachments

    @attached.deleter
    def attached(self) -> None:
        del self.pipe.attached
        _restore(self.pipe)

    def _generates(self, plain: Callable[..., Any], pipe: Any, *args: Any, **kwargs: Any) -> Any:
        """``pipe(...)`` with its steps told to what is attached."""
        for name, module in self.modules.items():
            if getattr(pipe, name) is not module:
                raise ValueError(f"pipe.{name} was replaced while something is attached; detach it first")
        with _Generation(pipe).heard(self.modules.values()):
            return plain(pipe, *args, **kwargs)


class _Generation:
    """Where a call of the pipeline stands, by its scheduler."""

    def __init__(self, pipe: Any) -> None:
        self.scheduler, self.attached = pipe.scheduler, tuple(pipe.attached)
        self.begin()

    @contextmanager
    def heard(self, modules: Iterable[nn.Module]) -> Iterator[None]:
        """Listens to the scheduler and the transformers; nothing of it is left, however the generation ends."""
        with ExitStack() as stack:
            stack.callback(self.begin)
            for module in modules:
                stack.callback(module.register_forward_pre_hook(self._evaluates, with_kwargs=True).remove)
            _override(self.scheduler, set_timesteps=self._sets_timesteps, step=self._steps)
            stack.callback(_restore, self.scheduler)
            yield

    def begin(self) -> None:
        """Nothing is computed yet."""
        self.evaluation = self.calls = 0
        self.timesteps: list[float] = []
        self.shapes: dict[Any, list[Any]] = {}
        for attachment in self.attached:
            attachment.reset()

    def _sets_timesteps(self, plain: Callable[..., Any], scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        out = plain(scheduler, *args, **kwargs)
        if scheduler is self.scheduler:  # and not a copy of it
            self.begin()
        return out

    def _steps(self, plain: Callable[..., Any], scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        out = plain(scheduler, *args, **kwargs)
        if scheduler is self.scheduler:
            self.evaluation, self.calls = self.evaluation + 1, 0
            if self.evaluation == len(self.timesteps):
                self.begin()  # frees the memory for the decoder
        return out

    def _evaluates(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Tells the step of the call of a transformer that follows."""
        if self.calls == _MAX_CALLS:
            raise ValueError(f"{type(module).__name__} ran {_MAX_CALLS} times without a step of pipe.scheduler")
        if not self.timesteps:
            first = getattr(self.scheduler, "begin_index", None) or 0
            self.timesteps = self.scheduler.timesteps[first:].tolist()
        name, shapes = f"call {self.calls}", [v.shape for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
        if self.shapes.setdefault((module, name), shapes) != shapes:  # other tokens: what is kept does not fit them
            self.shapes = {(module, name): shapes}
            for attachment in self.attached:
                attachment.reset()
        for attachment in self.attached:
            attachment.before_step(self._at(), (name,))
        self.calls += 1

    def _at(self) -> StepInfo:
        """t is the timestep over the number of training steps."""
        order, evaluations = self.scheduler.order, len(self.timesteps)
        step, stage = divmod(self.evaluation, order)
        t = self.timesteps[min(self.evaluation, evaluations - 1)] / self.scheduler.config.num_train_timesteps
        return StepInfo(step, stage, -(-evaluations // order), ahead=((step, stage, t),))


def _family(module: nn.Module, sites: Sequence[str]) -> Family:
    """The family of a transformer; an empty one where ``sites`` names modules of an unknown class.

    Raises:
        ValueError: for an unknown class whose sites are not named, and for a compiled transformer.
    """
    if hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
        raise ValueError("transformer is compiled as a whole; compile its blocks with compile_repeated_blocks()")
    for cls in type(module).__mro__:
        if cls.__name__ in FAMILIES:
            return FAMILIES[cls.__name__]
    if not set(sites) <= set(UNITS):
        return Family(head=())
    raise ValueError(
        f"transformer: {type(module).__name__} has no known sites (known: {', '.join(FAMILIES)}); name the modules to "
        "cache, each returning a sublayer's output before its gate, as in cache(pipe, sites=('blocks.*.attn', "
        f"'blocks.*.mlp')); it has {', '.join(_patterns(path for path, _ in module.named_modules()))}"
    )


def _pattern(path: str) -> str:
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", path)


def _patterns(paths: Iterable[str]) -> list[str]:
    """The patterns of blocks and of what lies directly in them."""
    return sorted({p for p in map(_pattern, paths) if "*" in p and p.count(".") <= 2})


def _override(thing: Any, **methods: Callable[..., Any]) -> None:
    """Gives one object a class of its own, whose methods are ``method(plain, self, ...)``; signatures stay."""
    cls = type(thing)

    def bind(plain: Callable[..., Any], method: Callable[..., Any]) -> Callable[..., Any]:
        return wraps(plain)(lambda self, *args, **kwargs: method(plain, self, *args, **kwargs))

    own = {name: bind(getattr(cls, name), method) for name, method in methods.items()}
    thing.__class__ = type(cls.__name__, (cls,), {"__module__": cls.__module__, "__doc__": cls.__doc__, **own})


def _restore(thing: Any) -> None:
    thing.__class__ = type(thing).__base__
