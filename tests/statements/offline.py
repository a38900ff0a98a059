"""Statements of the offline value-based and reward-weighted losses."""

import math

from statements.base import completions, hold, live, mean, states
from statements.points import advantage_of


def slots_of(x):
    """(b, k, t) of every scored token."""
    return [(b, k, t) for b, k in completions(x) for t in live(x, b, k)]


def conservative(x, cql_weight, bc_weight):
    """w sum_j CE(softmax(Q_j), a_t) + BC, averaged over action tokens."""
    return mean(cql_weight * -(x.q_logps[b, k, t, 0] + x.q_logps[b, k, t, 1]) - bc_weight * x.token_logps[b, k, t]
                for b, k, t in slots_of(x))


@states("ilql", "imagined_conversations")
def ilql(x, expectile, gamma, value_weight, cql_weight, bc_weight):
    """L_Q + L_V + w L_CQL + BC, all averaged over action tokens."""
    q_loss, v_loss = [], []
    for b, k in completions(x):
        slots = live(x, b, k)
        for n, t in enumerate(slots):
            after = x.sg.values[b, k, slots[n + 1]] if n + 1 < len(slots) else 0.0
            target = x.token_rewards[b, k, t] + gamma * after
            q_loss.append(sum((target - x.q_values[b, k, t, j]) ** 2 for j in (0, 1)))
            u = min(x.sg.target_q_values[b, k, t]) - x.values[b, k, t]
            v_loss.append(abs(expectile - (u < 0)) * u**2)
    return mean(q_loss) + value_weight * mean(v_loss) + conservative(x, cql_weight, bc_weight)


@states("ilql:mc_returns")
def ilql_mc_returns(x, gamma, cql_weight, bc_weight):
    """Q regressed on the discounted reward-to-go."""
    q_loss = []
    for b, k in completions(x):
        slots = live(x, b, k)
        for n, t in enumerate(slots):
            back = sum(gamma**m * x.token_rewards[b, k, s] for m, s in enumerate(slots[n:]))
            q_loss.append(sum((back - x.q_values[b, k, t, j]) ** 2 for j in (0, 1)))
    return mean(q_loss) + conservative(x, cql_weight, bc_weight)


@states("a_lol:seq")
def a_lol_seq(x, eps, value_weight, advantage):
    """-A sum_t sg[clip(pi_t/pi_ref_t, 1-eps, 1+eps)] log pi(y_t)."""
    def weight(b, k, t):
        return hold(math.exp(x.sg.token_logps[b, k, t] - x.ref_token_logps[b, k, t]), 1 - eps, 1 + eps)

    policy = mean(-advantage_of(x, b, k, advantage)
                  * sum(weight(b, k, t) * x.token_logps[b, k, t] for t in live(x, b, k)) for b, k in completions(x))
    return policy + value_weight * mean((x.prompt_values[b] - x.scores[b, k]) ** 2 for b, k in completions(x))


@states("a_lol:gold")
def a_lol_gold(x, floor):
    """-R sum_t sg[max(pi_t, floor)] log pi(y_t)."""
    return mean(-x.scores[b, k] * sum(max(math.exp(x.sg.token_logps[b, k, t]), floor) * x.token_logps[b, k, t]
                                      for t in live(x, b, k)) for b, k in completions(x))


@states("pretraining_with_preferences:filtering")
def filtering(x, threshold):
    """Likelihood of documents whose mean reward is above the threshold."""
    return mean(-x.token_logps[b, k, t] for b, k in completions(x) for t in live(x, b, k)
                if mean(x.segment_scores[b, k, s] for s in live(x, b, k)) > threshold)


@states("pretraining_with_preferences:unlikelihood")
def unlikelihood(x, threshold, alpha, clamp):
    """-log pi(y_t) where R > t, else -a log(1 - pi(y_t)), 1 - pi held at the clamp."""
    return mean(-x.token_logps[b, k, t] if x.segment_scores[b, k, t] > threshold
                else -alpha * math.log(max(-math.expm1(x.token_logps[b, k, t]), clamp)) for b, k, t in slots_of(x))


@states("pretraining_with_preferences:rwr")
def rwr(x, beta, max_weight):
    """-min(exp(R/b), max) log pi(y_t)."""
    return mean(-min(math.exp(x.segment_scores[b, k, t] / beta), max_weight) * x.token_logps[b, k, t]
                for b, k, t in slots_of(x))


@states("pretraining_with_preferences:awr")
def awr(x, alpha, beta, max_weight):
    """-a min(exp((R - sg[V])/b), max) log pi(y_t) + (1-a) (V - R)^2."""
    total = []
    for b, k, t in slots_of(x):
        r, v = x.segment_scores[b, k, t], x.values[b, k, t]
        weight = min(math.exp((r - x.sg.values[b, k, t]) / beta), max_weight)
        total.append(-alpha * weight * x.token_logps[b, k, t] + (1 - alpha) * (v - r) ** 2)
    return mean(total)


