"""MPO: mixed (multi-loss) preference optimisation (arXiv 2411.10442).

    alignax train --config experiments/methods/mpo_mixed_loss.py --workdir runs/mpo_mixed_loss

Cost: about a minute on two CPU cores. Expected: the stages finish, and the table compares the policy with its start.
`:tiny` runs the same stages at toy size.
"""

from alignax import configs


def get_config(arg: str = ""):
    """Default strength of the paper; `tiny` for tests."""
    return configs.embedded_run("mpo_mixed_loss", tiny=configs.quick(arg))
