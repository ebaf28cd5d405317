"""Feature caching as an algebra: *when* to compute (schedule), *where* (site), *what to use otherwise* (predictor)."""

from untwine.registry import Registry

SCHEDULES = Registry(
    "schedule",
    {
        "all": "untwine.acceleration.caching.schedules:All",
        "uniform": "untwine.acceleration.caching.schedules:Uniform",
        "explicit": "untwine.acceleration.caching.schedules:Explicit",
        "taylor": "untwine.acceleration.caching.schedules:WarmUp",
        "cachequant": "untwine.acceleration.caching.schedules:CacheQuant",
        "dynamic_programming": "untwine.acceleration.caching.schedules:DynamicProgramming",
        "error_gated": "untwine.acceleration.caching.schedules:ErrorGated",
    },
)
PREDICTORS = Registry(
    "predictor",
    {
        "reuse": "untwine.acceleration.caching.predictors:Reuse",
        "taylor": "untwine.acceleration.caching.predictors:Taylor",
        "newton": "untwine.acceleration.caching.predictors:Newton",
        "affine": "untwine.acceleration.caching.predictors:Affine",
    },
)
