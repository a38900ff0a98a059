"""H-DPO: entropy-controllable DPO (arXiv 2411.07595).

    alignax train --config experiments/methods/h_dpo.py --workdir runs/h_dpo

Cost: about a minute on two CPU cores. Expected: the stages finish, and the table compares the policy with its start.
`:tiny` runs the same stages at toy size.
"""

from alignax import configs


def get_config(arg: str = ""):
    """Default strength of the paper; `tiny` for tests."""
    return configs.embedded_run("h_dpo", tiny=configs.quick(arg))
