"""Statements of the unlearning losses: label 0 is to be forgotten, label 1 retained."""

import math

from statements.base import completions, live, lr, mean, sp, states


def forget(x):
    """(b, k) to be forgotten."""
    return [(b, k) for b, k in completions(x) if x.labels[b, k] <= 0.5]


def retain(x):
    """(b, k) to be kept."""
    return [(b, k) for b, k in completions(x) if x.labels[b, k] > 0.5]


def nll(x, which):
    """NLL_tok: -(sum of S) / (sum of n) over these completions."""
    return -sum(x.logps[b, k] for b, k in which) / sum(x.lengths[b, k] for b, k in which) if which else 0.0


def token_nll(x, which):
    """The same from token log-probs."""
    return mean(-x.token_logps[b, k, t] for b, k in which for t in live(x, b, k))


@states("npo")
def npo(x, beta, forget_weight, retain_weight):
    """a (2/beta) mean sp(beta lr) + b NLL_tok(retain)."""
    return (forget_weight * 2 / beta * mean(sp(beta * lr(x, b, k)) for b, k in forget(x))
            + retain_weight * nll(x, retain(x)))


@states("simnpo")
def simnpo(x, beta, delta, forget_weight, retain_weight):
    """a (2/beta) mean sp(-beta (-S/n - delta)) + b NLL_tok(retain)."""
    return (forget_weight * 2 / beta
            * mean(sp(-beta * (-x.logps[b, k] / x.lengths[b, k] - delta)) for b, k in forget(x))
            + retain_weight * nll(x, retain(x)))


@states("grad_diff")
def grad_diff(x, forget_weight, retain_weight):
    """-a NLL_tok(forget) + b NLL_tok(retain)."""
    return -forget_weight * nll(x, forget(x)) + retain_weight * nll(x, retain(x))


@states("grad_diff:kl")
def grad_diff_kl(x, forget_weight, retain_weight):
    """-a NLL_tok(forget) + b mean of KL(pi_ref || pi) over retain tokens."""
    kl = mean(x.ref_policy_kl[b, k, t] for b, k in retain(x) for t in live(x, b, k))
    return -forget_weight * token_nll(x, forget(x)) + retain_weight * kl


def unlikely(logp, clamp):
    """-log(1 - pi), 1 - pi held at the clamp."""
    return -math.log(max(-math.expm1(logp), clamp))


@states("unlikelihood")
def unlikelihood(x, alpha, clamp):
    """NLL on desirable tokens, -alpha log(1 - pi(y_t)) on the others, each divided by its token count."""
    penalty = mean(unlikely(x.token_logps[b, k, t], clamp) for b, k in forget(x) for t in live(x, b, k))
    return token_nll(x, retain(x)) + alpha * penalty


@states("unlikelihood:token")
def unlikelihood_token(x, alpha, clamp, window):
    """-log pi(y_t) + alpha sum over c in C_t of -log(1 - pi(c)), C_t the earlier tokens less y_t."""
    total = []
    for b, k in completions(x):
        for t in live(x, b, k):
            candidates = {}
            for j in live(x, b, k):
                if j < t and (window == 0 or t - j <= window) and x.targets[b, k, j] != x.targets[b, k, t]:
                    candidates[int(x.targets[b, k, j])] = x.candidate_logps[b, k, t, j]
            total.append(-x.token_logps[b, k, t] + alpha * sum(unlikely(c, clamp) for c in candidates.values()))
    return mean(total)


@states("unlikelihood:sequence")
def unlikelihood_sequence(x, clamp, ngram):
    """-log(1 - pi(y_t)) on tokens of n-grams that stood before, divided by all tokens.

    An n-gram is n tokens side by side that are all scored; it does not reach over what others wrote.
    """
    total = []
    for b, k in completions(x):
        slots = live(x, b, k)
        grams = [range(t, t + ngram) for t in slots if all(s in slots for s in range(t, t + ngram))]
        words = [[int(x.targets[b, k, t]) for t in gram] for gram in grams]
        repeated = {t for n, gram in enumerate(grams) if words[n] in words[:n] for t in gram}
        total += [unlikely(x.token_logps[b, k, t], clamp) if t in repeated else 0.0 for t in slots]
    return mean(total)
