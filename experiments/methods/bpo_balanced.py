"""BPO: balanced preference optimisation (arXiv 2506.03557).

    alignax train --config experiments/methods/bpo_balanced.py --workdir runs/bpo_balanced

Cost: about a minute on two CPU cores. Expected: the stages finish, and the table compares the policy with its start.
`:tiny` runs the same stages at toy size.
"""

from alignax import configs


def get_config(arg: str = ""):
    """Default strength of the paper; `tiny` for tests."""
    return configs.embedded_run("bpo_balanced", tiny=configs.quick(arg))
