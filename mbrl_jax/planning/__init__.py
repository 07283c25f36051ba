"""Planning with a model by sampling: sequences of actions are tried out and the best one begun.

A planner takes `value`, which says what candidate sequences are worth, and the plan of the last
call; it knows no model, and `vmap` plans for many states at once. `model_value` makes a `value` of
any dynamics model.
"""

from mbrl_jax.planning.planners import (
    ICEMPlan,
    MPPIPlan,
    Result,
    categorical_cem,
    cem,
    icem,
    mppi,
    random_shooting,
    start_categorical_cem,
    start_cem,
    start_icem,
    start_mppi,
)
from mbrl_jax.planning.value import Value, model_value

__all__ = [
    "ICEMPlan",
    "MPPIPlan",
    "Result",
    "Value",
    "categorical_cem",
    "cem",
    "icem",
    "model_value",
    "mppi",
    "random_shooting",
    "start_categorical_cem",
    "start_cem",
    "start_icem",
    "start_mppi",
]
