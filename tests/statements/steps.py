"""Statements of the losses on steps and turns."""

import math

from statements.base import completions, cosine, existing, live, mean, sp, states
from statements.lists import ranks
from statements.tokens import logistic_of, pairs, summed


def by_step(x, b, k):
    """Step number -> its scored slots, in order of the numbers; tokens outside steps are in none."""
    found = {}
    for t in live(x, b, k):
        if x.steps[b, k, t] >= 0:
            found.setdefault(int(x.steps[b, k, t]), []).append(t)
    return dict(sorted(found.items()))


def texts(x, b, k):
    """The tokens of each step."""
    return {step: [int(x.targets[b, k, t]) for t in slots] for step, slots in by_step(x, b, k).items()}


def shared_steps(x, b):
    """How many leading steps of the two responses are the same."""
    one, two = list(texts(x, b, 0).values()), list(texts(x, b, 1).values())
    count = 0
    while count < min(len(one), len(two)) and one[count] == two[count]:
        count += 1
    return count


@states("step_dpo")
def step_dpo(x, beta):
    """DPO on the first step in which the responses differ."""
    def reward(b, k):
        slots = list(by_step(x, b, k).values())[shared_steps(x, b):]
        return summed(x, b, k, slots[0]) if slots else 0.0

    return logistic_of(x, beta, reward)


@states("scdpo")
def scdpo(x, beta):
    """DPO on all that follows the shared steps."""
    return logistic_of(x, beta, lambda b, k: sum(summed(x, b, k, slots) for slots in
                                                 list(by_step(x, b, k).values())[shared_steps(x, b):]))


@states("sdpo")
def sdpo(x, beta, unequal):
    """sp(-beta sum over turns of the difference of the turns' l); the segments have equally many turns."""
    total = []
    for b in pairs(x):
        turns = [list(by_step(x, b, k).values()) for k in (0, 1)]
        common = min(len(turns[0]), len(turns[1]))
        if unequal == "truncate" or len(turns[0]) == len(turns[1]):
            total.append(sp(-beta * sum(summed(x, b, 0, turns[0][n]) - summed(x, b, 1, turns[1][n])
                                        for n in range(common))))
    return mean(total)


@states("dmpo")
def dmpo(x, beta, gamma, phi_leading_discount):
    """DPO on sum_t phi(t, T) l_t over turns, phi = gamma^t (1 - gamma^(T-t)) / (1 - gamma^T)."""
    def phi(t, size):
        shape = (size - t) / size if gamma == 1 else (1 - gamma ** (size - t)) / (1 - gamma**size)
        return shape * (gamma**t if phi_leading_discount else 1.0)

    def reward(b, k):
        turns = list(by_step(x, b, k).values())
        return sum(phi(t, len(turns)) * summed(x, b, k, slots) for t, slots in enumerate(turns))

    return logistic_of(x, beta, reward)


@states("per_step_advantage")
def per_step_advantage(x, beta, max_log_weight):
    """-sum_t exp(A_t/beta) log pi(y_t), mean over sequences; the exponent held."""
    return mean(sum(-math.exp(min(x.advantages[b, k, t] / beta, max_log_weight)) * x.token_logps[b, k, t]
                    for t in live(x, b, k)) for b, k in completions(x))


def residuals(x, b, k, groups, beta):
    """(policy, value): means over groups of slots of the squared soft Bellman residuals at the groups' first slots."""
    policy, value = [], []
    for n, group in enumerate(groups):
        later = [t for other in groups[n + 1:] for t in other]
        now, after = beta * summed(x, b, k, group), beta * summed(x.sg, b, k, later)
        policy.append((x.sg.detached_values[b, k, group[0]] - x.scores[b, k] + now + after) ** 2)
        total = beta * summed(x.sg, b, k, group) + after
        value.append((x.detached_values[b, k, group[0]] - x.scores[b, k] + total) ** 2)
    return mean(policy), mean(value)


def soft_bellman(x, grouping, beta, alpha, value_weight):
    """Policy and value residuals as means over sequences that have groups, + alpha KL(pi || pi_ref)."""
    found = [residuals(x, b, k, grouping(b, k), beta) for b, k in completions(x) if grouping(b, k)]
    kl = mean(mean(x.policy_ref_kl[b, k, t] for t in live(x, b, k)) for b, k in completions(x))
    return mean(p for p, _ in found) + value_weight * mean(v for _, v in found) + alpha * kl


@states("oreo")
def oreo(x, beta, alpha, value_weight):
    """One residual per token."""
    return soft_bellman(x, lambda b, k: [[t] for t in live(x, b, k)], beta, alpha, value_weight)


@states("oreo:step")
def oreo_step(x, beta, alpha, value_weight):
    """One residual per step."""
    return soft_bellman(x, lambda b, k: list(by_step(x, b, k).values()), beta, alpha, value_weight)


@states("oreo:response")
def oreo_response(x, beta, alpha, value_weight):
    """One residual at the first token."""
    return soft_bellman(x, lambda b, k: [live(x, b, k)], beta, alpha, value_weight)


@states("tpo_tree")
def tpo_tree(x, beta):
    """-sum over v_i > v_j of lam_ij log sigma(RM_ij), mean over prompts; l of a response is that of its steps."""
    def step_lists(b):
        return {k: list(by_step(x, b, k).values()) for k in existing(x, b)}

    def margin(b, i, j, one, two):
        total = 0.0
        for n in range(max(len(one), len(two))):
            l_i = summed(x, b, i, one[n]) if n < len(one) else 0.0
            l_j = summed(x, b, j, two[n]) if n < len(two) else 0.0
            factor = 1.0
            if n < len(one) and n < len(two):
                factor += cosine(x.sg.hidden[b, i, one[n]].mean(0), x.sg.hidden[b, j, two[n]].mean(0))
            total += factor * beta * (l_i - l_j)
        return total

    total = []
    for b in pairs(x):
        steps = step_lists(b)
        implicit = [sum(summed(x.sg, b, k, slots) for slots in steps[k]) for k in steps]
        rank = dict(zip(steps, ranks(implicit), strict=True))
        value = 0.0
        for i in steps:
            for j in steps:
                v_i, v_j = x.scores[b, i], x.scores[b, j]
                if v_i > v_j:
                    lam = abs(2**v_i - 2**v_j) * abs(1 / math.log(1 + rank[i]) - 1 / math.log(1 + rank[j]))
                    value += lam * sp(-margin(b, i, j, steps[i], steps[j]))
        total.append(value)
    return mean(total)
