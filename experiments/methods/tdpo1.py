"""Token-level DPO (TDPO1) (arXiv 2404.11999).

    alignax train --config experiments/methods/tdpo1.py --workdir runs/tdpo1

Cost: about a minute on two CPU cores. Expected: the stages finish, and the table compares the policy with its start.
`:tiny` runs the same stages at toy size.
"""

from alignax import configs


def get_config(arg: str = ""):
    """Default strength of the paper; `tiny` for tests."""
    return configs.embedded_run("tdpo1", tiny=configs.quick(arg))
