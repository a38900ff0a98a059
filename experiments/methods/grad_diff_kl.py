"""Gradient ascent with a KL on the retain set (arXiv 2401.06121).

    alignax train --config experiments/methods/grad_diff_kl.py --workdir runs/grad_diff_kl

Cost: about a minute on two CPU cores. Expected: the stages finish, and the table compares the policy with its start.
`:tiny` runs the same stages at toy size.
"""

from alignax import configs


def get_config(arg: str = ""):
    """Default strength of the paper; `tiny` for tests."""
    return configs.embedded_run("grad_diff_kl", tiny=configs.quick(arg))
