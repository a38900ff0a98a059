"""Bridging and modelling correlations in pairs (arXiv 2408.07471).

    alignax train --config experiments/methods/bmc.py --workdir runs/bmc

Cost: about a minute on two CPU cores. Expected: the stages finish, and the table compares the policy with its start.
`:tiny` runs the same stages at toy size.
"""

from alignax import configs


def get_config(arg: str = ""):
    """Default strength of the paper; `tiny` for tests."""
    return configs.embedded_run("bmc", tiny=configs.quick(arg))
