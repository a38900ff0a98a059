"""Unlikelihood training on repeated n-grams (arXiv 1908.04319).

    alignax train --config experiments/methods/unlikelihood_sequence.py --workdir runs/unlikelihood_sequence

Cost: about a minute on two CPU cores. Expected: the stages finish, and the table compares the policy with its start.
`:tiny` runs the same stages at toy size.
"""

from alignax import configs


def get_config(arg: str = ""):
    """Default strength of the paper; `tiny` for tests."""
    return configs.embedded_run("unlikelihood_sequence", tiny=configs.quick(arg))
