"""Direct multi-turn preference optimisation (arXiv 2406.14868).

    alignax train --config experiments/methods/dmpo.py --workdir runs/dmpo

Cost: about a minute on two CPU cores. Expected: the stages finish, and the table compares the policy with its start.
`:tiny` runs the same stages at toy size.
"""

from alignax import configs


def get_config(arg: str = ""):
    """Default strength of the paper; `tiny` for tests."""
    return configs.embedded_run("dmpo", tiny=configs.quick(arg))
