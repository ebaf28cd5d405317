"""Low-rank adaptation of linear layers (Hu et al., arXiv 2106.09685), through peft.

``W x + (scale alpha / rank) B A x`` with B zero at the start, so that a fresh adapter changes nothing. Saved in peft's
layout (``adapter_config.json``, ``adapter_model.safetensors``), which peft's ``PeftModel.from_pretrained`` reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from untwine.adapters.base import Adapter, Attached

_PREFIX = "base_model.model."  # peft's name of the adapted model


@dataclass(frozen=True, kw_only=True)
class LoRA(Adapter):
    """Which layers get a low-rank update, and of what rank."""

    rank: int = 8
    alpha: float | None = None
    """numerator of the scale alpha / rank; None = rank"""
    targets: tuple[str, ...] = ("attn.qkv", "attn.proj", "mlp.w1", "mlp.w2", "mlp.w3")
    """ends of the module paths of linear layers"""
    name: str = "default"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be >= 1, got {self.rank}")
        if self.alpha is not None and not self.alpha > 0:
            raise ValueError(f"alpha must be > 0 or null, got {self.alpha}")
        if not self.targets:
            raise ValueError("targets must name at least one layer, such as attn.qkv")

    def attach(self, model: nn.Module) -> AttachedLoRA:
        """A fresh adapter on ``model`` (a diffusers ``ModelMixin`` with peft support)."""
        config = _peft("LoraConfig")(
            r=self.rank, lora_alpha=self.rank if self.alpha is None else self.alpha, target_modules=list(self.targets)
        )
        return _attach(model, config, self.name)


def load_lora(model: nn.Module, folder: str | Path, *, name: str = "default") -> AttachedLoRA:
    """The adapter that :meth:`AttachedLoRA.save` or peft wrote, on ``model``.

    Raises:
        ValueError: for a folder without an adapter, or one of another model; the message names what does not fit.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    if not (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder} holds no adapter_config.json; give a folder that save() or peft wrote")
    try:
        config = _peft("LoraConfig").from_pretrained(str(folder))
        saved = load_file(folder / "adapter_model.safetensors")
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"{folder} holds a damaged adapter: {error}") from error
    attached = _attach(model, config, name)
    own = attached.tensors()
    saved = {key.removeprefix(_PREFIX): value for key, value in saved.items()}
    shapes = [{key: value.shape for key, value in tensors.items()} for tensors in (own, saved)]
    if wrong := {key for key in {*own, *saved} if shapes[0].get(key) != shapes[1].get(key)}:
        attached.detach()
        raise ValueError(f"the adapter in {folder} does not fit this model: {sorted(wrong)[:5]}")
    with torch.no_grad():
        for key, value in own.items():
            value.copy_(saved[key])
    return attached


class AttachedLoRA(Attached):
    """A low-rank adapter on a model; several may be attached under different names, and then add up."""

    def __init__(self, model: Any, name: str, was_trainable: dict[str, bool]) -> None:
        self.model, self.name, self._was_trainable = model, name, was_trainable
        self._unfused: dict[Any, torch.Tensor] = {}
        """layer -> its weight before fusing"""

    def tensors(self) -> dict[str, torch.Tensor]:
        """The adapter's parameters, live, by their name in the saved file without peft's prefix."""
        marks = (f".lora_A.{self.name}.", f".lora_B.{self.name}.")
        return {
            key.replace(f".{self.name}.", "."): value
            for key, value in self.model.named_parameters()
            if any(mark in key for mark in marks)
        }

    def set_scale(self, scale: float) -> None:
        """Multiplies the update: 1 = as trained, 0 = the model alone."""
        if self._unfused:
            raise ValueError("set_scale: the adapter is fused; unfuse() first")
        for layer in self._layers():
            layer.set_scale(self.name, scale)

    def fuse(self) -> None:
        """Adds the update to the weights, so that it costs nothing in a forward pass; keeps a copy of the weights."""
        for layer in self._layers():
            self._unfused[layer] = layer.get_base_layer().weight.detach().clone()
            layer.merge(adapter_names=[self.name])

    @torch.no_grad()
    def unfuse(self) -> None:
        """Takes it out again, bit for bit."""
        for layer, weight in self._unfused.items():
            layer.unmerge()
            layer.get_base_layer().weight.copy_(weight)
        self._unfused.clear()

    def bake(self) -> None:
        self.fuse()
        self._unfused.clear()
        self.model.unload_lora()
        for key, parameter in self.model.named_parameters():
            parameter.requires_grad_(self._was_trainable[key])

    def detach(self) -> None:
        self.unfuse()
        self.model.delete_adapters(self.name)
        if not getattr(self.model, "peft_config", None):
            self.model.unload_lora()
        for key, parameter in self.model.named_parameters():
            if key in self._was_trainable:
                parameter.requires_grad_(self._was_trainable[key])

    def reset(self) -> None:
        for layer in self._layers():
            layer.reset_lora_parameters(self.name, True)

    def report(self) -> dict[str, Any]:
        layers = [name for name, layer in self.model.named_modules() if layer in set(self._layers())]
        return {"layers": layers, "parameters": sum(value.numel() for value in self.tensors().values())}

    def save(self, folder: str | Path) -> None:
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.model.peft_config[self.name].save_pretrained(str(folder))
        tensors = {_PREFIX + key: value.detach().cpu().contiguous() for key, value in self.tensors().items()}
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})

    def _layers(self) -> list[Any]:
        base = _peft("tuners.tuners_utils.BaseTunerLayer")
        return [m for m in self.model.modules() if isinstance(m, base) and self.name in m.lora_A]


def _attach(model: Any, config: Any, name: str) -> AttachedLoRA:
    if name in getattr(model, "peft_config", {}):
        raise ValueError(f"name: an adapter {name!r} is attached already; detach it or choose another name")
    was_trainable = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
    linear = _linear_layers(model)
    if not any(_ends(path, config.target_modules) for path in linear):
        known = sorted({".".join(path.split(".")[-2:]) for path in linear})
        raise ValueError(f"targets {sorted(config.target_modules)} match no linear layer of this model; it has {known}")
    model.requires_grad_(False)
    model.add_adapter(config, adapter_name=name)
    if len(model.peft_config) > 1:
        model.set_adapters(list(model.peft_config))
    return AttachedLoRA(model, name, was_trainable)


def _linear_layers(model: nn.Module) -> list[str]:
    """Paths of the model's own linear layers, whether adapted already or not."""
    base = _peft("tuners.tuners_utils.BaseTunerLayer")
    adapted = [name for name, m in model.named_modules() if isinstance(m, base)]
    plain = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    return adapted + [name for name in plain if not any(name.startswith(f"{path}.") for path in adapted)]


def _ends(path: str, targets: set[str] | list[str] | str) -> bool:
    return any(path == target or path.endswith(f".{target}") for target in targets)


def _peft(path: str) -> Any:
    """A class of peft, or a message that says how to get it."""
    from importlib import import_module

    module, _, name = f"peft.{path}".rpartition(".")
    try:
        return getattr(import_module(module), name)
    except ImportError as error:
        raise ImportError("LoRA needs peft: pip install untwine[peft]") from error
