"""Frozen encoders that turn what a user says into a model's condition, before the model runs."""

from untwine.registry import Registry

CONDITIONS = Registry("condition", {"text": "untwine.conditions.text:Text"})
