"""Unlikelihood training on candidate tokens (arXiv 1908.04319).

    alignax train --config experiments/methods/unlikelihood_token.py --workdir runs/unlikelihood_token

Cost: about a minute on two CPU cores. Expected: the stages finish, and the table compares the policy with its start.
The loss goes on with the supervised records, after the stage that the other methods start from.
`:tiny` runs the same stages at toy size.
"""

from alignax import configs


def get_config(arg: str = ""):
    """Default strength of the paper; `tiny` for tests."""
    return configs.embedded_run("unlikelihood_token", tiny=configs.quick(arg),
                                data=dict(path="builtin:stories", max_records=400, eval_records=16))
