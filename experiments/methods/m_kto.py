"""Multi-turn iterative preference learning (M-KTO) (arXiv 2409.02392).

    alignax train --config experiments/methods/m_kto.py --workdir runs/m_kto

Cost: about a minute on two CPU cores. Expected: the stages finish, and the table compares the policy with its start.
`:tiny` runs the same stages at toy size.
"""

from alignax import configs


def get_config(arg: str = ""):
    """Default strength of the paper; `tiny` for tests."""
    return configs.embedded_run("m_kto", tiny=configs.quick(arg))
