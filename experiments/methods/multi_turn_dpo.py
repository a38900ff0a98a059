"""Multi-turn iterative preference learning (M-DPO) (arXiv 2409.02392).

    alignax train --config experiments/methods/multi_turn_dpo.py --workdir runs/multi_turn_dpo

Cost: about a minute on two CPU cores. Expected: the stages finish, and the table compares the policy with its start.
`:tiny` runs the same stages at toy size.
"""

from alignax import configs


def get_config(arg: str = ""):
    """Default strength of the paper; `tiny` for tests."""
    return configs.embedded_run("multi_turn_dpo", tiny=configs.quick(arg))
