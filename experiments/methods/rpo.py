"""Regularized preference optimization: SFT loss as adversarial regulariser (arXiv 2405.16436).

    alignax train --config experiments/methods/rpo.py --workdir runs/rpo

Cost: about a minute on two CPU cores. Expected: the stages finish, and the table compares the policy with its start.
`:tiny` runs the same stages at toy size.
"""

from alignax import configs


def get_config(arg: str = ""):
    """Default strength of the paper; `tiny` for tests."""
    return configs.embedded_run("rpo", tiny=configs.quick(arg))
