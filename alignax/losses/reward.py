"""Losses that train reward models: a scalar head on the last completion token."""

from __future__ import annotations

from typing import Any

import jax
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
    checked against TRL's reward trainer. Left out: the L2 variant. Lists: `bt_rm_list`.
    """
    chosen, rejected = pair("rewards", floats(rewards))
    preference = links.logistic(chosen - rejected - margin_weight * floats(margins))
    return Terms({
        "preference": Term(preference),
        "center": Term(jnp.square(chosen + rejected), scale=centering),
    })


@method(id="bt_rm:list", system="Bradley-Terry reward model on lists", arxiv="2203.02155", fidelity="paper",
        kind="reward")
def bt_rm_list(rewards: Array, scores: Array, valid: Array, *, margin_weight: Any = 0.0, centering: Any = 0.0,
               flat: bool = False) -> Terms:
    """Bradley-Terry on all pairs of a ranked list: mean over score_w > score_l of sp(-(r_w - r_l - c m)).

    All arrays [B, K]; scores rank the completions, equal ones make no pair; m = score_w - score_l, c = margin_weight.
    Two terms: `preference`, mean over a prompt's pairs and then over prompts that have pairs (flat, static: mean over
    all pairs of the batch, which weighs long lists more), and `center`, (r_w + r_l)^2 reduced alike with scale
    centering. No gradient into the scores. Source: InstructGPT (arXiv 2203.02155); margin and centering as `bt_rm`.
    """
    valid = jnp.asarray(valid, bool)
    reward = jnp.where(valid, floats(rewards), 0)
    score = jnp.where(valid, jax.lax.stop_gradient(floats(scores)), 0)
    gap = lambda x: x[:, :, None] - x[:, None, :]
    pairs = (gap(score) > 0) & valid[:, :, None] & valid[:, None, :]
    preference = links.logistic(gap(reward) - margin_weight * gap(score))
    center = jnp.square(reward[:, :, None] + reward[:, None, :])
    flatten = lambda x: x.reshape(x.shape[0], -1)
    reduction = "pairs" if flat else "seq_mean_token_mean"
    return Terms({
        "preference": Term(flatten(preference), flatten(pairs), reduction),
        "center": Term(flatten(center), flatten(pairs), reduction, centering),
    })
