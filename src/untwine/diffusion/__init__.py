"""The mathematics of diffusion and flow models: paths, time, solvers, guidance, sampling. Plain torch, no modules."""

from untwine.registry import Registry

PATHS = Registry(
    "path",
    {
        "linear": "untwine.diffusion.paths:LinearPath",
        "cosine": "untwine.diffusion.paths:CosinePath",
        "vp": "untwine.diffusion.paths:VPPath",
        "discrete": "untwine.diffusion.paths:DiscretePath",
        "cosine_chain": "untwine.diffusion.chains:CosineChain",
    },
)
TIME_DRAWS = Registry(
    "time draw",
    {
        "uniform": "untwine.diffusion.timesteps:UniformTime",
        "logit_normal": "untwine.diffusion.timesteps:LogitNormalTime",
        "truncated_normal": "untwine.diffusion.timesteps:TruncatedNormalTime",
        "arctan_normal": "untwine.diffusion.timesteps:ArctanNormalTime",
    },
)
SOLVERS = Registry(
    "solver",
    {
        "euler": "untwine.diffusion.solvers:Euler",
        "heun": "untwine.diffusion.solvers:Heun",
        "stochastic_heun": "untwine.diffusion.solvers:StochasticHeun",
        "midpoint": "untwine.diffusion.solvers:Midpoint",
        "mean_flow": "untwine.diffusion.solvers:MeanFlow",
        "dopri5": "untwine.diffusion.solvers:Dopri5",
        "adams_bashforth": "untwine.diffusion.solvers:AdamsBashforth",
        "ddim": "untwine.diffusion.solvers:DDIM",
        "ddpm": "untwine.diffusion.solvers:AncestralDDPM",
    },
)
