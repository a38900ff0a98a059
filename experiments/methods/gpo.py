"""GPO: generalised preference optimisation links (arXiv 2402.05749).

    alignax train --config experiments/methods/gpo.py --workdir runs/gpo

Cost: about a minute on two CPU cores. Expected: the stages finish, and the table compares the policy with its start.
`:tiny` runs the same stages at toy size.
"""

from alignax import configs


def get_config(arg: str = ""):
    """Default strength of the paper; `tiny` for tests."""
    return configs.embedded_run("gpo", tiny=configs.quick(arg))
