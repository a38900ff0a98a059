"""PL-DPO: Plackett-Luce DPO (arXiv 2305.18290).

    alignax train --config experiments/methods/plackett_luce.py --workdir runs/plackett_luce

Cost: about a minute on two CPU cores. Expected: the stages finish, and the table compares the policy with its start.
`:tiny` runs the same stages at toy size.
"""

from alignax import configs


def get_config(arg: str = ""):
    """Default strength of the paper; `tiny` for tests."""
    return configs.embedded_run("plackett_luce", tiny=configs.quick(arg))
