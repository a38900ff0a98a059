"""Token-level DPO (TDPO2) (arXiv 2404.11999).

    alignax train --config experiments/methods/tdpo.py --workdir runs/tdpo

Cost: about a minute on two CPU cores. Expected: the stages finish, and the table compares the policy with its start.
`:tiny` runs the same stages at toy size.
"""

from alignax import configs


def get_config(arg: str = ""):
    """Default strength of the paper; `tiny` for tests."""
    return configs.embedded_run("tdpo", tiny=configs.quick(arg))
