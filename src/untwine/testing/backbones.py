"""What every backbone must do, as functions that raise AssertionError. They run on a CPU, on small random models.

    from untwine.testing.backbones import CHECKS, Subject

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    def test_mine(check):
        check(Subject(lambda: Mine(hidden_size=32, depth=3)))

``DECOUPLED_CHECKS`` are for models with ``encode`` and ``decode``, ``DIFFUSERS_CHECKS`` for those that want diffusers'
caches, adapters and castings.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from untwine.contracts import Condition, Output


def label_condition(model: Any, batch: int) -> Condition:
    """Labels 0, 1, 2 ... for a model that accepts them, else nothing."""
    if "labels" not in model.accepts:
        return Condition()
    return Condition(labels=torch.arange(batch) % model.config.num_classes)


@dataclass(frozen=True)
class Subject:
    """What the checks are run on.

    Args:
        build: makes a new small float32 model; called several times, its parameters are re-drawn.
        grid: size of the samples; not square, unless the model is ``square_only``.
        condition: makes a condition of a batch size for a model.
    """

    build: Callable[[], Any]
    grid: tuple[int, ...] = (4, 6)
    condition: Callable[[Any, int], Condition] = label_condition

    def model(self) -> Any:
        """A model in eval mode with noise on every parameter, always the same: a fresh one may have layers of zeros."""
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            model = self.build().eval()
            for p in model.parameters():
                p.add_(0.1 * torch.randn(p.shape))
        return model

    def inputs(self, model: Any, batch: int = 3, seed: int = 1) -> tuple[Tensor, Tensor, Condition]:
        """x, t and condition."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(batch, model.config.in_channels, *self.grid, generator=generator)
        return x, torch.rand(batch, generator=generator), self.condition(model, batch)


def equal(a: Tensor, b: Tensor, message: str, *, tolerance: float = 0.0) -> None:
    """Asserts equality: bitwise, or within an absolute ``tolerance``."""
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance, equal_nan=False, msg=lambda m: f"{message}: {m}")


def backward(model: Any, inputs: tuple[Any, ...]) -> dict[str, Tensor | None]:
    """Gradients of a loss on the model's sample."""
    model.zero_grad()
    model(*inputs).sample.square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters()}


def check_output(subject: Subject) -> None:
    """A sample of the shape and dtype of x, finite, that depends on x, on t and on each entry of the condition."""
    model = subject.model()
    x, t, condition = subject.inputs(model)
    out = model(x, t, condition)
    assert isinstance(out, Output)
    assert out.sample.shape == x.shape
    assert out.sample.dtype == x.dtype
    assert out.sample.isfinite().all()
    changed = {"x": model(x + 0.5, t, condition), "t": model(x, t * 0.5, condition)}
    changed |= {key: model(x, t, model.null(condition, [key])) for key in model.accepts}
    for name, other in changed.items():
        assert not torch.equal(out.sample, other.sample), f"{name} has no effect"


def check_new_model_predicts_zero(subject: Subject) -> None:
    """A freshly initialised model predicts 0; drawing its parameters anew keeps that and changes something."""
    model = subject.build()
    inputs = subject.inputs(model)
    assert model(*inputs).sample.abs().max() == 0
    before = copy.deepcopy(model.state_dict())
    model.reset_parameters()
    assert model(*inputs).sample.abs().max() == 0
    assert any(not torch.equal(before[k], v) for k, v in model.state_dict().items())


def check_meta_device(subject: Subject) -> None:
    """Construction on the meta device allocates nothing and loads like any other."""
    reference = subject.model()
    with torch.device("meta"):
        model = subject.build()
    assert all(p.is_meta for p in (*model.parameters(), *model.buffers()))
    model.to_empty(device="cpu").eval()
    model.load_state_dict(reference.state_dict())
    inputs = subject.inputs(model)
    equal(model(*inputs).sample, reference(*inputs).sample, "materialised model differs")


