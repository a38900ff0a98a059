"""Quality-aware self-refinement (Sr-IPO) (arXiv 2405.21040).

    alignax train --config experiments/methods/sr_ipo.py --workdir runs/sr_ipo

Cost: about a minute on two CPU cores. Expected: the stages finish, and the table compares the policy with its start.
`data.aux_prompt` is the quality prompt, put before every prompt: here a sentence in the stories' words. For a real
model say that the answer was rated 100 of 100, as the paper does; a record's `extra.aux_prompt` stands instead of it.
Empty, the next record's prompt is taken, which is a control and not the method.
`:tiny` runs the same stages at toy size.
"""

from alignax import configs

QUALITY = "one day Tom was very happy and kind ."


def get_config(arg: str = ""):
    """Default strength of the paper; `tiny` for tests."""
    return configs.embedded_run("sr_ipo", tiny=configs.quick(arg),
                                data=dict(path="stage:sample", eval_records=16, aux_prompt=QUALITY))
