"""SPPO with hard labels (arXiv 2405.00675).

    alignax train --config experiments/methods/sppo_hard.py --workdir runs/sppo_hard

Cost: about a minute on two CPU cores. Expected: the stages finish, and the table compares the policy with its start.
`:tiny` runs the same stages at toy size.
"""

from alignax import configs


def get_config(arg: str = ""):
    """Default strength of the paper; `tiny` for tests."""
    return configs.embedded_run("sppo_hard", tiny=configs.quick(arg))
