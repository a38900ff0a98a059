"""NPO: negative preference optimisation (arXiv 2404.05868).

    alignax train --config experiments/methods/npo.py --workdir runs/npo

Cost: about a minute on two CPU cores. Expected: the stages finish, and the table compares the policy with its start.
`:tiny` runs the same stages at toy size.
"""

from alignax import configs


def get_config(arg: str = ""):
    """Default strength of the paper; `tiny` for tests."""
    return configs.embedded_run("npo", tiny=configs.quick(arg))
