"""ILQL with Monte-Carlo returns (arXiv 2206.11871).

    alignax train --config experiments/methods/ilql_mc_returns.py --workdir runs/ilql_mc_returns

Cost: about a minute on two CPU cores. Expected: the stages finish, and the table compares the policy with its start.
`:tiny` runs the same stages at toy size.
"""

from alignax import configs


def get_config(arg: str = ""):
    """Default strength of the paper; `tiny` for tests."""
    return configs.embedded_run("ilql_mc_returns", tiny=configs.quick(arg))
