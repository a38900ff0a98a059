"""beta-DPO: dynamic beta and filtering (arXiv 2407.08639).

    alignax train --config experiments/methods/beta_dpo.py --workdir runs/beta_dpo

Cost: about a minute on two CPU cores. Expected: the stages finish, and the table compares the policy with its start.
`:tiny` runs the same stages at toy size.
"""

from alignax import configs


def get_config(arg: str = ""):
    """Default strength of the paper; `tiny` for tests."""
    return configs.embedded_run("beta_dpo", tiny=configs.quick(arg))
