"""Pretraining with human preferences: advantage-weighted regression (arXiv 2302.08582).

    alignax train --config experiments/methods/phf_awr.py --workdir runs/phf_awr

Cost: about a minute on two CPU cores. Expected: the stages finish, and the table compares the policy with its start.
`:tiny` runs the same stages at toy size.
"""

from alignax import configs


def get_config(arg: str = ""):
    """Default strength of the paper; `tiny` for tests."""
    return configs.embedded_run("phf_awr", tiny=configs.quick(arg))
