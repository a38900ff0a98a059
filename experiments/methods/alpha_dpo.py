"""alpha-DPO: adaptive reward margin (arXiv 2410.10148).

    alignax train --config experiments/methods/alpha_dpo.py --workdir runs/alpha_dpo

Cost: about a minute on two CPU cores. Expected: the stages finish, and the table compares the policy with its start.
`:tiny` runs the same stages at toy size.
"""

from alignax import configs


def get_config(arg: str = ""):
    """Default strength of the paper; `tiny` for tests."""
    return configs.embedded_run("alpha_dpo", tiny=configs.quick(arg))
