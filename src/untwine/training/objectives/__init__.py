"""Objectives and the loss terms they are composed of."""

from untwine.registry import Registry

OBJECTIVES = Registry("objective", {"flow_matching": "untwine.training.objectives.flow_matching:FlowMatching"})
TERMS = Registry("loss term", {"flow": "untwine.training.objectives.flow_matching:FlowTerm"})
