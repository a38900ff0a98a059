"""SimNPO (arXiv 2410.07163).

    alignax train --config experiments/methods/simnpo.py --workdir runs/simnpo

Cost: about a minute on two CPU cores. Expected: the stages finish, and the table compares the policy with its start.
`:tiny` runs the same stages at toy size.
"""

from alignax import configs


def get_config(arg: str = ""):
    """Default strength of the paper; `tiny` for tests."""
    return configs.embedded_run("simnpo", tiny=configs.quick(arg))
