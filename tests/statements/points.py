"""Statements of the pointwise losses: a label or a score for each completion."""

import math

from statements.base import (
    completions,
    existing,
    hold,
    log_sum_exp,
    lr,
    mean,
    ratios,
    relu,
    sigmoid,
    softmax,
    sp,
    states,
)


@states("kto", "multi_turn_dpo:kto")
def kto(x, beta, desirable_weight, undesirable_weight):
    """lam_D (1 - sigma(beta (lr - z0))) or lam_U (1 - sigma(beta (z0 - lr))), z0 clamped after the mean."""
    z0 = relu(mean(x.kl_logps[b, k] - x.kl_ref_logps[b, k] for b, k in completions(x)))
    total = []
    for b, k in completions(x):
        if x.labels[b, k] > 0.5:
            total.append(desirable_weight * (1 - sigmoid(beta * (lr(x, b, k) - z0))))
        else:
            total.append(undesirable_weight * (1 - sigmoid(beta * (z0 - lr(x, b, k)))))
    return mean(total)


@states("apo:zero_unpaired")
def apo_zero_unpaired(x, beta):
    """1 - sigma(beta lr) on good, sigma(beta lr) on bad completions."""
    return mean(1 - sigmoid(beta * lr(x, b, k)) if x.labels[b, k] > 0.5 else sigmoid(beta * lr(x, b, k))
                for b, k in completions(x))


def shift(state, good, bad, pooled=False):
    """(delta, state) after rewards of good and of bad completions: half the sum of the running class means."""
    after = {"good_sum": float(state["good_sum"]) + sum(good), "good_count": float(state["good_count"]) + len(good),
             "bad_sum": float(state["bad_sum"]) + sum(bad), "bad_count": float(state["bad_count"]) + len(bad)}
    groups = [(after["good_sum"], after["good_count"]), (after["bad_sum"], after["bad_count"])]
    if pooled:
        groups = [(groups[0][0] + groups[1][0], groups[0][1] + groups[1][1])]
    return mean(total / count for total, count in groups if count), after


@states("bco")
def bco(x, beta, low_weight, high_weight, pooled):
    """sp(-(r - delta)) on good, q sp(r - delta) on bad completions, r = beta lr."""
    good = [beta * lr(x.sg, b, k) for b, k in completions(x) if x.labels[b, k] > 0.5]
    bad = [beta * lr(x.sg, b, k) for b, k in completions(x) if x.labels[b, k] <= 0.5]
    delta, state = shift(x.state, good, bad, pooled)
    total = []
    for b, k in completions(x):
        r = beta * lr(x, b, k)
        q = hold(x.weights[b], low_weight, high_weight)
        total.append(sp(-(r - delta)) if x.labels[b, k] > 0.5 else q * sp(r - delta))
    return mean(total), state


@states("mpo_mixed_loss")
def mpo_mixed_loss(x, beta, preference_weight, quality_weight, generation_weight, shift, nll):
    """w_p L_DPO + w_q (BCO of both) + w_g NLL(y_w)."""
    delta, state = running_shift(x.state, [beta * w for w, _ in ratios(x.sg)], [beta * lo for _, lo in ratios(x.sg)])
    delta = delta if shift == "running" else 0.0
    preference = mean(sp(-beta * (w - lo)) for w, lo in ratios(x))
    quality = mean(sp(-(beta * w - delta)) + sp(beta * lo - delta) for w, lo in ratios(x))
    if nll == "average":
        generation = mean(-s[0] / n[0] for s, n in zip(x.logps, x.lengths, strict=True))
    else:
        generation = -sum(s[0] for s in x.logps) / sum(n[0] for n in x.lengths)
    return preference_weight * preference + quality_weight * quality + generation_weight * generation, state


running_shift = shift


@states("nca")
def nca(x, beta, alpha):
    """sum_i [q_i sp(-r_i) + (1/K) sp(r_i)], q = softmax(s/alpha)."""
    total = []
    for b in range(len(x.valid)):
        there = existing(x, b)
        q = softmax(x.scores[b, k] / alpha for k in there)
        r = [beta * lr(x, b, k) for k in there]
        total.append(sum(q_i * sp(-r_i) + sp(r_i) / len(there) for q_i, r_i in zip(q, r, strict=True)))
    return mean(total)


@states("nca:info")
def info_nca(x, beta, alpha):
    """-sum_i q_i log softmax(r)_i."""
    total = []
    for b in range(len(x.valid)):
        there = existing(x, b)
        q = softmax(x.scores[b, k] / alpha for k in there)
        r = [beta * lr(x, b, k) for k in there]
        total.append(-sum(q_i * (r_i - log_sum_exp(r)) for q_i, r_i in zip(q, r, strict=True)))
    return mean(total)


@states("sppo")
def sppo(x, beta, win_rates):
    """(lr - (P - 1/2)/beta)^2 by completion; P given, or the mean of sigma(s_i - s_j) over the list."""
    total = []
    for b, k in completions(x):
        p = x.scores[b, k]
        if win_rates != "given":
            others = [j for j in existing(x, b) if win_rates == "list" or j != k]
            p = mean(sigmoid(x.scores[b, k] - x.scores[b, j]) for j in others) if others else 0.5
        total.append((lr(x, b, k) - (p - 0.5) / beta) ** 2)
    return mean(total)


@states("implicit_prm")
def implicit_prm(x, beta):
    """-[c log sigma(r) + (1-c) log(1 - sigma(r))], r = beta lr."""
    total = []
    for b, k in completions(x):
        r, c = beta * lr(x, b, k), x.labels[b, k]
        total.append(-(c * math.log(sigmoid(r)) + (1 - c) * math.log(sigmoid(-r))))
    return mean(total)


def advantage_of(x, b, k, advantage):
    """max(0, R - V(x)) under sg, or max(0, R)."""
    return relu(x.scores[b, k] - (x.sg.prompt_values[b] if advantage == "value" else 0.0))


def value_error(x):
    """mean of (V(x) - R)^2."""
    return mean((x.prompt_values[b] - x.scores[b, k]) ** 2 for b, k in completions(x))


@states("a_lol")
def a_lol(x, eps, value_weight, advantage):
    """-A sg[clip(pi/pi_ref, 1-eps, 1+eps)] log pi(y)."""
    policy = mean(-advantage_of(x, b, k, advantage) * hold(math.exp(lr(x.sg, b, k)), 1 - eps, 1 + eps) * x.logps[b, k]
                  for b, k in completions(x))
    return policy + value_weight * value_error(x)


@states("a_lol:ref_free")
def a_lol_ref_free(x, value_weight, advantage):
    """-A log pi(y)."""
    return (mean(-advantage_of(x, b, k, advantage) * x.logps[b, k] for b, k in completions(x))
            + value_weight * value_error(x))


@states("a_lol:kl")
def a_lol_kl(x, kappa, value_weight, advantage):
    """-A log pi(y) + kappa (log pi(y) - log pi_ref(y))."""
    return (mean(-advantage_of(x, b, k, advantage) * x.logps[b, k] + kappa * lr(x, b, k) for b, k in completions(x))
            + value_weight * value_error(x))
