"""APO-zero on unpaired data (arXiv 2408.06266).

    alignax train --config experiments/methods/apo_zero_unpaired.py --workdir runs/apo_zero_unpaired

Cost: about a minute on two CPU cores. Expected: the stages finish, and the table compares the policy with its start.
`:tiny` runs the same stages at toy size.
"""

from alignax import configs


def get_config(arg: str = ""):
    """Default strength of the paper; `tiny` for tests."""
    return configs.embedded_run("apo_zero_unpaired", tiny=configs.quick(arg))
