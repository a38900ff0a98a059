"""TPO: tree preference optimisation with adaptive step reward (arXiv 2410.12854).

    alignax train --config experiments/methods/tpo_tree.py --workdir runs/tpo_tree

Cost: about a minute on two CPU cores. Expected: the stages finish, and the table compares the policy with its start.
`:tiny` runs the same stages at toy size.
"""

from alignax import configs


def get_config(arg: str = ""):
    """Default strength of the paper; `tiny` for tests."""
    return configs.embedded_run("tpo_tree", tiny=configs.quick(arg))
