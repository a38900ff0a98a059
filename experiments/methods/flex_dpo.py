"""Flex-DPO: separate strengths for chosen and rejected terms (3D-Properties) (arXiv 2406.07327).

    alignax train --config experiments/methods/flex_dpo.py --workdir runs/flex_dpo

Cost: about a minute on two CPU cores. Expected: the stages finish, and the table compares the policy with its start.
`:tiny` runs the same stages at toy size.
"""

from alignax import configs


def get_config(arg: str = ""):
    """Default strength of the paper; `tiny` for tests."""
    return configs.embedded_run("flex_dpo", tiny=configs.quick(arg))
