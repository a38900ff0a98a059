"""Reward difference prediction (trajectory form) (arXiv 2402.08714).

    alignax train --config experiments/methods/prdp.py --workdir runs/prdp

Cost: about a minute on two CPU cores. Expected: the stages finish, and the table compares the policy with its start.
`:tiny` runs the same stages at toy size.
"""

from alignax import configs


def get_config(arg: str = ""):
    """Default strength of the paper; `tiny` for tests."""
    return configs.embedded_run("prdp", tiny=configs.quick(arg))
