"""New desiderata for DPO (proposed loss) (arXiv 2407.09072).

    alignax train --config experiments/methods/typo.py --workdir runs/typo

Cost: about a minute on two CPU cores. Expected: the stages finish, and the table compares the policy with its start.
The samples of the reference are those that the sample stage keeps out of the pairs (`sample.unseen`), so the method
learns from `stage:NAME` alone and starts from the policy that was sampled; other data is refused before anything runs.
`:tiny` runs the same stages at toy size.
"""

from alignax import configs


def get_config(arg: str = ""):
    """Default strength of the paper; `tiny` for tests."""
    return configs.embedded_run("typo", tiny=configs.quick(arg))
