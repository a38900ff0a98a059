"""A loss made of parts: IPO's squared link on length-averaged log-ratios, a length discount, and a little SFT.

    alignax train --config experiments/methods/compose.py --workdir runs/compose
    alignax train --config experiments/methods/compose.py --config.method.loss.link=hinge --workdir runs/compose_hinge
    alignax train --config experiments/dpo.py:loss=compose --config.loss.link=hinge ...
    alignax train --config experiments/dpo.py:loss=dpo+0.2*sft --config.loss.dpo.beta=0.2 ...

`reward`, `link`, `offset`, `weight` and `extra` of `method.loss` name the parts (alignax/losses/parts.py has them all);
the other keys are the hyper-parameters of all parts, and one that no chosen part has is refused unless it stands at its
default. With a reward that needs no reference (`logp`, ...) set `--config.method.reference=none` too.

Cost: about a minute on two CPU cores. Expected: the stages finish, and the table compares the policy with its start.
`:tiny` runs the same stages at toy size.
"""

from alignax import configs


def get_config(arg: str = ""):
    """The parts above; `tiny` for tests."""
    return configs.embedded_run("compose", tiny=configs.quick(arg), hyper=dict(
        reward="mean_log_ratio", link="square", tau=0.5, beta=1.0, offset="lengths", length_alpha=0.01,
        extra="nll_mean", extra_weight=0.1))
