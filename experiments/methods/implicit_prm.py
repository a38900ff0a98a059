"""Free process rewards from outcome labels, cross-entropy form (arXiv 2412.01981).

    alignax train --config experiments/methods/implicit_prm.py --workdir runs/implicit_prm

Cost: about a minute on two CPU cores. Expected: the stages finish, and the table compares the policy with its start.
`:tiny` runs the same stages at toy size.
"""

from alignax import configs


def get_config(arg: str = ""):
    """Default strength of the paper; `tiny` for tests."""
    return configs.embedded_run("implicit_prm", tiny=configs.quick(arg))
