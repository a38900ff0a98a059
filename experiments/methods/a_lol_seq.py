"""A-LoL with token ratios (arXiv 2305.14718).

    alignax train --config experiments/methods/a_lol_seq.py --workdir runs/a_lol_seq

Cost: about a minute on two CPU cores. Expected: the stages finish, and the table compares the policy with its start.
`:tiny` runs the same stages at toy size.
"""

from alignax import configs


def get_config(arg: str = ""):
    """Default strength of the paper; `tiny` for tests."""
    return configs.embedded_run("a_lol_seq", tiny=configs.quick(arg))
