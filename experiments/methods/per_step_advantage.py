"""RL on incorrect synthetic data: per-step advantage weighting (arXiv 2406.14532).

    alignax train --config experiments/methods/per_step_advantage.py --workdir runs/per_step_advantage

Cost: about a minute on two CPU cores. Expected: the stages finish, and the table compares the policy with its start.
`:tiny` runs the same stages at toy size.
"""

from alignax import configs


def get_config(arg: str = ""):
    """Default strength of the paper; `tiny` for tests."""
    return configs.embedded_run("per_step_advantage", tiny=configs.quick(arg))
