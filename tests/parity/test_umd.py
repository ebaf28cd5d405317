"""UMD's network, losses and sampler against the official code's numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.parity.cases import Case, cases
from untwine.contracts import Condition, Prediction, StepInfo
from untwine.diffusion.chains import CosineChain
from untwine.diffusion.guidance import Branch, Guided, classifier_free
from untwine.diffusion.paths import DiscretePath
from untwine.diffusion.sampling import integrate
from untwine.diffusion.solvers import DDIM
from untwine.models.umd import UMD, hidden_pixels, visible_patches
from untwine.training.objectives.masked_diffusion import masked_error

_AT = StepInfo(0, 0, 1)
NETWORK = cases("umd", klass="_ViTAE")


def _first(x: Tensor) -> Tensor:
    """Channels first."""
    return x.movedim(-1, 1)


def _last(x0: Tensor, noise: Tensor) -> Tensor:
    return torch.cat((x0, noise), 1).movedim(1, -1)


def _inputs(case: Case) -> tuple[UMD, Tensor, Tensor, Condition]:
    model = UMD.from_official(case.state, case.kwargs).eval()
    labels = case.inputs.get("y")
    condition = Condition(labels=None if labels is None else labels.long())
    if model.accepts and labels is None:
        condition = model.null(Condition(labels=torch.zeros(len(case.inputs["image"]), dtype=torch.int64)))
    return model, _first(case.inputs["image"]), case.inputs["t"].flatten() / model.config.num_timesteps, condition


@pytest.mark.parametrize("case", NETWORK, ids=str)
@torch.no_grad()
def test_network(case):
    model, x, t, condition = _inputs(case)
    out = model(x, t, condition)
    case.check("pred", _last(out.extra["x0"], out.sample))
    case.check("pre_logits", out.extra["representation"])
    case.check("pre_logits", model.represent(x, t, condition))


@pytest.mark.parametrize("case", NETWORK, ids=str)
@torch.no_grad()
def test_masks_and_losses(case):
    model, x, t, condition = _inputs(case)
    visible = visible_patches(case.inputs["mask_noise"], case.meta["mask_ratio"])
    hidden = hidden_pixels(visible, (x.shape[2], x.shape[3]), model.config.patch_size)
    case.check("mask", hidden.movedim(1, -1))
    out = model(x, t, condition, visible=visible)
    case.check("pred_masked", _last(out.extra["x0"], out.sample))
    case.check("pre_logits_masked", out.extra["representation"])
    case.check("pre_logits_masked", model.represent(x, t, condition, visible=visible))

    x0, noise = _first(case.inputs["target_x0"]), _first(case.inputs["target_eps"])
    of_noise = masked_error(out.sample, noise, 1 - hidden)
    of_x0 = masked_error(out.extra["x0"], x0, hidden)
    case.check("loss_masked_noised", (of_noise + of_x0).mean()[None] / 2)
    case.check("loss_masked_clean", of_x0.mean()[None])
    out = model(x, t, condition)
    everywhere = masked_error(out.sample, noise, None) + masked_error(out.extra["x0"], x0, None)
    case.check("loss_unmasked_noised", everywhere.mean()[None] / 2)


@pytest.mark.parametrize("case", NETWORK, ids=str)
@torch.no_grad()
def test_guidance(case):
    """The case guides both heads; the driver guides the one that is sampled with."""
    if "cfg_3" not in case.outputs:
        assert "y" not in case.inputs
        return
    model, x, t, condition = _inputs(case)
    condition = Condition(labels=condition.labels.clamp(max=model.config.num_classes - 1))
    expected = _first(case.outputs["cfg_3"])
    noise, x0 = expected[:, x.shape[1] :], expected[:, : x.shape[1]]
    for row in range(len(x)):
        at, one = slice(row, row + 1), condition.select(slice(row, row + 1))
        branches = {"cond": Branch(model, one), "null": Branch(model, model.null(one))}
        found = Guided(branches, classifier_free(3.0), path=CosineChain())(x[at], t[row].double(), _AT)
        torch.testing.assert_close(found.value, noise[at], rtol=0, atol=case.tolerance)
        heads = [model(x[at], t[at], branch.condition).extra["x0"] for branch in branches.values()]
        torch.testing.assert_close(heads[1] + 3 * (heads[0] - heads[1]), x0[at], rtol=0, atol=case.tolerance)


@pytest.mark.parametrize("case", NETWORK, ids=str)
def test_arguments_are_in_the_weights(case):
    expected = UMD.from_official(case.state, case.kwargs)
    inferred = UMD.infer_official(case.state, {})
    stacked = _stacked(case.state)
    assert len(stacked) < len(case.state)
    for weights in (case.state, stacked):
        assert UMD.is_official(weights, "umd")
        assert UMD.infer_official(weights, {}) == inferred
        model = UMD.from_official(weights, inferred)
        assert dict(model.config) == dict(expected.config)
        for (name, value), other in zip(model.state_dict().items(), expected.state_dict().values(), strict=True):
            assert torch.equal(value, other), name


def _stacked(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As a scan keeps the blocks of the encoder."""
    found: dict[str, Tensor] = {}
    for name, weight in state.items():
        if name.startswith("Encoder/Encoder1DBlock_"):
            rest = name.split("/", 2)[2]
            scanned = f"Encoder/ScanCheckpointEncoder1DBlock_0/{rest}"
            same = [
                v for k, v in state.items() if k.startswith("Encoder/Encoder1DBlock_") and k.split("/", 2)[2] == rest
            ]
            found[scanned] = torch.stack(same)
        else:
            found[name] = weight
    return found


@pytest.mark.parametrize("case", cases("umd", klass="create_gaussian_diffusion"), ids=str)
def test_chain_and_sampler(case):
    options = case.kwargs
    num = len(case.outputs["betas"])
    path = CosineChain(num_timesteps=num) if options["beta_schedule"] == "cosine" else DiscretePath(num_timesteps=num)
    levels = (torch.arange(num) + 1).double() / num
    torch.testing.assert_close(
        path.transition(levels, levels - 1 / num)[1], case.outputs["betas"], rtol=1e-9, atol=1e-12
    )
    alphas = path.at(levels).alpha ** 2
    torch.testing.assert_close(alphas, case.outputs["alphas_cumprod"], rtol=1e-9, atol=1e-12)

    chosen = case.outputs["reference_timesteps"]
    grid = torch.cat(((chosen + 1) / num, torch.zeros(1))).double()

    def denoise(x, t, at):
        level = torch.round(t * num) - 1
        return Prediction(0.97 * x + 0.02 * torch.cos(level / 200).to(x.dtype), "noise", x, t, path)

    def run(stop):
        solver = DDIM(eta=options["eta"], clip_x0=1.0 if options["clip_denoised"] else None)
        noise = case.inputs["step_noise"]
        return integrate(
            solver, denoise, case.inputs["x_T"], grid, path=path, noise=lambda at: noise[at.step], stop=stop
        )

    for name, stop in {"first_step": 1, "after_loop": len(chosen) - 1, "final_x0": None}.items():
        case.check(name, run(stop), relative=True)
