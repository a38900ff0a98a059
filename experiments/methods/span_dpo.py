"""Suppressing unwanted spans by DPO (hallucinated prior exams; weighted-token variant) (arXiv 2406.06496).

    alignax train --config experiments/methods/span_dpo.py --workdir runs/span_dpo

Cost: about a minute on two CPU cores. Expected: the stages finish, and the table compares the policy with its start.
`:tiny` runs the same stages at toy size.
"""

from alignax import configs


def get_config(arg: str = ""):
    """Default strength of the paper; `tiny` for tests."""
    return configs.embedded_run("span_dpo", tiny=configs.quick(arg))
