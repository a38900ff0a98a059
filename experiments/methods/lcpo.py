"""Latent Collective Preference Optimization (EM reweighting) (arXiv 2509.24159).

    alignax train --config experiments/methods/lcpo.py --workdir runs/lcpo

Cost: about a minute on two CPU cores. Expected: the stages finish, and the table compares the policy with its start.
`:tiny` runs the same stages at toy size.
"""

from alignax import configs


def get_config(arg: str = ""):
    """Default strength of the paper; `tiny` for tests."""
    return configs.embedded_run("lcpo", tiny=configs.quick(arg))
