"""TPO: triple preference optimisation (arXiv 2405.16681).

    alignax train --config experiments/methods/tpo_triple.py --workdir runs/tpo_triple

Cost: about a minute on two CPU cores. Expected: the stages finish, and the table compares the policy with its start.
`:tiny` runs the same stages at toy size.
"""

from alignax import configs


def get_config(arg: str = ""):
    """Default strength of the paper; `tiny` for tests."""
    return configs.embedded_run("tpo_triple", tiny=configs.quick(arg))
