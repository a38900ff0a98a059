"""Self-supervised preference optimization with preference degree (arXiv 2409.17791).

    alignax train --config experiments/methods/self_supervised_po.py --workdir runs/self_supervised_po

Cost: about a minute on two CPU cores. Expected: the stages finish, and the table compares the policy with its start.
The loop makes four versions of each chosen completion, from untouched to without its key phrases (found by RAKE, see
alignax/data/degrade.py), and trains a classifier to tell them apart beside the policy; its loss starts at log 4.
`:tiny` runs the same stages at toy size.
"""

from alignax import configs


def get_config(arg: str = ""):
    """Default strength of the paper; `tiny` for tests."""
    return configs.embedded_run("self_supervised_po", tiny=configs.quick(arg))
