"""Refined DPO with synthetic data (rDPO) (arXiv 2402.08005).

    alignax train --config experiments/methods/rdpo_refined.py --workdir runs/rdpo_refined

Cost: about a minute on two CPU cores. Expected: the stages finish, and the table compares the policy with its start.
`:tiny` runs the same stages at toy size.
"""

from alignax import configs


def get_config(arg: str = ""):
    """Default strength of the paper; `tiny` for tests."""
    return configs.embedded_run("rdpo_refined", tiny=configs.quick(arg))
