"""Humanline: token clipping and reference syncing (arXiv 2509.24207).

    alignax train --config experiments/methods/humanline.py --workdir runs/humanline

Cost: about a minute on two CPU cores. Expected: the stages finish, and the table compares the policy with its start.
`:tiny` runs the same stages at toy size.
"""

from alignax import configs


def get_config(arg: str = ""):
    """Default strength of the paper; `tiny` for tests."""
    return configs.embedded_run("humanline", tiny=configs.quick(arg))
