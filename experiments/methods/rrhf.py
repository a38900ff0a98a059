"""RRHF (arXiv 2304.05302).

    alignax train --config experiments/methods/rrhf.py --workdir runs/rrhf

Cost: about a minute on two CPU cores. Expected: the stages finish, and the table compares the policy with its start.
`:tiny` runs the same stages at toy size.
"""

from alignax import configs


def get_config(arg: str = ""):
    """Default strength of the paper; `tiny` for tests."""
    return configs.embedded_run("rrhf", tiny=configs.quick(arg))
