"""Losses that train reward models: a scalar head on the last completion token."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from alignax.losses.info import method
from alignax.losses.inputs import floats, pair
from alignax.ops import links
from alignax.types import Array, Term, Terms


@method(id="bt_rm", system="Bradley-Terry reward model (margin, centering)", arxiv="2203.02155",
        fidelity="third-party code", kind="reward", completions=2)
def bt_rm(rewards: Array, margins: Array, *, margin_weight: Any = 0.0, centering: Any = 0.0) -> Terms:
    """Bradley-Terry: sp(-(r_w - r_l - margin_weight m)) + centering (r_w + r_l)^2.

    rewards: [B, 2]; margins: [B], 0 where the data has none. Two terms by pairs: `preference`, and `center` with
    scale centering. Source: InstructGPT (arXiv 2203.02155), margin of Llama 2 (2307.09288), centering of 2312.09244,
    checked against TRL's reward trainer. Left out: lists of K > 2 (cut them into pairs of one batch), the L2 variant.
    """
    chosen, rejected = pair("rewards", floats(rewards))
    preference = links.logistic(chosen - rejected - margin_weight * floats(margins))
    return Terms({
        "preference": Term(preference),
        "center": Term(jnp.square(chosen + rejected), scale=centering),
    })
