"""Lists of K completions of one prompt, ranked by scores or labels. Scores and labels carry no gradient.

S = token sum of the policy's log-probs, n its tokens, lr = S - R the log-ratio, [B, K] each; `valid` says which
completions exist, anywhere in the list; sp = softplus. A list without a comparison costs 0.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from alignax.losses.info import method
from alignax.losses.inputs import floats, per_token, sums, valid_log_ratios
from alignax.ops import links
from alignax.types import Array, ConfigError, Term, Terms


def _constants(x: Any, valid: jax.Array) -> jax.Array:
    """x as floats without gradient, 0 where absent."""
    return jnp.where(valid, jax.lax.stop_gradient(floats(x)), 0)


def _better(scores: jax.Array, valid: jax.Array) -> jax.Array:
    """bool [B, K, K]: both exist and the row's score is strictly above the column's."""
    return (scores[:, :, None] > scores[:, None, :]) & valid[:, :, None] & valid[:, None, :]


def _differences(x: jax.Array) -> jax.Array:
    """[B, K] -> [B, K, K], row minus column."""
    return x[:, :, None] - x[:, None, :]


def _means(logps: Any, lengths: Any, valid: jax.Array, power: Any = 1.0) -> jax.Array:
    """S / n^power, 0 where absent or empty."""
    lengths = jnp.where(valid, floats(lengths), 0)
    some = lengths > 0
    divisor = jnp.where(some, jnp.where(some, lengths, 1) ** power, 0)
    return per_token(jnp.where(valid, sums("logps", logps), 0), divisor)


def _first(marked: jax.Array) -> jax.Array:
    """One-hot bool [B, K] of the first True of each row; all False where there is none."""
    return marked & (jnp.cumsum(marked, -1) == 1)


def _pick(x: jax.Array, one: jax.Array) -> jax.Array:
    """The entry of each row where the one-hot `one` is True; 0 where it has none."""
    return jnp.where(one, x, 0).sum(-1)


def _log_softmax(x: jax.Array, valid: jax.Array) -> jax.Array:
    """Log-softmax over the completions that exist; 0 at absent ones."""
    some = valid | ~valid.any(-1, keepdims=True)
    return jnp.where(valid, x - jax.nn.logsumexp(x, axis=-1, keepdims=True, where=some), 0)


@method(id="exo:list", system="EXO on scored lists", arxiv="2402.00856", fidelity="official code")
def exo_list(logps: Array, ref_logps: Array, scores: Array, valid: Array, *, beta: Any = 0.5,
             score_beta: Any = 0.5) -> jax.Array:
    """Exact optimisation on a list: KL(p_f || p_r), p_f = softmax(beta lr), p_r = softmax(scores / score_beta).

    All arrays [B, K]; returns [B], mean over prompts; the full gradient flows through p_f. 0 exactly where
    beta lr - scores / score_beta is constant over the list. Source: arXiv 2402.00856, haozheji/exact-optimization
    (strengths of its HH script). Left out: the sampling temperature inside the logits; the forward direction, which
    is `info_nca`.
    """
    valid = jnp.asarray(valid, bool)
    log_policy = _log_softmax(beta * valid_log_ratios(logps, ref_logps, valid), valid)
    log_target = _log_softmax(_constants(scores, valid) / score_beta, valid)
    return jnp.where(valid, jnp.exp(log_policy) * (log_policy - log_target), 0).sum(-1)


_LIPO = ("lambda", "pair_logistic", "pair_hinge", "list_mle", "softmax", "point_mse", "point_sigmoid")


def _lambda_weights(rewards: jax.Array, scores: jax.Array, valid: jax.Array) -> jax.Array:
    """|G_i - G_j| |1 / D(rank_i) - 1 / D(rank_j)|, [B, K, K]; ranks by reward, equal rewards in list order."""
    order = jnp.argsort(-jnp.where(valid, jax.lax.stop_gradient(rewards), -jnp.inf), axis=-1)
    rank = jnp.argsort(order, axis=-1) + 1
    discount = 1 / jnp.log1p(rank.astype(rewards.dtype))
    return jnp.abs(_differences(jnp.exp2(scores))) * jnp.abs(_differences(discount))


@method(id="lipo", system="LiPO-lambda", arxiv="2402.01878", fidelity="paper")
def lipo(logps: Array, ref_logps: Array, scores: Array, valid: Array, *, beta: Any = 0.05, member: str = "lambda",
         rax_reduction: bool = False) -> Terms:
    """Listwise preference optimisation: learning to rank with s = beta lr, labels psi = scores in [0, 1].

    lambda: sum over psi_i > psi_j of |G_i - G_j| |1/D(rank_i) - 1/D(rank_j)| sp(-(s_i - s_j)), G = 2^psi - 1,
    D(k) = log(1 + k), rank by s descending (equal s in list order); no gradient through the weights.
    Other members (static): pair_logistic sum sp(-(s_i - s_j)), pair_hinge sum relu(1 - (s_i - s_j)), both over
    psi_i > psi_j; list_mle, Plackett-Luce in order of psi; softmax -sum_j (psi_j / sum psi) log softmax(s)_j;
    point_mse sum (psi - s)^2; point_sigmoid, cross-entropy of sigmoid(s) against psi.

    All arrays [B, K]; returns one term `loss`, the mean over prompts of these sums. rax_reduction (static, lambda
    only): weights times K, logarithm to base 2, mean over all compared pairs of the batch, as RAX reduces.
    Source: arXiv 2402.01878, google/rax. Left out: the pairwise ranker that makes psi.
    """
    if member not in _LIPO or (rax_reduction and member != "lambda"):
        raise ConfigError(f"lipo: member = {member!r} with rax_reduction = {rax_reduction}; allowed: "
                          f"{', '.join(_LIPO)}, and rax_reduction with lambda only")
    valid = jnp.asarray(valid, bool)
    rewards, psi = beta * valid_log_ratios(logps, ref_logps, valid), _constants(scores, valid)
    better, margin = _better(psi, valid), _differences(rewards)
    if member == "lambda":
        values = jnp.where(better, _lambda_weights(rewards, psi, valid) * links.logistic(margin), 0)
        if rax_reduction:
            size = jnp.maximum(valid.sum(-1), 1)[:, None, None]
            return Terms({"loss": Term(values * size * jnp.log(2.0), better, "tokens")})
        return Terms({"loss": Term(values.sum((1, 2)))})
    if member in ("pair_logistic", "pair_hinge"):
        values = links.logistic(margin) if member == "pair_logistic" else links.hinge(margin, 1)
        return Terms({"loss": Term(jnp.where(better, values, 0).sum((1, 2)))})
    if member == "list_mle":
        # Equal labels keep the list's order.
        earlier = (jnp.arange(psi.shape[1])[:, None] <= jnp.arange(psi.shape[1])[None, :])[None]
        rest = (better | ((psi[:, :, None] == psi[:, None, :]) & earlier)) & valid[:, None, :]
        rest = rest | jnp.eye(psi.shape[1], dtype=bool)[None]
        total = jax.nn.logsumexp(jnp.broadcast_to(rewards[:, None, :], rest.shape), axis=-1, where=rest)
        values = total - rewards
    elif member == "softmax":
        mass = psi.sum(-1, keepdims=True)
        share = jnp.where(mass > 0, psi / jnp.where(mass > 0, mass, 1), 0)
        values = -share * _log_softmax(rewards, valid)
    elif member == "point_mse":
        values = jnp.square(psi - rewards)
    else:
        values = psi * links.logistic(rewards) + (1 - psi) * links.logistic(-rewards)
    return Terms({"loss": Term(jnp.where(valid, values, 0).sum(-1))})


@method(id="rrhf", system="RRHF", arxiv="2304.05302", fidelity="official code")
def rrhf(logps: Array, lengths: Array, scores: Array, valid: Array, *, rank_weight: Any = 1.0,
         length_power: Any = 1.0, nll: str = "sequences") -> Terms:
    """Rank responses: w sum over r_i < r_j of relu(s_i - s_j) + NLL(best), s = S / n^length_power, r = scores.

    All arrays [B, K]. Two terms by pairs (one value per prompt): `rank` with scale rank_weight, and `nll` of the
    answer with the highest score (the first of equals): nll (static) = `sequences`, -S (the paper), or `average`,
    -S / n. Zero margin; equal scores make no term. No reference. Source: arXiv 2304.05302, GanjinZero/RRHF (its
    script sets the weight 1).
    """
    if nll not in ("sequences", "average"):
        raise ConfigError(f"rrhf: nll = {nll!r}; allowed: 'sequences', 'average'")
    valid = jnp.asarray(valid, bool)
    score = _constants(scores, valid)
    mean = _means(logps, lengths, valid, length_power)
    rank = jnp.where(_better(score, valid), jax.nn.relu(-_differences(mean)), 0).sum((1, 2))
    best = _first(valid & (score == jnp.max(score, -1, where=valid, initial=-jnp.inf, keepdims=True)))
    total = jnp.where(valid, sums("logps", logps), 0) if nll == "sequences" else _means(logps, lengths, valid)
    return Terms({"rank": Term(rank, scale=rank_weight), "nll": Term(-_pick(total, best), valid.any(-1))})


@method(id="pro", system="PRO: preference ranking optimisation", arxiv="2306.17492", fidelity="official code")
def pro(logps: Array, lengths: Array, scores: Array, valid: Array, *, sft_weight: Any = 0.05) -> Terms:
    """Preference ranking optimisation on a list sorted best first: sum_k L_k + c (K - 1)^2 NLL(first).

    s = S / n; for k < K: g_i = R_k - R_i for i > k, g_k = max of them, R = scores;
    L_k = log(e^{s_k g_k} + sum_{i > k} e^{s_i g_i}) - s_k g_k.

    All arrays [B, K]; K in (K - 1)^2 counts the completions that exist. Two terms by pairs (one value per prompt):
    `ranking`, and `nll` = (K - 1)^2 (-S) of the first completion, with scale sft_weight. No reference.
    Source: arXiv 2306.17492, AlibabaResearch/DAMO-ConvAI (the paper writes temperatures 1 / g).
    Left out: an SFT answer that is not the first completion.
    """
    valid = jnp.asarray(valid, bool)
    mean, gap = _means(logps, lengths, valid), _differences(_constants(scores, valid))
    index = jnp.arange(mean.shape[1])
    later = (index[None, :] > index[:, None])[None] & valid[:, None, :] & valid[:, :, None]
    some = later.any(-1)
    own = jnp.where(some, jnp.max(jnp.where(later, gap, -jnp.inf), -1), 0)
    eye = jnp.eye(mean.shape[1], dtype=bool)[None]
    logits = mean[:, None, :] * jnp.where(eye, own[:, :, None], gap)
    rest = jax.nn.logsumexp(logits, axis=-1, where=later | eye)
    ranking = jnp.where(some, rest - mean * own, 0).sum(-1)
    nll = -_pick(jnp.where(valid, sums("logps", logps), 0), _first(valid))
    squared = jnp.square(valid.sum(-1) - 1).astype(nll.dtype)
    return Terms({"ranking": Term(ranking), "nll": Term(squared * nll, valid.any(-1), scale=sft_weight)})


_CONSTRAINTS = ("none", "detached", "boundary")


def _align(mean: jax.Array, better: jax.Array, lowest: jax.Array, beta: Any, constraint: str) -> jax.Array:
    """log(1 + sum over `better` (row p over column q) of e^(s_q - s_p) and the boundary's terms), [B].

    lowest: [B, K], for each q the lowest s among those better than q.
    """
    if constraint not in _CONSTRAINTS:
        raise ConfigError(f"aft: constraint = {constraint!r}; allowed: {', '.join(_CONSTRAINTS)}")
    good, bad = mean[:, :, None], mean[:, None, :]
    parts = [(jax.lax.stop_gradient(bad) if constraint == "detached" else bad) - good]
    if constraint == "boundary":
        parts.append(jax.lax.stop_gradient(2 * (lowest[:, None, :] - beta) - good) - bad)
    size = mean.shape[0]
    exponents = jnp.concatenate([jnp.zeros((size, 1), mean.dtype)] + [p.reshape(size, -1) for p in parts], -1)
    live = jnp.concatenate([jnp.ones((size, 1), bool)] + [better.reshape(size, -1)] * len(parts), -1)
    return jax.nn.logsumexp(jnp.where(live, exponents, 0), axis=-1, where=live)


def _lowest(mean: jax.Array, better: jax.Array) -> jax.Array:
    """[B, K]: for each column of `better`, the lowest s of the rows above it; 0 where there is none."""
    least = jnp.min(jnp.where(better, mean[:, :, None], jnp.inf), axis=1)
    return jax.lax.stop_gradient(jnp.where(better.any(1), least, 0))


@method(id="aft", system="Alignment fine-tuning with constraint alignment loss", arxiv="2309.02144",
        fidelity="reconstruction")
def aft(logps: Array, lengths: Array, labels: Array, valid: Array, *, beta: Any = 0.15, constraint: str = "boundary",
        sft_weight: Any = 1.0) -> Terms:
    """Alignment fine-tuning on right (label 1, p) and wrong (label 0, q) answers, s = S / n:

    none: log(1 + sum_pq e^(s_q - s_p)); detached: s_q without gradient;
    boundary: log(1 + sum_pq [e^(s_q - s_p) + e^(T_p - s_q)]), T_p = sg[2 (min_p s_p - beta) - s_p], which holds a
    wrong answer at beta below the worst right one.

    All arrays [B, K]; constraint is static. Two terms by pairs (one value per prompt): `alignment`, and `nll` = -S /
    n of the first right answer, which stands for the reference solution, with scale sft_weight, over the prompts that
    have one. An empty group gives alignment 0. Source: arXiv 2309.02144 through a full summary (the text itself could
    not be read); the constancy of T and the default of beta are ours.
    """
    valid = jnp.asarray(valid, bool)
    right = valid & (floats(labels) > 0.5)
    mean = _means(logps, lengths, valid)
    better = right[:, :, None] & (valid & ~right)[:, None, :]
    alignment = _align(mean, better, _lowest(mean, better), beta, constraint)
    nll = Term(-_pick(mean, _first(right)), right.any(-1), scale=sft_weight)
    return Terms({"alignment": Term(alignment, valid.any(-1)), "nll": nll})


@method(id="aft:ranking", system="Alignment fine-tuning, ranking form", arxiv="2309.02144", fidelity="reconstruction")
def aft_ranking(logps: Array, lengths: Array, scores: Array, valid: Array, *, beta: Any = 0.15,
                constraint: str = "boundary", sft_weight: Any = 1.0) -> Terms:
    """Alignment fine-tuning on a ranking: log(1 + sum over i better than j of [e^(s_j - s_i) + e^(T_ij - s_j)]).

    T_ij = sg[2 (s_j* - beta) - s_i], s_j* the lowest s among the answers better than j; better means a strictly
    higher score. Terms, constraint, shapes and source as `aft`; `nll` is of the first answer with the highest score.
    """
    valid = jnp.asarray(valid, bool)
    mean, score = _means(logps, lengths, valid), _constants(scores, valid)
    better = _better(score, valid)
    alignment = _align(mean, better, _lowest(mean, better), beta, constraint)
    best = _first(valid & (score == jnp.max(score, -1, where=valid, initial=-jnp.inf, keepdims=True)))
    nll = Term(-_pick(mean, best), valid.any(-1), scale=sft_weight)
    return Terms({"alignment": Term(alignment, valid.any(-1)), "nll": nll})
