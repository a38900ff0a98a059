"""Goal-conditioned contrastive reward representations (arXiv 2407.13887).

    alignax train --config experiments/methods/goal_conditioned_rm.py --workdir runs/goal_conditioned_rm

Cost: about a minute on two CPU cores. Expected: the stages finish, the reward head trained with the last one (no
samples are compared).
`:tiny` runs the same stages at toy size.
"""

from alignax import configs


def get_config(arg: str = ""):
    """Default strength of the paper; `tiny` for tests."""
    return configs.embedded_run("goal_conditioned_rm", tiny=configs.quick(arg))
