"""REBEL: regressing relative rewards (arXiv 2404.16767).

    alignax train --config experiments/methods/rebel.py --workdir runs/rebel

Cost: about a minute on two CPU cores. Expected: the stages finish, and the table compares the policy with its start.
`:tiny` runs the same stages at toy size.
"""

from alignax import configs


def get_config(arg: str = ""):
    """Default strength of the paper; `tiny` for tests."""
    return configs.embedded_run("rebel", tiny=configs.quick(arg))
