"""Statements of the pair losses that weigh, choose or clip single tokens."""

import math

from statements.base import hold, live, mean, sp, states, token_lr


def pairs(x):
    """The numbers of the pairs."""
    return range(x.mask.shape[0])


def logistic_of(x, beta, reward):
    """mean sp(-beta (reward(b, 0) - reward(b, 1)))."""
    return mean(sp(-beta * (reward(b, 0) - reward(b, 1))) for b in pairs(x))


def summed(x, b, k, slots=None):
    """l(y): the sum of l_t over the given slots, all scored ones by default."""
    return sum(token_lr(x, b, k, t) for t in (live(x, b, k) if slots is None else slots))


def sequence_kl(x, b, k):
    """SeqKL = sum of KL_t."""
    return sum(x.ref_policy_kl[b, k, t] for t in live(x, b, k))


@states("ld_dpo")
def ld_dpo(x, beta, alpha):
    """S^a = the first min(n_w, n_l) tokens + a times the tail, for both models."""
    def reward(b, k):
        first = min(len(live(x, b, 0)), len(live(x, b, 1)))
        slots = live(x, b, k)
        return summed(x, b, k, slots[:first]) + alpha * summed(x, b, k, slots[first:])

    return logistic_of(x, beta, reward)


def sampled(x, b, beta, kept, ref_kept):
    """sp(-beta gap) of pair b over the drawn positions: kept[k] of the policy, ref_kept[k] of the reference."""
    policy = [sum(x.token_logps[b, k, t] for t in kept[k]) for k in (0, 1)]
    reference = [sum(x.ref_token_logps[b, k, t] for t in ref_kept[k]) for k in (0, 1)]
    return sp(-beta * ((policy[0] - reference[0]) - (policy[1] - reference[1])))


@states("sampo")
def sampo(x, beta, independent):
    """DPO over min(n_w, n_l) drawn positions; stated where nothing is left to draw, as both are equally long."""
    del independent
    total = []
    for b in pairs(x):
        kept = [live(x, b, 0), live(x, b, 1)]
        assert len(kept[0]) == len(kept[1])
        total.append(sampled(x, b, beta, kept, kept))
    return mean(total)


def unsure(x, b, k):
    """The tokens whose log-prob is below tau = log of the mean token probability."""
    slots = live(x, b, k)
    tau = math.log(mean(math.exp(x.sg.token_logps[b, k, t]) for t in slots))
    return [t for t in slots if x.sg.token_logps[b, k, t] < tau]


@states("conf_po")
def conf_po(x, beta, gamma):
    """sp(-(beta (mean over unsure tokens of y_w, less that of y_l) - gamma)); 0 where a response has none."""
    total = []
    for b in pairs(x):
        kept = [unsure(x, b, k) for k in (0, 1)]
        if kept[0] and kept[1]:
            c_w, c_l = (mean(x.token_logps[b, k, t] for t in kept[k]) for k in (0, 1))
            total.append(sp(-(beta * (c_w - c_l) - gamma)))
        else:
            total.append(0.0)
    return mean(total)


@states("conf_po:dpo")
def conf_po_dpo(x, beta):
    """DPO on the sums over unsure tokens; 0 where a response has none."""
    total = []
    for b in pairs(x):
        kept = [unsure(x, b, k) for k in (0, 1)]
        both = kept[0] and kept[1]
        total.append(sp(-beta * (summed(x, b, 0, kept[0]) - summed(x, b, 1, kept[1]))) if both else 0.0)
    return mean(total)


@states("humanline")
def humanline(x, beta, log_low, log_high):
    """DPO on sums of l_t clipped to [log_low, log_high]."""
    return logistic_of(x, beta, lambda b, k: sum(hold(token_lr(x, b, k, t), log_low, log_high) for t in live(x, b, k)))


@states("prior_exam_suppression")
def prior_exam_suppression(x, beta, gamma):
    """DPO on sums of [u_t + gamma (1 - u_t)] l_t, u = diff."""
    return logistic_of(x, beta, lambda b, k: sum((1.0 if x.diff[b, k, t] else gamma) * token_lr(x, b, k, t)
                                                 for t in live(x, b, k)))


@states("tdpo")
def tdpo(x, beta, alpha):
    """-log sigma(beta (u - alpha [SeqKL(y_l) - sg[SeqKL(y_w)]]))."""
    return mean(sp(-beta * (summed(x, b, 0) - summed(x, b, 1) - alpha * (sequence_kl(x, b, 1)
                                                                         - sequence_kl(x.sg, b, 0))))
                for b in pairs(x))


@states("tdpo:tdpo1")
def tdpo1(x, beta):
    """-log sigma(beta (u - [SeqKL(y_l) - SeqKL(y_w)]))."""
    return mean(sp(-beta * (summed(x, b, 0) - summed(x, b, 1) - (sequence_kl(x, b, 1) - sequence_kl(x, b, 0))))
                for b in pairs(x))


