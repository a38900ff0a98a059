"""DPO with an SFT term (3D-Properties) (arXiv 2406.07327).

    alignax train --config experiments/methods/sft_dpo.py --workdir runs/sft_dpo

Cost: about a minute on two CPU cores. Expected: the stages finish, and the table compares the policy with its start.
`:tiny` runs the same stages at toy size.
"""

from alignax import configs


def get_config(arg: str = ""):
    """Default strength of the paper; `tiny` for tests."""
    return configs.embedded_run("sft_dpo", tiny=configs.quick(arg))
