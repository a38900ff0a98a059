"""OREO, response variant (arXiv 2412.16145).

    alignax train --config experiments/methods/oreo_response.py --workdir runs/oreo_response

Cost: about a minute on two CPU cores. Expected: the stages finish, and the table compares the policy with its start.
`:tiny` runs the same stages at toy size.
"""

from alignax import configs


def get_config(arg: str = ""):
    """Default strength of the paper; `tiny` for tests."""
    return configs.embedded_run("oreo_response", tiny=configs.quick(arg))