def masked_tdpo(x, beta, m_u, m_d):
    """-log sigma(beta (u - d)) with l_t weighed by m_u and KL_t by m_d, both [B, 2, L]."""
    def u(b, k):
        return sum(m_u[b, k, t] * token_lr(x, b, k, t) for t in live(x, b, k))

    def d(b, k):
        return sum(m_d[b, k, t] * x.ref_policy_kl[b, k, t] for t in live(x, b, k))

    return mean(sp(-beta * ((u(b, 0) - u(b, 1)) - (d(b, 1) - d(b, 0)))) for b in pairs(x))


def size_of(x, m):
    """mean over pairs of sum_t |m(t)| on both responses."""
    return mean(sum(abs(m[b, k, t]) for k in (0, 1) for t in live(x, b, k)) for b in pairs(x))


@states("sparse_po")
def sparse_po(x, beta, reward_l1, kl_l1):
    """Two learned masks, each with its L1 size."""
    return (masked_tdpo(x, beta, x.reward_mask, x.kl_mask) + reward_l1 * size_of(x, x.reward_mask)
            + kl_l1 * size_of(x, x.kl_mask))


@states("sparse_po:common")
def sparse_po_common(x, beta, l1):
    """One learned mask for both; its size counts once."""
    return masked_tdpo(x, beta, x.reward_mask, x.reward_mask) + l1 * size_of(x, x.reward_mask)


@states("sparse_po:mapo")
def sparse_po_mapo(x, beta):
    """One constant mask."""
    return masked_tdpo(x, beta, x.activation_mask, x.activation_mask)


@states("bmc")
def bmc(x, beta, delta, ref_weights):
    """DPO on sums of lam_t l_t, lam = 1 + min(sg[1/pi], delta) on tokens of the diff."""
    def lam(logp, b, k, t):
        return 1 + min(math.exp(-logp), delta) if x.diff[b, k, t] else 1.0

    def reward(b, k):
        total = 0.0
        for t in live(x, b, k):
            own = lam(x.sg.token_logps[b, k, t], b, k, t)
            other = own if ref_weights == "policy" else lam(x.ref_token_logps[b, k, t], b, k, t)
            total += own * x.token_logps[b, k, t] - other * x.ref_token_logps[b, k, t]
        return total

    return logistic_of(x, beta, reward)


def discounted(x, b, k, gamma, reference):
    """sum_t gamma^t of log pi, or of log pi - log pi_ref, t counting the steps of the segment."""
    return sum(gamma**n * (token_lr(x, b, k, t) if reference else x.token_logps[b, k, t])
               for n, t in enumerate(live(x, b, k)))


def contrastive(x, alpha, lam, gamma, bc_weight, reference):
    """v sp(-(A_0 - lam A_1)) + (1 - v) sp(-(A_1 - lam A_0)) + c mean of -log pi over all steps."""
    total, cloning = [], []
    for b in pairs(x):
        a_0, a_1 = (alpha * discounted(x, b, k, gamma, reference) for k in (0, 1))
        v = (1 + x.labels[b, 0] - x.labels[b, 1]) / 2
        total.append(v * sp(-(a_0 - lam * a_1)) + (1 - v) * sp(-(a_1 - lam * a_0)))
        cloning += [-x.token_logps[b, k, t] for k in (0, 1) for t in live(x, b, k)]
    return mean(total) + bc_weight * mean(cloning)


@states("cpl")
def cpl(x, alpha, lam, gamma, bc_weight):
    """A = alpha sum_t gamma^t log pi."""
    return contrastive(x, alpha, lam, gamma, bc_weight, reference=False)


@states("cpl:kl")
def cpl_kl(x, alpha, lam, gamma, bc_weight):
    """A = alpha sum_t gamma^t (log pi - log pi_ref)."""
    return contrastive(x, alpha, lam, gamma, bc_weight, reference=True)


@states("d3po")
def d3po(x, beta, clip, form):
    """Mean over the common steps of sp(-beta h (c_t^0 - c_t^1)); or one logistic of the unclipped sums."""
    total = []
    for b in pairs(x):
        h = (x.labels[b, 0] > x.labels[b, 1]) * 1 - (x.labels[b, 0] < x.labels[b, 1]) * 1
        if form == "trajectory":
            total.append(sp(-beta * h * (summed(x, b, 0) - summed(x, b, 1))))
            continue
        steps = []
        for t in range(x.mask.shape[2]):
            if x.mask[b, 0, t] and x.mask[b, 1, t]:
                c_0, c_1 = (hold(token_lr(x, b, k, t), math.log(1 - clip), math.log(1 + clip)) for k in (0, 1))
                steps.append(sp(-beta * h * (c_0 - c_1)))
        total += [mean(steps)] if steps else []
    return mean(total)
