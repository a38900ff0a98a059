"""Contrastive Preference Learning with a reference (arXiv 2310.13639).

    alignax train --config experiments/methods/cpl_kl.py --workdir runs/cpl_kl

Cost: about a minute on two CPU cores. Expected: the stages finish, and the table compares the policy with its start.
`:tiny` runs the same stages at toy size.
"""

from alignax import configs


def get_config(arg: str = ""):
    """Default strength of the paper; `tiny` for tests."""
    return configs.embedded_run("cpl_kl", tiny=configs.quick(arg))
