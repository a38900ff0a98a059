"""RPO: reward-aware preference optimisation (sq, bwd KL, fwd KL) (arXiv 2406.11704).

    alignax train --config experiments/methods/rpo_reward_aware.py --workdir runs/rpo_reward_aware

Cost: about a minute on two CPU cores. Expected: the stages finish, and the table compares the policy with its start.
`:tiny` runs the same stages at toy size.
"""

from alignax import configs


def get_config(arg: str = ""):
    """Default strength of the paper; `tiny` for tests."""
    return configs.embedded_run("rpo_reward_aware", tiny=configs.quick(arg))
