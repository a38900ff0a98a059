"""Likelihood on text that carries a score per segment: pre-training or tuning with human preferences.

R_t: the score of the segment (sentence, line) that token t belongs to, higher is better, `segment_scores` [B, K, L];
token_logps, mask: [B, K, L]. Every term is a mean over tokens; no gradient into R. The conditional objective (control
tokens before good and bad segments) is likelihood on text that holds them: `sft`. Source of all: arXiv 2302.08582,
tomekkorbak/pretraining-with-human-feedback, whose data hold -R.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from alignax.losses.info import method
from alignax.losses.inputs import floats, per_token
from alignax.losses.unlearning import _clamped, _unlikely
from alignax.types import Array, Term, Terms


def _score(segment_scores: Any, mask: jax.Array) -> jax.Array:
    return jnp.where(mask, jax.lax.stop_gradient(floats(segment_scores)), 0)


@method(id="pretraining_with_preferences:filtering", system="Pretraining with human preferences: filtering",
        arxiv="2302.08582", fidelity="official code")
def phf_filtering(token_logps: Array, segment_scores: Array, mask: Array, *, threshold: Any = 0.0) -> Terms:
    """Likelihood of the documents whose mean score is above the threshold (the paper: near the median score).

    One term `nll` over the tokens of the kept documents, and the metric `kept`: documents, of those with tokens.
    Source: see the module.
    """
    mask = jnp.asarray(mask, bool)
    mean = per_token(_score(segment_scores, mask).sum(-1), mask.sum(-1))
    kept = mask & (mean > threshold)[..., None]
    count = (kept.any(-1).sum().astype(jnp.float32), mask.any(-1).sum().astype(jnp.float32))
    return Terms({"nll": Term(-floats(token_logps), kept, "tokens")}, metrics={"kept": count})


@method(id="pretraining_with_preferences:unlikelihood", system="Pretraining with human preferences: unlikelihood",
        arxiv="2302.08582", fidelity="official code")
def phf_unlikelihood(token_logps: Array, segment_scores: Array, mask: Array, *, threshold: Any = 0.0,
                     alpha: Any = 1.0, clamp: Any = 1e-20) -> Terms:
    """-log pi(y_t) where R_t > threshold, else -alpha log(1 - pi(y_t)); one mean over all tokens.

    1 - pi is held at `clamp` with zero gradient below, counted in the metric `clamped`. alpha: 1, or 0.01 for code
    style. One term `loss`. Source: see the module.
    """
    mask = jnp.asarray(mask, bool)
    bad = mask & (_score(segment_scores, mask) <= threshold)
    unlikely, sure = _unlikely(token_logps, bad, clamp)
    values = jnp.where(bad, alpha * unlikely, -jnp.where(mask, floats(token_logps), 0))
    return Terms({"loss": Term(values, mask, "tokens")}, metrics=_clamped(sure, bad))


def _weight(score: jax.Array, base: Any, beta: Any, max_weight: Any) -> jax.Array:
    """min(exp((R - base) / beta), max_weight), without overflow."""
    return jnp.exp(jnp.minimum((score - base) / beta, jnp.log(jnp.asarray(max_weight, score.dtype))))


@method(id="pretraining_with_preferences:rwr", system="Pretraining with human preferences: reward-weighted regression",
        arxiv="2302.08582", fidelity="official code")
def phf_rwr(token_logps: Array, segment_scores: Array, mask: Array, *, beta: Any = 10.0,
            max_weight: Any = 1000.0) -> Terms:
    """-min(exp(R_t / beta), max_weight) log pi(y_t). One term `nll`.

    The code's form, AWR with alpha 1, subtracts an untrained value head where one is configured; here nothing is.
    Source: see the module.
    """
    mask = jnp.asarray(mask, bool)
    weight = _weight(_score(segment_scores, mask), 0, beta, max_weight)
    return Terms({"nll": Term(-weight * jnp.where(mask, floats(token_logps), 0), mask, "tokens")})


@method(id="pretraining_with_preferences:awr",
        system="Pretraining with human preferences: advantage-weighted regression", arxiv="2302.08582",
        fidelity="official code", limits={"alpha": (0.0, 1.0)})
def phf_awr(token_logps: Array, values: Array, segment_scores: Array, mask: Array, *, alpha: Any = 0.5,
            beta: Any = 10.0, max_weight: Any = 1000.0) -> Terms:
    """-alpha min(exp((R_t - sg[V_t]) / beta), max_weight) log pi(y_t) + (1 - alpha) (V_t - R_t)^2.

    values: V [B, K, L]. Two terms: `nll` with scale alpha, `value` with scale 1 - alpha. Defaults: toxicity (beta 0.1
    for personal information; beta 1, alpha 0.05 for code style). Source: see the module.
    """
    mask = jnp.asarray(mask, bool)
    score, value = _score(segment_scores, mask), jnp.where(mask, floats(values), 0)
    weight = _weight(score, jax.lax.stop_gradient(value), beta, max_weight)
    return Terms({"nll": Term(-weight * jnp.where(mask, floats(token_logps), 0), mask, "tokens", alpha),
                  "value": Term(jnp.square(value - score), mask, "tokens", 1 - alpha)})
