"""MaPO: margin-aware preference optimisation without reference (arXiv 2406.06424).

    alignax train --config experiments/methods/mapo_margin.py --workdir runs/mapo_margin

Cost: about a minute on two CPU cores. Expected: the stages finish, and the table compares the policy with its start.
`:tiny` runs the same stages at toy size.
"""

from alignax import configs


def get_config(arg: str = ""):
    """Default strength of the paper; `tiny` for tests."""
    return configs.embedded_run("mapo_margin", tiny=configs.quick(arg))
