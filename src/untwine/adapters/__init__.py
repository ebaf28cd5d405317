"""Parameters added to a frozen model."""

from untwine.registry import Registry

ADAPTERS = Registry("adapter", {"lora": "untwine.adapters.lora:LoRA"})
