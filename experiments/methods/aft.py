"""Alignment fine-tuning with constraint alignment loss (arXiv 2309.02144).

    alignax train --config experiments/methods/aft.py --workdir runs/aft

Cost: about a minute on two CPU cores. Expected: the stages finish, and the table compares the policy with its start.
`:tiny` runs the same stages at toy size.
"""

from alignax import configs


def get_config(arg: str = ""):
    """Default strength of the paper; `tiny` for tests."""
    return configs.embedded_run("aft", tiny=configs.quick(arg))
