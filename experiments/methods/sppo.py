"""SPPO: self-play preference optimisation (arXiv 2405.00675).

    alignax train --config experiments/methods/sppo.py --workdir runs/sppo

Cost: about a minute on two CPU cores. Expected: the stages finish, and the table compares the policy with its start.
`:tiny` runs the same stages at toy size.
"""

from alignax import configs


def get_config(arg: str = ""):
    """Default strength of the paper, win rates from the two scores of a pair; `tiny` for tests."""
    return configs.embedded_run("sppo", hyper={"win_rates": "others"}, tiny=configs.quick(arg))
