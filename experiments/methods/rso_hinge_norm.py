"""RSO: hinge on log-ratios (arXiv 2309.06657).

    alignax train --config experiments/methods/rso_hinge_norm.py --workdir runs/rso_hinge_norm

Cost: about a minute on two CPU cores. Expected: the stages finish, and the table compares the policy with its start.
`:tiny` runs the same stages at toy size.
"""

from alignax import configs


def get_config(arg: str = ""):
    """Default strength of the paper; `tiny` for tests."""
    return configs.embedded_run("rso_hinge_norm", tiny=configs.quick(arg))
