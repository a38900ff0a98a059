"""Bradley-Terry reward model on lists (arXiv 2203.02155).

    alignax train --config experiments/methods/bt_rm_list.py --workdir runs/bt_rm_list

Cost: about a minute on two CPU cores. Expected: the stages finish, and the reward's held-out accuracy is above 1/2.
`:tiny` runs the same stages at toy size.
"""

from alignax import configs


def get_config(arg: str = ""):
    """Default strength of the paper; `tiny` for tests."""
    return configs.embedded_run("bt_rm_list", tiny=configs.quick(arg))
