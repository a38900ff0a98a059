"""Unlikelihood training (arXiv 1908.04319).

    alignax train --config experiments/methods/unlikelihood.py --workdir runs/unlikelihood

Cost: about a minute on two CPU cores. Expected: the stages finish, and the table compares the policy with its start.
`:tiny` runs the same stages at toy size.
"""

from alignax import configs


def get_config(arg: str = ""):
    """Default strength of the paper; `tiny` for tests."""
    return configs.embedded_run("unlikelihood", tiny=configs.quick(arg))
