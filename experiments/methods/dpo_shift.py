"""DPO-Shift (arXiv 2502.07599).

    alignax train --config experiments/methods/dpo_shift.py --workdir runs/dpo_shift

Cost: about a minute on two CPU cores. Expected: the stages finish, and the table compares the policy with its start.
`:tiny` runs the same stages at toy size.
"""

from alignax import configs


def get_config(arg: str = ""):
    """Default strength of the paper; `tiny` for tests."""
    return configs.embedded_run("dpo_shift", tiny=configs.quick(arg))
