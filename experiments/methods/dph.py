"""Direct preference heads (arXiv 2405.20053).

    alignax train --config experiments/methods/dph.py --workdir runs/dph

Cost: about a minute on two CPU cores. Expected: the stages finish, the reward head trained with the last one (no
samples are compared).
`:tiny` runs the same stages at toy size.
"""

from alignax import configs


def get_config(arg: str = ""):
    """Default strength of the paper; `tiny` for tests."""
    return configs.embedded_run("dph", tiny=configs.quick(arg))
