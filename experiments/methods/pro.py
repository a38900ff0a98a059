"""PRO: preference ranking optimisation (arXiv 2306.17492).

    alignax train --config experiments/methods/pro.py --workdir runs/pro

Cost: about a minute on two CPU cores. Expected: the stages finish, and the table compares the policy with its start.
`:tiny` runs the same stages at toy size.
"""

from alignax import configs


def get_config(arg: str = ""):
    """Default strength of the paper; `tiny` for tests."""
    return configs.embedded_run("pro", tiny=configs.quick(arg))
