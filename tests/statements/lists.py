"""Statements of the listwise losses: K completions of a prompt, ranked or scored."""

import math

from statements.base import existing, log_sum_exp, lr, mean, relu, sigmoid, softmax, sp, states


def prompts(x):
    """(b, the completions of prompt b that exist)."""
    return [(b, existing(x, b)) for b in range(len(x.valid))]


def plackett_luce(r):
    """-sum over k < K of log(e^{r_k} / sum over j >= k of e^{r_j}), r best first."""
    return sum(log_sum_exp(r[k:]) - r[k] for k in range(len(r) - 1))


@states("pl_dpo")
def pl_dpo(x, beta):
    """Plackett-Luce of beta lr, best first."""
    return mean(plackett_luce([beta * lr(x, b, k) for k in there]) for b, there in prompts(x))


@states("exo:list")
def exo_list(x, beta, score_beta):
    """sum_i p_f (log p_f - log p_r), p_f = softmax(beta lr), p_r = softmax(s/beta_r)."""
    total = []
    for b, there in prompts(x):
        p_f = softmax(beta * lr(x, b, k) for k in there)
        p_r = softmax(x.scores[b, k] / score_beta for k in there)
        total.append(sum(f * (math.log(f) - math.log(r)) for f, r in zip(p_f, p_r, strict=True)))
    return mean(total)


def ranks(s):
    """1 for the largest of a list, 2 for the next, ..."""
    order = sorted(range(len(s)), key=lambda i: -s[i])
    return [order.index(i) + 1 for i in range(len(s))]


@states("lipo")
def lipo(x, beta, member, rax_reduction):
    """Learning to rank with s = beta lr and labels psi."""
    total, compared = [], 0
    for b, there in prompts(x):
        s = [beta * lr(x, b, k) for k in there]
        psi = [x.scores[b, k] for k in there]
        rank = ranks([beta * lr(x.sg, b, k) for k in there])
        pairs = [(i, j) for i in range(len(s)) for j in range(len(s)) if psi[i] > psi[j]]
        compared += len(pairs)
        base = math.log(2) if rax_reduction else 1.0

        def weight(i, j, psi=psi, rank=rank, base=base):
            gain = abs((2 ** psi[i] - 1) - (2 ** psi[j] - 1))
            return gain * abs(base / math.log(1 + rank[i]) - base / math.log(1 + rank[j]))

        if member == "lambda":
            size = len(s) if rax_reduction else 1
            total.append(sum(size * weight(i, j) * sp(-(s[i] - s[j])) for i, j in pairs))
        elif member == "pair_logistic":
            total.append(sum(sp(-(s[i] - s[j])) for i, j in pairs))
        elif member == "pair_hinge":
            total.append(sum(relu(1 - (s[i] - s[j])) for i, j in pairs))
        elif member == "list_mle":
            total.append(plackett_luce([s[i] for i in sorted(range(len(s)), key=lambda i: -psi[i])]))
        elif member == "softmax":
            total.append(-sum(p / sum(psi) * (v - log_sum_exp(s)) for p, v in zip(psi, s, strict=True)))
        elif member == "point_mse":
            total.append(sum((p - v) ** 2 for p, v in zip(psi, s, strict=True)))
        else:
            assert member == "point_sigmoid"
            total.append(-sum(p * math.log(sigmoid(v)) + (1 - p) * math.log(sigmoid(-v))
                              for p, v in zip(psi, s, strict=True)))
    return sum(total) / compared if rax_reduction else mean(total)


@states("rrhf")
def rrhf(x, rank_weight, length_power, nll):
    """w sum over r_i < r_j of relu(s_i - s_j) - S of the best, s = S/n^lp."""
    total = []
    for b, there in prompts(x):
        s = {k: x.logps[b, k] / x.lengths[b, k] ** length_power for k in there}
        rank = sum(relu(s[i] - s[j]) for i in there for j in there if x.scores[b, i] < x.scores[b, j])
        best = max(there, key=lambda k: x.scores[b, k])
        likelihood = -x.logps[b, best] / (x.lengths[b, best] if nll == "average" else 1)
        total.append(rank_weight * rank + likelihood)
    return mean(total)


