"""Pretraining with human preferences: unlikelihood (arXiv 2302.08582).

    alignax train --config experiments/methods/phf_unlikelihood.py --workdir runs/phf_unlikelihood

Cost: about a minute on two CPU cores. Expected: the stages finish, and the table compares the policy with its start.
`:tiny` runs the same stages at toy size.
"""

from alignax import configs


def get_config(arg: str = ""):
    """Default strength of the paper; `tiny` for tests."""
    return configs.embedded_run("phf_unlikelihood", tiny=configs.quick(arg))
