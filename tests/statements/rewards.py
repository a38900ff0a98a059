"""Statements of the reward-model losses with a second part."""

import math

from statements.base import cosine, gaps, live, mean, sigmoid, smoothed, sp, states


@states("dph")
def dph(x, beta, label_smoothing, head_smoothing, head_weight, policy_weight, form):
    """a L_DPH + b L_cDPO; separable: BCE(r_w, 1-e) + BCE(r_l, e); contrastive: smoothed logistic of r_w - r_l."""
    def cross_entropy(r, target):
        return -(target * math.log(sigmoid(r)) + (1 - target) * math.log(sigmoid(-r)))

    e = head_smoothing
    if form == "separable":
        head = mean(cross_entropy(w, 1 - e) + cross_entropy(lo, e) for w, lo in x.rewards)
    else:
        head = mean(smoothed(w - lo, e) for w, lo in x.rewards)
    return head_weight * head + policy_weight * mean(smoothed(beta * d, label_smoothing) for d in gaps(x))


def contrast(x, b, sources, goals, further, negatives, mean_goal):
    """-log p - log(1 - q) of pair b at the drawn slots; p over the whole grid of sources and goals."""
    ends = [x.hidden[b, 0, t] for t in goals]
    if mean_goal:
        ends = [sum(ends) / len(ends)]
    p = mean(sigmoid(cosine(x.hidden[b, 0, t], goal)) for t in sources for goal in ends)
    q = mean(sigmoid(cosine(x.hidden[b, 0, t], x.hidden[b, 1, s])) for t in further for s in negatives)
    return -math.log(p) - math.log(1 - q)


@states("goal_conditioned_rm")
def goal_conditioned_rm(x, contrast_weight, samples, mean_goal):
    """Bradley-Terry + w (-log p - log(1 - q)); stated for responses of one token, where the draw is forced."""
    total = []
    for b, (w, lo) in enumerate(x.rewards):
        (good,), (bad,) = live(x, b, 0), live(x, b, 1)
        drawn = [good] * samples
        total.append(sp(-(w - lo)) + contrast_weight * contrast(x, b, drawn, drawn, drawn, [bad] * samples, mean_goal))
    return mean(total)
