"""Cal-DPO (arXiv 2412.14516).

    alignax train --config experiments/methods/cal_dpo.py --workdir runs/cal_dpo

Cost: about a minute on two CPU cores. Expected: the stages finish, and the table compares the policy with its start.
`:tiny` runs the same stages at toy size.
"""

from alignax import configs


def get_config(arg: str = ""):
    """Default strength of the paper; `tiny` for tests."""
    return configs.embedded_run("cal_dpo", tiny=configs.quick(arg))
