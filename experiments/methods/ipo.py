"""IPO / PsiPO (arXiv 2310.12036).

    alignax train --config experiments/methods/ipo.py --workdir runs/ipo

Cost: about a minute on two CPU cores. Expected: the stages finish, and the table compares the policy with its start.
`:tiny` runs the same stages at toy size.
"""

from alignax import configs


def get_config(arg: str = ""):
    """Default strength of the paper; `tiny` for tests."""
    return configs.embedded_run("ipo", tiny=configs.quick(arg))
