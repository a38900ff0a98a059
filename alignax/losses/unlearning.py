"""Unlearning: push down completions to forget (label 0), keep those to retain (label 1), in one batch.

S = token sum of the policy's log-probs, n its tokens, lr = S - R, [B, K] each; labels [B, K]; `valid` says which
completions exist. Every forget term and every retain term is averaged over its own completions or tokens.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from alignax.losses.info import method
from alignax.losses.inputs import floats, per_token, sums, valid_log_ratios
from alignax.ops import links
from alignax.types import Array, ConfigError, Term, Terms


def _split(labels: Any, valid: Any) -> tuple[jax.Array, jax.Array]:
    """(to forget, to retain), bool [B, K]."""
    valid, good = jnp.asarray(valid, bool), floats(labels) > 0.5
    return valid & ~good, valid & good


def _means(logps: Any, lengths: Any, valid: Any) -> tuple[jax.Array, jax.Array]:
    """(S / n, n), 0 where absent."""
    valid = jnp.asarray(valid, bool)
    lengths = jnp.where(valid, floats(lengths), 0)
    return per_token(jnp.where(valid, sums("logps", logps), 0), lengths), lengths


def _token_mean(mean: jax.Array, lengths: jax.Array, kept: jax.Array, scale: Any) -> Term:
    """The mean over the tokens of the kept completions of a per-completion token mean."""
    return Term(mean, jnp.where(kept, lengths, 0), "tokens", scale)


@method(id="npo", system="NPO: negative preference optimisation", arxiv="2404.05868", fidelity="official code")
def npo(logps: Array, ref_logps: Array, labels: Array, valid: Array, lengths: Array, *, beta: Any = 0.1,
        forget_weight: Any = 1.0, retain_weight: Any = 1.0) -> Terms:
    """Negative preference optimisation: a (2 / beta) sp(beta lr) on the forget set + b NLL on the retain set.

    All arrays [B, K]. Two terms: `forget` by sequences over label 0, with scale a = forget_weight; `retain`, the
    token mean of -log pi over label 1, with scale b = retain_weight. Bounded below by 0; at pi = pi_ref the forget
    gradient is that of gradient ascent. Source: arXiv 2404.05868 and the authors' TOFU code. Left out: the KL form
    of the retain term (see `grad_diff_kl`).
    """
    forget, retain = _split(labels, valid)
    values = 2 / beta * links.logistic(-beta * valid_log_ratios(logps, ref_logps, valid))
    mean, tokens = _means(logps, lengths, valid)
    return Terms({"forget": Term(values, forget, "sequences", forget_weight),
                  "retain": _token_mean(-mean, tokens, retain, retain_weight)})


@method(id="simnpo", system="SimNPO", arxiv="2410.07163", fidelity="official code")
def simnpo(logps: Array, lengths: Array, labels: Array, valid: Array, *, beta: Any = 4.5, delta: Any = 0.0,
           forget_weight: Any = 0.125, retain_weight: Any = 1.0) -> Terms:
    """Simple NPO, without a reference: a (2 / beta) sp(-beta (-S / n - delta)) on the forget set + b NLL (retain).

    Shapes, terms, reductions and scales as `npo`. Source: arXiv 2410.07163, OPTML-Group/Unlearn-Simple.
    """
    forget, retain = _split(labels, valid)
    mean, tokens = _means(logps, lengths, valid)
    values = 2 / beta * links.logistic(beta * (-mean - delta))
    return Terms({"forget": Term(values, forget, "sequences", forget_weight),
                  "retain": _token_mean(-mean, tokens, retain, retain_weight)})


@method(id="grad_diff", system="GradDiff and gradient ascent", arxiv="2401.06121", fidelity="official code")
def grad_diff(logps: Array, lengths: Array, labels: Array, valid: Array, *, forget_weight: Any = 1.0,
              retain_weight: Any = 1.0) -> Terms:
    """Gradient difference: -a NLL(forget) + b NLL(retain), both token means over the batch; unbounded below.

    All arrays [B, K]. Two terms by tokens: `forget` = log pi over label 0 with scale a, `retain` = -log pi over
    label 1 with scale b. retain_weight = 0 is gradient ascent. Source: arXiv 2401.06121, locuslab/tofu.
    """
    forget, retain = _split(labels, valid)
    mean, tokens = _means(logps, lengths, valid)
    return Terms({"forget": _token_mean(mean, tokens, forget, forget_weight),
                  "retain": _token_mean(-mean, tokens, retain, retain_weight)})


@method(id="grad_diff:kl", system="Gradient ascent with a KL on the retain set", arxiv="2401.06121",
        fidelity="official code")
def grad_diff_kl(token_logps: Array, ref_policy_kl: Array, labels: Array, mask: Array, *, forget_weight: Any = 1.0,
                 retain_weight: Any = 1.0) -> Terms:
    """Gradient ascent with a KL: -a NLL(forget) + b KL(pi_ref || pi) on retain tokens, both token means.

    token_logps, ref_policy_kl, mask: [B, K, L]; labels: [B, K]. Two terms by tokens, `forget` and `retain`.
    Source: arXiv 2401.06121, locuslab/tofu, whose KL also runs over the prompt and padding and divides by rows; here
    it is masked to completion tokens.
    """
    good = (floats(labels) > 0.5)[..., None]
    mask = jnp.asarray(mask, bool)
    return Terms({"forget": Term(floats(token_logps), mask & ~good, "tokens", forget_weight),
                  "retain": Term(floats(ref_policy_kl), mask & good, "tokens", retain_weight)})


def _unlikely(logps: jax.Array, mask: jax.Array, clamp: Any) -> tuple[jax.Array, jax.Array]:
    """(-log max(1 - p, clamp), where the clamp acts); gradient 0 there, and value 0 outside the mask."""
    logps = jnp.where(mask, floats(logps), -1.0)
    clamp = jnp.asarray(clamp, logps.dtype)
    sure = logps >= jnp.log1p(-clamp)
    value = jnp.where(sure, -jnp.log(clamp), -links.log1mexp(jnp.where(sure, -1.0, logps)))
    return jnp.where(mask, value, 0), sure & mask


def _clamped(sure: jax.Array, mask: jax.Array) -> dict[str, tuple[jax.Array, jax.Array]]:
    return {"clamped": (sure.sum().astype(jnp.float32), mask.sum().astype(jnp.float32))}


@method(id="unlikelihood", system="Unlikelihood training", arxiv="1908.04319", fidelity="official code")
def unlikelihood(token_logps: Array, labels: Array, mask: Array, *, alpha: Any = 1.0, clamp: Any = 1e-5) -> Terms:
    """Unlikelihood on preferences: NLL of desirable completions, -alpha log(1 - pi(y_t)) on the others' tokens.

    token_logps, mask: [B, K, L]; labels: [B, K]. Two terms, each a token mean over its own completions: `nll`, and
    `unlikelihood` with scale alpha. 1 - pi is held at `clamp` with zero gradient below, counted in the metric
    `clamped`. The gradient on the logit of a penalised token is +pi. Source: arXiv 1908.04319 (penalty and clamp) and
    its code; the two token means by label, with alpha = 1, are those of arXiv 1911.03860's code
    (facebookresearch/ParlAI, dialogue_unlikelihood), whose clamp is 1e-20, and 1e-6 in half precision.
    """
    good, mask = (floats(labels) > 0.5)[..., None], jnp.asarray(mask, bool)
    bad = mask & ~good
    values, sure = _unlikely(token_logps, bad, clamp)
    return Terms({"nll": Term(-floats(token_logps), mask & good, "tokens"),
                  "unlikelihood": Term(values, bad, "tokens", alpha)}, metrics=_clamped(sure, bad))


def _candidates(targets: jax.Array, mask: jax.Array, window: int) -> jax.Array:
    """bool [B, K, L, L]: at slot t, which earlier slot j names a candidate.

    Tokens of the same completion within `window` slots (0: all), each token once, the target itself never.
    """
    length = targets.shape[-1]
    t, j = jnp.arange(length)[None, None, :, None], jnp.arange(length)[None, None, None, :]
    near = (j < t) & ((t - j <= window) | (window == 0))
    same = targets[..., :, None] == targets[..., None, :]
    usable = near & mask[..., :, None] & mask[..., None, :] & ~same
    # A token that stands again before t is named by its last place: the next place of each token, `length` if none.
    next_place = jnp.min(jnp.where(same & (t < j) & mask[..., None, :], j, length), axis=-1)
    return usable & ~(next_place[..., None, :] < t)


@method(id="unlikelihood:token", system="Unlikelihood training on candidate tokens", arxiv="1908.04319",
        fidelity="official code", chosen_only=True)
def unlikelihood_token(token_logps: Array, candidate_logps: Array, targets: Array, mask: Array, *, alpha: Any = 1.0,
                       clamp: Any = 1e-5, window: int = 0) -> Terms:
    """Token-level unlikelihood: -log pi(y_t) + alpha sum over c in C_t of -log(1 - pi(c | y_<t)).

    C_t: the distinct earlier tokens of the same completion, within `window` slots where it is above 0 (static), less
    y_t. token_logps, mask: [B, K, L]; targets: int [B, K, L]; candidate_logps: [B, K, L, L], entry (t, j) the
    log-prob of token j's id at slot t. Two terms by tokens over all scored tokens: `nll`, and `unlikelihood` with
    scale alpha. Clamp and metric as `unlikelihood`. Source: arXiv 1908.04319 and its code, whose context is the
    flattened batch row, so that candidates may cross sequences there; here they never do.
    """
    mask = jnp.asarray(mask, bool)
    live = _candidates(jnp.asarray(targets), mask, window)
    values, sure = _unlikely(candidate_logps, live, clamp)
    return Terms({"nll": Term(-floats(token_logps), mask, "tokens"),
                  "unlikelihood": Term(values.sum(-1), mask, "tokens", alpha)}, metrics=_clamped(sure, live))


def _repeats(targets: jax.Array, mask: jax.Array, ngram: int) -> jax.Array:
    """bool [B, K, L]: tokens inside an n-gram that stood earlier in the completion."""
    length = targets.shape[-1]
    if ngram > length:
        return jnp.zeros(targets.shape, bool)
    places = length - ngram + 1
    cut = lambda x, i: x[..., i:i + places]
    whole = jnp.stack([cut(mask, i) for i in range(ngram)]).all(0)
    same = jnp.stack([cut(targets, i)[..., :, None] == cut(targets, i)[..., None, :] for i in range(ngram)]).all(0)
    earlier = (jnp.arange(places)[None, :] < jnp.arange(places)[:, None])[None, None]
    again = (same & earlier & whole[..., :, None] & whole[..., None, :]).any(-1)
    pad = [(0, 0)] * (targets.ndim - 1)
    return jnp.stack([jnp.pad(again, [*pad, (i, ngram - 1 - i)]) for i in range(ngram)]).any(0)


@method(id="unlikelihood:sequence", system="Unlikelihood training on repeated n-grams", arxiv="1908.04319",
        fidelity="official code")
def unlikelihood_sequence(token_logps: Array, targets: Array, mask: Array, *, clamp: Any = 1e-20,
                          ngram: int = 4) -> Terms:
    """Sequence-level unlikelihood on generated completions: -log(1 - pi(y_t)) on tokens of repeated n-grams.

    token_logps, mask: [B, K, L]; targets: int [B, K, L]; ngram is static. One term `unlikelihood`: the sum over the
    tokens of n-grams that stood earlier in the same completion, divided by all scored tokens. Clamp and metric as
    `unlikelihood`. Source: arXiv 1908.04319 and its code. Left out: the generation (greedy, 50 tokens of prefix, 100
    of continuation) and its alternation with likelihood updates. Raises ConfigError for ngram below 1.
    """
    if ngram < 1:
        raise ConfigError(f"unlikelihood_sequence: ngram = {ngram}; allowed: 1 or more")
    mask = jnp.asarray(mask, bool)
    live = _repeats(jnp.asarray(targets), mask, ngram)
    values, sure = _unlikely(token_logps, live, clamp)
    return Terms({"unlikelihood": Term(values, mask, "tokens")}, metrics=_clamped(sure, live))
