"""EXO on scored lists (arXiv 2402.00856).

    alignax train --config experiments/methods/exo_list.py --workdir runs/exo_list

Cost: about a minute on two CPU cores. Expected: the stages finish, and the table compares the policy with its start.
`:tiny` runs the same stages at toy size.
"""

from alignax import configs


def get_config(arg: str = ""):
    """Default strength of the paper; `tiny` for tests."""
    return configs.embedded_run("exo_list", tiny=configs.quick(arg))
