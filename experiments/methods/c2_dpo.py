"""C2-DPO (C-3DPO): constrained controlled DPO (arXiv 2502.17507).

    alignax train --config experiments/methods/c2_dpo.py --workdir runs/c2_dpo

Cost: about a minute on two CPU cores. Expected: the stages finish, and the table compares the policy with its start.
`:tiny` runs the same stages at toy size.
"""

from alignax import configs


def get_config(arg: str = ""):
    """Default strength of the paper; `tiny` for tests."""
    return configs.embedded_run("c2_dpo", tiny=configs.quick(arg))
