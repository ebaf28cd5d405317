"""Layers that two or more backbones share."""
