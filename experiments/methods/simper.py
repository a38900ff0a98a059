"""SimPER: inverse perplexity (arXiv 2502.00883).

    alignax train --config experiments/methods/simper.py --workdir runs/simper

Cost: about a minute on two CPU cores. Expected: the stages finish, and the table compares the policy with its start.
`:tiny` runs the same stages at toy size.
"""

from alignax import configs


def get_config(arg: str = ""):
    """Default strength of the paper; `tiny` for tests."""
    return configs.embedded_run("simper", tiny=configs.quick(arg))
