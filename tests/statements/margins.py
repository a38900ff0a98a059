"""Statements of pair losses with a margin, a weight between pairs, or a judge of the labels."""

import math

import numpy as np

from statements.base import cosine, gaps, mean, ratios, relu, sigmoid, softmax, sp, states


@states("rdpo_refined")
def rdpo_refined(x, beta, c, form):
    """sp(-(beta Delta - c (s_r - s_o))); or DPO on the pairs in the order of the scores."""
    total = []
    for d, (s_r, s_o) in zip(gaps(x), x.scores, strict=True):
        if form == "offset":
            total.append(sp(-(beta * d - c * (s_r - s_o))))
        elif s_r > s_o:
            total.append(sp(-beta * d))
        elif s_r < s_o and form == "relabel":
            total.append(sp(beta * d))
    return mean(total)


@states("sequential_po")
def sequential_po(x, beta, lam):
    """sp(-(beta Delta - lambda m)), m the earlier stages' margin."""
    return mean(sp(-(beta * d - lam * m)) for d, m in zip(gaps(x), x.margins, strict=True))


def quality_gaps(x):
    """Delta of the same completions under the quality prompt."""
    return [(s[0] - r[0]) - (s[1] - r[1]) for s, r in zip(x.aux_prompt_logps, x.aux_prompt_ref_logps, strict=True)]


@states("sr_dpo")
def sr_dpo(x, beta, lam):
    """sp(-(beta Delta - lambda sg[Delta_pi])), Delta_pi = beta times the gap under the quality prompt."""
    return mean(sp(-(beta * d - lam * beta * q)) for d, q in zip(gaps(x), quality_gaps(x.sg), strict=True))


@states("sr_dpo:ipo")
def sr_ipo(x, beta, lam):
    """(Delta - lambda sg[Delta_pi] - 1/(2 beta))^2."""
    return mean((d - lam * beta * q - 1 / (2 * beta)) ** 2 for d, q in zip(gaps(x), quality_gaps(x.sg), strict=True))


@states("lcpo")
def lcpo(x, beta, tau, gamma, lam, rate, base, drop_normaliser):
    """-[w log p + (1-w) log(1-p)], p = sigma(L(l>w) - L(w>l)), w = sg of the label's posterior; then eta."""
    def base_loss(y, b, w, lo):
        if base == "dpo":
            return sp(-beta * ((y.logps[b, w] - y.ref_logps[b, w]) - (y.logps[b, lo] - y.ref_logps[b, lo])))
        if base == "ipo":
            gap = (y.logps[b, w] - y.ref_logps[b, w]) - (y.logps[b, lo] - y.ref_logps[b, lo])
            return (gap - 1 / (2 * tau)) ** 2
        if base == "simpo":
            return sp(-(beta * y.logps[b, w] / y.lengths[b, w] - beta * y.logps[b, lo] / y.lengths[b, lo] - gamma))
        return sp(-beta * (y.logps[b, w] - y.logps[b, lo])) - lam * y.logps[b, w]

    total, sure = [], {}
    for b, who in enumerate(x.annotator):
        right, wrong = base_loss(x, b, 0, 1), base_loss(x, b, 1, 0)
        p = sigmoid(base_loss(x.sg, b, 1, 0) - base_loss(x.sg, b, 0, 1))
        eta = float(x.state["eta"][who])
        w = p * eta / (p * eta + (1 - p) * (1 - eta))
        sure.setdefault(int(who), []).append(w)
        if drop_normaliser:
            total.append(w * right + (1 - w) * wrong)
        else:
            total.append(w * sp(right - wrong) + (1 - w) * sp(wrong - right))
    after = np.array(x.state["eta"], np.float64)
    for who, found in sure.items():
        after[who] = (1 - rate) * after[who] + rate * mean(found)
    return mean(total), {"eta": after}


@states("relative_po")
def relative_po(x, beta, tau, alpha, weighting):
    """(1/(MN)) sum_ij sp(-omega_ij beta (lr_w,i - lr_l,j)); diagonal_loss weighs the losses instead."""
    size, pair = len(x.logps), ratios(x)
    total = 0.0
    for i in range(size):
        near = softmax(-(1 - cosine(x.prompt_embedding[i], x.prompt_embedding[j])) / tau for j in range(size))
        for j in range(size):
            m = beta * (pair[i][0] - pair[j][1])
            aside = alpha if i == j else (1 - alpha) / (size - 1)
            if weighting == "diagonal_loss":
                total += aside * sp(-m) / size
            else:
                omega = {"embedding": near[j], "uniform": 1 / size, "diagonal": aside}[weighting]
                total += sp(-omega * m) / (size * size)
    return total


@states("bt_rm")
def bt_rm(x, margin_weight, centering):
    """-log sigma(r_w - r_l - c m) + centering (r_w + r_l)^2."""
    return mean(sp(-(w - lo - margin_weight * m)) + centering * (w + lo) ** 2
                for (w, lo), m in zip(x.rewards, x.margins, strict=True))


@states("svpo")
def svpo(x, beta, value_weight, margin_weight, margin, link):
    """Step DPO + MSE of V = tanh to Q over both siblings + a margin between their values."""
    total = []
    for d, heads, (q_w, q_l) in zip(gaps(x), x.rewards, x.scores, strict=True):
        v_w, v_l = math.tanh(heads[0]), math.tanh(heads[1])
        slack = margin - (v_w - v_l)
        total.append(sp(-beta * d) + value_weight * ((v_w - q_w) ** 2 + (v_l - q_l) ** 2) / 2
                     + margin_weight * (relu(slack) if link == "hinge" else sp(slack)))
    return mean(total)
