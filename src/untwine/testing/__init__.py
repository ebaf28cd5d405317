"""The contract tests as functions that an outside package can call on its own parts.

    from untwine.testing import check_solver
    check_solver(MySolver(), order=2)

Each raises ``AssertionError`` with what is wrong. untwine's own tests call them on everything that is registered.
"""

from untwine.testing.diffusion import check_path, check_solver, check_time_draw
from untwine.testing.training import check_codec, check_objective

__all__ = ["check_codec", "check_objective", "check_path", "check_solver", "check_time_draw"]
