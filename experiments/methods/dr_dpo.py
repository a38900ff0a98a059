"""Dr. DPO: distributionally robust aggregation (arXiv 2407.07880).

    alignax train --config experiments/methods/dr_dpo.py --workdir runs/dr_dpo

Cost: about a minute on two CPU cores. Expected: the stages finish, and the table compares the policy with its start.
`:tiny` runs the same stages at toy size.
"""

from alignax import configs


def get_config(arg: str = ""):
    """Default strength of the paper; `tiny` for tests."""
    return configs.embedded_run("dr_dpo", tiny=configs.quick(arg))