@states("pro")
def pro(x, sft_weight):
    """sum_k -log[e^{s_k g_k} / (e^{s_k g_k} + sum_{i>k} e^{s_i g_i})] + c (K-1)^2 (-S of the first)."""
    total = []
    for b, there in prompts(x):
        s = [x.logps[b, k] / x.lengths[b, k] for k in there]
        score = [x.scores[b, k] for k in there]
        ranking = 0.0
        for k in range(len(s) - 1):
            after = range(k + 1, len(s))
            g_k = max(score[k] - score[i] for i in after)
            ranking += log_sum_exp([s[k] * g_k] + [s[i] * (score[k] - score[i]) for i in after]) - s[k] * g_k
        total.append(ranking + sft_weight * (len(s) - 1) ** 2 * -x.logps[b, there[0]])
    return mean(total)


def aligned(s, fixed, better, beta, constraint):
    """log(1 + sum over (i better than j) of [e^(s_j - s_i) + e^(T_ij - s_j)]).

    s, fixed: mean log-probs, moving and under stop-gradient; better: j -> the completions better than j.
    """
    total = 1.0
    for j, above in better.items():
        for i in above:
            total += math.exp((fixed[j] if constraint == "detached" else s[j]) - s[i])
            if constraint == "boundary":
                lowest = min(fixed[a] for a in above)
                total += math.exp(2 * (lowest - beta) - fixed[i] - s[j])
    return math.log(total)


def aft_total(x, better_than, reference, beta, constraint, sft_weight):
    """Mean over prompts of the alignment + the mean of -S/n over the reference solutions that there are."""
    total, references = [], []
    for b, there in prompts(x):
        s, fixed = ({k: y.logps[b, k] / y.lengths[b, k] for k in there} for y in (x, x.sg))
        better = {j: [i for i in there if better_than(b, i, j)] for j in there}
        total.append(aligned(s, fixed, {j: above for j, above in better.items() if above}, beta, constraint))
        best = reference(b, there)
        references += [] if best is None else [-s[best]]
    return mean(total) + sft_weight * mean(references)


@states("aft")
def aft(x, beta, constraint, sft_weight):
    """Right answers (label 1) against wrong ones; SFT on the first right one."""
    def right(b, k):
        return x.labels[b, k] > 0.5

    return aft_total(x, lambda b, i, j: right(b, i) and not right(b, j),
                     lambda b, there: next((k for k in there if right(b, k)), None), beta, constraint, sft_weight)


@states("aft:ranking")
def aft_ranking(x, beta, constraint, sft_weight):
    """Every completion against those with a strictly lower score; SFT on the best."""
    return aft_total(x, lambda b, i, j: x.scores[b, i] > x.scores[b, j],
                     lambda b, there: max(there, key=lambda k: x.scores[b, k]), beta, constraint, sft_weight)


@states("bt_rm:list")
def bt_rm_list(x, margin_weight, centering, flat):
    """Mean over a prompt's strictly ordered pairs, then over prompts that have some; flat: over all pairs."""
    each = []
    for b, there in prompts(x):
        each.append([sp(-(x.rewards[b, w] - x.rewards[b, lo] - margin_weight * (x.scores[b, w] - x.scores[b, lo])))
                     + centering * (x.rewards[b, w] + x.rewards[b, lo]) ** 2
                     for w in there for lo in there if x.scores[b, w] > x.scores[b, lo]])
    return mean(v for values in each for v in values) if flat else mean(mean(values) for values in each if values)


@states("prdp")
def prdp(x, beta, clip, time_reduce, skip_ties):
    """max(l, l^c), l = ((h_a - h_b) - (r_a - r_b)/beta)^2; mean over a prompt's pairs, then over prompts."""
    def ratio(b, k, clipped):
        total = []
        for t in range(x.mask.shape[2]):
            if x.mask[b, k, t]:
                h = x.token_logps[b, k, t] - x.ref_token_logps[b, k, t]
                old = x.old_token_logps[b, k, t] - x.ref_token_logps[b, k, t]
                total.append(min(max(h, old - clip), old + clip) if clipped else h)
        return mean(total) if time_reduce == "mean" else sum(total)

    each = []
    for b, there in prompts(x):
        values = []
        for a in there:
            for c in there:
                if a < c and not (skip_ties and x.scores[b, a] == x.scores[b, c]):
                    target = (x.scores[b, a] - x.scores[b, c]) / beta
                    values.append(max((ratio(b, a, clipped) - ratio(b, c, clipped) - target) ** 2
                                      for clipped in (False, True)))
        each.append(values)
    return mean(mean(values) for values in each if values)
