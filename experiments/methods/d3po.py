"""D3PO: preference optimisation over denoising trajectories (trajectory form) (arXiv 2311.13231).

    alignax train --config experiments/methods/d3po.py --workdir runs/d3po

Cost: about a minute on two CPU cores. Expected: the stages finish, and the table compares the policy with its start.
`:tiny` runs the same stages at toy size.
"""

from alignax import configs


def get_config(arg: str = ""):
    """Default strength of the paper; `tiny` for tests."""
    return configs.embedded_run("d3po", tiny=configs.quick(arg))
