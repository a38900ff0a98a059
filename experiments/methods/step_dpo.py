"""Step-DPO (arXiv 2406.18629).

    alignax train --config experiments/methods/step_dpo.py --workdir runs/step_dpo

Cost: about a minute on two CPU cores. Expected: the stages finish, and the table compares the policy with its start.
`:tiny` runs the same stages at toy size.
"""

from alignax import configs


def get_config(arg: str = ""):
    """Default strength of the paper; `tiny` for tests."""
    return configs.embedded_run("step_dpo", tiny=configs.quick(arg))
