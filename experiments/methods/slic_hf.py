"""SLiC-HF (arXiv 2305.10425).

    alignax train --config experiments/methods/slic_hf.py --workdir runs/slic_hf

Cost: about a minute on two CPU cores. Expected: the stages finish, and the table compares the policy with its start.
`:tiny` runs the same stages at toy size.
"""

from alignax import configs


def get_config(arg: str = ""):
    """Default strength of the paper; `tiny` for tests."""
    return configs.embedded_run("slic_hf", tiny=configs.quick(arg))
