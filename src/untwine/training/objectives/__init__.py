"""Objectives and the loss terms they are composed of."""

from untwine.registry import Registry

OBJECTIVES = Registry(
    "objective",
    {
        "flow_matching": "untwine.training.objectives.flow_matching:FlowMatching",
        "mean_flow": "untwine.training.objectives.mean_flow:MeanFlow",
        "dual_time": "untwine.training.objectives.sra:DualTime",
        "masked_diffusion": "untwine.training.objectives.masked_diffusion:MaskedDiffusion",
        "reconstruction": "untwine.training.objectives.reconstruction:Reconstruction",
    },
)
TERMS = Registry(
    "loss term",
    {
        "flow": "untwine.training.objectives.flow_matching:FlowTerm",
        "base_prediction": "untwine.training.objectives.joint:BasePrediction",
        "class_token": "untwine.training.objectives.joint:ClassToken",
        "alignment": "untwine.training.objectives.alignment:Alignment",
        "dispersive": "untwine.training.objectives.dispersive:Dispersive",
        "sra": "untwine.training.objectives.sra:SelfAlignment",
        "variational_bound": "untwine.training.objectives.learned_variance:VariationalBound",
        "mean_flow": "untwine.training.objectives.mean_flow:MeanFlowTerm",
    },
)
