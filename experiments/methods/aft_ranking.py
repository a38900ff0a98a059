"""Alignment fine-tuning, ranking form (arXiv 2309.02144).

    alignax train --config experiments/methods/aft_ranking.py --workdir runs/aft_ranking

Cost: about a minute on two CPU cores. Expected: the stages finish, and the table compares the policy with its start.
`:tiny` runs the same stages at toy size.
"""

from alignax import configs


def get_config(arg: str = ""):
    """Default strength of the paper; `tiny` for tests."""
    return configs.embedded_run("aft_ranking", tiny=configs.quick(arg))
