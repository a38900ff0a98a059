"""Sequential Preference Optimization over preference dimensions (arXiv 2405.12739).

    alignax train --config experiments/methods/sequential_po.py --workdir runs/sequential_po

Cost: about a minute on two CPU cores. Expected: the stages finish, and the table compares the policy with its start.
`:tiny` runs the same stages at toy size.
"""

from alignax import configs


def get_config(arg: str = ""):
    """Default strength of the paper; `tiny` for tests."""
    return configs.embedded_run("sequential_po", tiny=configs.quick(arg))
