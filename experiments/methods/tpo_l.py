"""TPO-L: triple preference optimisation, length-normalised (arXiv 2405.16681).

    alignax train --config experiments/methods/tpo_l.py --workdir runs/tpo_l

Cost: about a minute on two CPU cores. Expected: the stages finish, and the table compares the policy with its start.
`:tiny` runs the same stages at toy size.
"""

from alignax import configs


def get_config(arg: str = ""):
    """Default strength of the paper; `tiny` for tests."""
    return configs.embedded_run("tpo_l", tiny=configs.quick(arg))