def check_save_and_load(subject: Subject) -> None:
    """``save_pretrained`` and ``from_pretrained`` lose nothing."""
    model = subject.model()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = type(model).from_pretrained(folder)
    own, read = ({k: v for k, v in m.config.items() if not k.startswith("_")} for m in (model, loaded))
    assert own == read
    inputs = subject.inputs(model)
    equal(loaded(*inputs).sample, model(*inputs).sample, "loaded model differs")


def check_bfloat16(subject: Subject) -> None:
    """``model.to(bfloat16)`` runs on float32 samples and stays near float32; the same sample from bfloat16 inputs."""
    model = subject.model()
    x, t, condition = subject.inputs(model)
    expected = model(x, t, condition).sample
    got = model.to(torch.bfloat16)(x, t, condition).sample
    assert got.dtype == torch.float32
    scale = expected.abs().max()
    # 8 bits of mantissa through a few layers.
    assert 0 < (got - expected).abs().max() < 0.1 * scale, "bfloat16 is far from float32, or was not used"
    assert model(x.bfloat16(), t, condition).sample.dtype == torch.bfloat16


def check_autocast(subject: Subject) -> None:
    """Under autocast the blocks of a float32 model compute in bfloat16; the sample keeps the dtype of x."""
    model = subject.model()
    inputs = subject.inputs(model)
    expected = model(*inputs).sample
    dtypes = set()
    for block in repeated_blocks(model):
        block.register_forward_hook(lambda _m, _a, out: dtypes.add(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        got = model(*inputs).sample
    assert dtypes == {torch.bfloat16}, f"blocks return {dtypes}"
    assert got.dtype == torch.float32
    assert 0 < (got - expected).abs().max() < 0.1 * expected.abs().max()


def check_time_is_float32(subject: Subject) -> None:
    """In bfloat16 two times that round to one bfloat16 number still give two embeddings, equal to float32's."""
    model = subject.model()
    seen: list[Tensor] = []
    first = next(m for m in model.time_embedder.modules() if isinstance(m, nn.Linear))
    handle = first.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    t = torch.tensor([0.5, 0.5 + 2**-12])
    assert len(t.bfloat16().unique()) == 1
    model.time_embedder(t)
    model.to(torch.bfloat16).time_embedder(t)
    handle.remove()
    expected, got = seen
    assert got.dtype == torch.float32
    equal(got, expected, "the sinusoid lost precision")
    assert not torch.equal(got[0], got[1])


def check_batch_independence(subject: Subject) -> None:
    """Row b of a batch is the sample computed alone, up to rounding."""
    model = subject.model()
    x, t, condition = subject.inputs(model)
    together = model(x, t, condition).sample
    for b in range(len(x)):
        alone = model(x[b : b + 1], t[b : b + 1], condition.select(slice(b, b + 1))).sample
        equal(alone, together[b : b + 1], f"row {b} depends on its batch", tolerance=1e-5)


def check_gradients(subject: Subject) -> None:
    """A gradient reaches every parameter."""
    model = subject.model()
    for name, grad in backward(model, subject.inputs(model)).items():
        assert grad is not None, f"no gradient reaches {name}"
        assert grad.isfinite().all(), f"the gradient of {name} is not finite"
        assert grad.abs().max() > 0, f"no gradient reaches {name}"


def check_gradient_checkpointing(subject: Subject) -> None:
    """Checkpointing changes neither the sample nor a gradient, and runs each block twice."""
    model = subject.model()
    inputs = subject.inputs(model)
    expected = backward(model, inputs)
    calls: list[int] = []
    handles = [m.register_forward_pre_hook(lambda *_: calls.append(1)) for m in repeated_blocks(model)]
    model.enable_gradient_checkpointing()
    got = backward(model, inputs)
    for handle in handles:
        handle.remove()
    assert len(calls) == 2 * len(handles), "blocks are not recomputed"
    for name, grad in expected.items():
        assert grad is not None
        equal(got[name], grad, f"checkpointing changes the gradient of {name}")  # type: ignore[arg-type]


def check_condition_errors(subject: Subject) -> None:
    """Missing and unknown entries of the condition are refused by name, and ``null`` refuses what it does not know."""
    model = subject.model()
    x, t, condition = subject.inputs(model)
    for key in sorted(condition.keys()):
        message = refusal(lambda key=key: model(x, t, condition.drop(key)))
        assert key in message, f"the error does not name {key}: {message}"
    stranger = Condition(labels=condition.labels, vectors={**condition.vectors, "stranger": torch.zeros(len(x), 1, 2)})
    assert "vectors.stranger" in refusal(lambda: model(x, t, stranger))
    assert "stranger" in refusal(lambda: model.null(condition, ["stranger"]))


def check_features(subject: Subject) -> None:
    """Features are the outputs of the named blocks, asking changes nothing, and unknown names are refused."""
    model = subject.model()
    inputs = subject.inputs(model)
    names = [name for name, site in model.sites().items() if site.kind == "block"]
    seen: dict[str, Tensor] = {}
    for name in names:
        model.get_submodule(name).register_forward_hook(lambda _m, _a, out, name=name: seen.update({name: out}))
    out = model(*inputs, features=names)
    assert set(out.features) == set(names)
    for name in names:
        equal(out.features[name], seen[name], f"feature {name} is not the output of its module")
    equal(model(*inputs).sample, out.sample, "asking for features changes the sample")
    assert not model(*inputs).features
    message = refusal(lambda: model(*inputs, features=["blocks.99"]))
    assert all(name in message for name in ("blocks.99", *names)), message


def check_sites(subject: Subject) -> None:
    """Every site is a module path, and its indices are unique within its kind and part."""
    model = subject.build()
    sites = model.sites()
    for name in sites:
        model.get_submodule(name)
    places = [(site.kind, site.part, site.index) for site in sites.values()]
    assert len(set(places)) == len(places)
    blocks = [model.get_submodule(name) for name, site in sites.items() if site.kind == "block"]
    assert {id(b) for b in blocks} == {id(b) for b in repeated_blocks(model)}


def check_compile(subject: Subject, *, most_graphs: int = 2) -> None:
    """Sampling with batches 4, 2 and 1 compiles at most ``most_graphs`` full graphs a block class, same numbers."""
    for half in (False, True):
        _check_compile(subject, most_graphs, half)


def _check_compile(subject: Subject, most_graphs: int, half: bool) -> None:
    from untwine.models.layers.compile import compile_blocks, decompile_blocks

    graphs: list[Any] = []

    def count(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def run() -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            return sampling_like(subject, model)

    model = subject.model()
    expected = run()
    torch.compiler.reset()
    compile_blocks(model, backend=count)
    got = run()
    decompile_blocks(model)
    num_graphs = len(graphs)
    run()
    assert len(graphs) == num_graphs, "decompile_blocks left a compiled block"
    classes = {type(b) for b in repeated_blocks(model)}
    assert 0 < num_graphs <= most_graphs * len(classes), f"{num_graphs} graphs for {len(classes)} block classes"
    for a, b in zip(got, expected):
        equal(a, b, "compiled differs", tolerance=2e-2 * float(b.abs().max()) if half else 1e-5)


@torch.no_grad()
def sampling_like(subject: Subject, model: Any) -> list[Tensor]:
    """Samples of three batch sizes; with an encoder state used once, reused, and reused with modulations."""
    outputs = []
    for batch in (4, 2, 1):
        x, t, condition = subject.inputs(model, batch)
        outputs.append(model(x, t, condition).sample)
        if model.decoupled:
            state = model.encode(x, t, condition)
            outputs.append(model.decode(0.9 * x, state).sample)
            outputs.append(model.decode(0.8 * x, model.modulate(state)).sample)
    return outputs


def check_split(subject: Subject) -> None:
    """``decode(encode(...))`` is ``forward``, modulations change no bit, and each state is tied to its grid."""
    model = subject.model()
    x, t, condition = subject.inputs(model)
    state = model.encode(x, t, condition)
    expected = model(x, t, condition).sample
    equal(model.decode(x, state).sample, expected, "decode(encode(...)) is not forward")
    modulated = model.modulate(state)
    assert state.modulations is None, "modulate changed its argument"
    equal(model.decode(x, modulated).sample, expected, "modulations change the sample")
    assert sum(m.nbytes for m in modulated.modulations) == model.modulation_bytes(state)
    assert all(not m.requires_grad for m in modulated.modulations)
    assert "state" in refusal(lambda: model.decode(x[:1], state))


def check_given_state(subject: Subject) -> None:
    """With a state, t and condition change nothing and the encoder rests; ``retime`` brings t back."""
    model = subject.model()
    x, t, condition = subject.inputs(model)
    state = model.encode(0.5 * x, t, condition)
    expected = model(x, t, condition, state=state).sample
    encoder = [model.get_submodule(n) for n, s in model.sites().items() if s.kind == "block" and s.part == "encoder"]
    calls: list[int] = []
    handles = [m.register_forward_hook(lambda *_: calls.append(1)) for m in encoder]
    equal(model(x, t * 0.3, model.null(condition), state=state).sample, expected, "t or condition changes the sample")
    assert not calls, "the encoder ran although a state was given"
    equal(
        model(x, t, condition, state=model.modulate(state), retime=True).sample, expected, "same time", tolerance=1e-6
    )
    retimed = model(x, t * 0.3, condition, state=state, retime=True).sample
    assert not torch.equal(retimed, expected), "retime has no effect"
    for handle in handles:
        handle.remove()
    equal(model.decode(x, state, retime=t * 0.3).sample, retimed, "decode and forward retime differently")
    stale = model.decode(x, model.modulate(state), retime=t * 0.3).sample
    equal(stale, retimed, "modulations of the old time survive retime")


def check_adapter(subject: Subject) -> None:
    """A PEFT adapter changes the sample, is all that trains, and survives saving."""
    from peft import LoraConfig

    linears = {name.rsplit(".", 1)[-1] for b in repeated_blocks(subject.build()) for name in linear_names(b)}
    config = LoraConfig(r=2, target_modules=sorted(linears), init_lora_weights=False)
    torch.manual_seed(0)
    model = subject.model()
    inputs = subject.inputs(model)
    plain = model(*inputs).sample
    model.add_adapter(config)
    adapted = model(*inputs).sample
    assert not torch.equal(adapted, plain)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    other = subject.model()
    with tempfile.TemporaryDirectory() as folder:
        model.save_lora_adapter(folder)
        other.load_lora_adapter(folder, prefix=None, use_safetensors=True)
    equal(other(*inputs).sample, adapted, "the saved adapter differs")


def check_attention_backend(subject: Subject) -> None:
    """``set_attention_backend`` reaches every attention module."""
    from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend

    model = subject.model()
    inputs = subject.inputs(model)
    with attention_backend("native"):  # restores the process-wide backend that the call below sets
        model.set_attention_backend("_native_math")
        attentions = [model.get_submodule(n) for n, s in model.sites().items() if s.kind == "attention"]
        used = [a.processor._attention_backend for a in attentions]
        got = model(*inputs).sample
    assert used == [AttentionBackendName._NATIVE_MATH] * len(attentions)
    equal(got, subject.model()(*inputs).sample, "the math backend differs", tolerance=1e-5)


def check_layerwise_casting(subject: Subject) -> None:
    """Blocks stored in float8 compute in float32; norms, embedders and modulation stay out of it."""
    model = subject.model()
    inputs = subject.inputs(model)
    expected = model(*inputs).sample
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    stored = {name for name, p in model.named_parameters() if p.dtype == torch.float8_e4m3fn}
    assert stored
    assert not [name for name in stored if any(word in name for word in ("norm", "embedder", "adaln"))]
    got = model(*inputs).sample
    # 3 bits of mantissa in the weights.
    assert 0 < (got - expected).abs().max() < 0.5 * expected.abs().max()


@torch.no_grad()
def check_first_block_cache(subject: Subject) -> None:
    """On a repeated input with a generous threshold the later blocks rest and the sample stays."""
    from diffusers.hooks.first_block_cache import FirstBlockCacheConfig

    model = subject.model()
    inputs = subject.inputs(model)
    expected = model(*inputs).sample
    calls = count_attention(model)
    model.enable_cache(FirstBlockCacheConfig(threshold=1.0))
    with model.cache_context("cond"):
        equal(model(*inputs).sample, expected, "the computing step differs")
        computed = len(calls)
        equal(model(*inputs).sample, expected, "the cached step differs", tolerance=1e-5)
    assert 0 < len(calls) - computed < computed, "nothing was cached"
    model.disable_cache()
    equal(model(*inputs).sample, expected, "disable_cache leaves something behind")


@torch.no_grad()
def check_taylorseer_cache(subject: Subject) -> None:
    """Predicted steps skip the attention, and on a repeated input predict it exactly."""
    from diffusers.hooks.taylorseer_cache import TaylorSeerCacheConfig

    model = subject.model()
    inputs = subject.inputs(model)
    expected = model(*inputs).sample
    calls = count_attention(model)
    model.enable_cache(
        TaylorSeerCacheConfig(cache_interval=3, disable_cache_before_step=2, taylor_factors_dtype=torch.float32)
    )
    num_steps = 8
    with model.cache_context("cond"):
        for _ in range(num_steps):
            equal(model(*inputs).sample, expected, "a predicted step differs", tolerance=1e-5)
    num_attentions = sum(site.kind == "attention" for site in model.sites().values())
    assert 0 < len(calls) < num_steps * num_attentions, "nothing was predicted"


def repeated_blocks(model: Any) -> list[nn.Module]:
    """The modules of the classes that the model declares as its repeated blocks."""
    return [m for m in model.modules() if type(m).__name__ in model._repeated_blocks]


def linear_names(module: nn.Module) -> list[str]:
    """Paths of the linear layers of a module."""
    return [name for name, m in module.named_modules() if isinstance(m, nn.Linear)]


def count_attention(model: Any) -> list[int]:
    """A list that grows by one with each attention module computed."""
    calls: list[int] = []
    for name, site in model.sites().items():
        if site.kind == "attention":
            first = next(m for m in model.get_submodule(name).modules() if isinstance(m, nn.Linear))
            first.register_forward_hook(lambda *_: calls.append(1))
    return calls


def refusal(call: Callable[[], Any]) -> str:
    """The message of the ValueError that ``call`` must raise."""
    try:
        call()
    except ValueError as error:
        return str(error)
    raise AssertionError("a ValueError was expected")


CHECKS: tuple[Callable[[Subject], None], ...] = (
    check_output,
    check_new_model_predicts_zero,
    check_meta_device,
    check_save_and_load,
    check_bfloat16,
    check_autocast,
    check_time_is_float32,
    check_batch_independence,
    check_gradients,
    check_gradient_checkpointing,
    check_condition_errors,
    check_features,
    check_sites,
    check_compile,
)
DECOUPLED_CHECKS: tuple[Callable[[Subject], None], ...] = (check_split, check_given_state)
DIFFUSERS_CHECKS: tuple[Callable[[Subject], None], ...] = (
    check_adapter,
    check_attention_backend,
    check_layerwise_casting,
    check_first_block_cache,
    check_taylorseer_cache,
)
