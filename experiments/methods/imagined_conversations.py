"""Goal-directed dialogue by offline RL on imagined conversations (ILQL) (arXiv 2311.05584).

    alignax train --config experiments/methods/imagined_conversations.py --workdir runs/imagined_conversations

Cost: about a minute on two CPU cores. Expected: the stages finish, and the table compares the policy with its start.
`:tiny` runs the same stages at toy size.
"""

from alignax import configs


def get_config(arg: str = ""):
    """Default strength of the paper; `tiny` for tests."""
    return configs.embedded_run("imagined_conversations", tiny=configs.quick(arg))
