"""Objectives and the loss terms they are composed of."""

from untwine.registry import Registry

objectives = Registry("objective", {"flow_matching": "untwine.training.objectives.flow_matching:FlowMatching"})
terms = Registry("loss term", {"flow": "untwine.training.objectives.flow_matching:FlowTerm"})
